"""Training that recovers from errors: with less memory, or once at half the learning rate.

Each start is a new `LoRATrainer`, from the newest checkpoint of the job, after all tensors of the
failed one are freed. It first writes a checkpoint of the changed course under a new name. As soon
as that one is registered, all later checkpoints are void, and a job that is resumed on another
machine keeps the change.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from jobs.style import TrainingRun
from training.runtime.device import free_memory, out_of_memory
from training.style import checkpoint
from training.style.checkpoint import Checkpoint
from training.style.examples import Dataset
from training.style.families.sd15 import BaseModel
from training.style.plan import Course
from training.style.results.report import TrainingResult
from training.style.trainer import LoRATrainer
from utils.errors import GpuOutOfMemory, StopReason, TrainingDiverged
from utils.events import Event

log = logging.getLogger(__name__)


def train(
    run: TrainingRun,
    base: BaseModel,
    dataset: Dataset,
    *,
    emit: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], StopReason | None] = lambda: None,
) -> TrainingResult:
    """Train to the last epoch or to a stop, with a new start after an error that allows it.

    If memory runs out, training continues from the newest checkpoint with gradient checkpointing,
    and then with smaller and smaller batches, with the same number of images per step. If it
    diverges, it returns to the newest intact checkpoint, or to the beginning, and continues at half
    the rate; this happens once per job.

    Args:
        run: The run. It starts from its `resume_from`.
        base: The base model. The LoRA stays on it, for the export: the caller detaches it.
        dataset: The run's images, prepared.
        emit: Takes `Started`, again at each new start, `Progress` and `CheckpointSaved`.
        should_stop: Asked before every optimizer step.

    Raises:
        GpuOutOfMemory: Training cannot use less memory.
        TrainingDiverged: Training diverged at half the rate, too.
        TrainingFailed: See `LoRATrainer.train`.
        CheckpointUnusable: `run.resume_from` is damaged, or of another run.
    """
    began = time.monotonic()
    start = resumed = checkpoint.load(Path(run.resume_from)) if run.resume_from else None
    course = Course.of(run.parameters)
    if resumed:
        course = dataclasses.replace(resumed.state.course, asked=run.parameters)
        dataset = dataset.in_order_of(resumed.state.pictures)
    while True:
        trainer = LoRATrainer(
            run, base, dataset, course=course, start=start, emit=emit, should_stop=should_stop
        )
        try:
            result = trainer.train()
            break
        except Exception as error:  # pylint: disable=broad-exception-caught
            # An error without a remedy is raised again.
            course, start = _way_round(error, course, trainer.newest, base)
            # The frames hold the optimizer and the graph, on the GPU; a log handler may hold them.
            traceback.clear_frames(error.__traceback__)
        base.take_off()
        free_memory(base.device)
    return dataclasses.replace(
        result,
        seconds=time.monotonic() - began,
        resumed_from=resumed.state.epoch if resumed else None,
    )


def _way_round(
    error: Exception, course: Course, newest: Checkpoint | None, base: BaseModel
) -> tuple[Course, Checkpoint | None]:
    """The course after `error`, and the checkpoint to start from (None: the beginning).

    Raises:
        GpuOutOfMemory, TrainingDiverged: There is no further remedy.
        Exception: `error` itself, which is none of these.
    """
    changed: Course | None
    if isinstance(error, TrainingDiverged):
        start = newest if newest and newest.is_sound else None
        changed = course.at_half_the_rate(_next_epoch(start))
        if not changed:
            tried = " Half of the rate asked for has been tried." if course.rate_halved else ""
            raise TrainingDiverged(f"{error}{tried}") from error
    elif out_of_memory(error):
        start = newest
        changed = course.with_less_memory(
            _next_epoch(start), checkpointing_is_on=base.checkpointing
        )
        if not changed:
            raise GpuOutOfMemory(
                "There is not enough memory to train even a single image at a time, with "
                "gradient checkpointing; lower resolution or rank, or use a larger GPU."
            ) from error
    else:
        raise error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    log.warning(
        "training_starts_over",
        extra={
            "reason": reason,
            "change": changed.changes[-1],
            "epoch": start.state.epoch if start else 0,
            "step": start.state.step if start else 0,
        },
    )
    return changed, start


def _next_epoch(start: Checkpoint | None) -> int:
    return start.state.epoch + 1 if start else 1
