"""The training loop: a LoRA on SD1.5's frozen UNet, resumable at any step.

On a CPU a resumed run ends with the same bits as one that was not stopped. On a GPU it does so only
with deterministic algorithms (`use_deterministic_algorithms`), and only on the same kind of GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from jobs.checkpoint_name import folder_name
from jobs.layout import CURVES
from jobs.style import TrainingRun
from training.runtime.checkpoint import CheckpointWriter
from training.runtime.clock import Clock
from training.runtime.curves import Curves
from training.runtime.device import (
    Pace,
    allocated_bytes,
    one_run_accelerator,
    peak_memory_bytes,
    reserved_bytes,
)
from training.style import checkpoint, loop_state
from training.style.checkpoint import Checkpoint, RunState
from training.style.examples import Dataset
from training.style.families.sd15 import BaseModel
from training.style.loop_state import Counted, LoopState
from training.style.objective import Chance, denoising_losses, min_snr_weights
from training.style.plan import BATCH_ORDER, Course, Plan
from training.style.results.examiner import Examiner
from training.style.results.probe import (
    Probed,
    best_of,
    diverged,
    is_worse_than_none,
    verdict,
)
from training.style.results.report import TrainingResult
from utils.errors import StopReason, TrainingDiverged
from utils.events import CheckpointSaved, Event, Progress, Stage, Started

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10
"""fp16's loss scale starts at 65,536 and needs a few halvings; more of them are a fault."""
UPDATES_BEFORE_CHECK = 3
"""After this many updates every `lora_B` must have left zero."""
USUAL_STEPS = 4000
"""By experience of users of such trainers; there is no measurement."""


class LoRATrainer:
    """Trains one LoRA, in one go: `training.style.recovery` starts over where that fails.

    Attributes:
        newest: The newest checkpoint of the job, in memory: on the disk it is its reader's.

    Args:
        run: The run.
        base: The base model. The LoRA stays on it after `train`, for the export: the caller
            detaches it.
        dataset: The run's images, prepared.
        course: How it is trained; without one as it is asked for.
        start: The checkpoint to go on from; without one training begins at the beginning.
        emit: Takes `Started`, `Progress` and `CheckpointSaved`.
        should_stop: Asked before every optimizer step.
    """

    def __init__(
        self,
        run: TrainingRun,
        base: BaseModel,
        dataset: Dataset,
        *,
        course: Course | None = None,
        start: Checkpoint | None = None,
        emit: Callable[[Event], None] = lambda event: None,
        should_stop: Callable[[], StopReason | None] = lambda: None,
    ) -> None:
        self._run, self._base, self._dataset = run, base, dataset
        self._emit, self._should_stop = emit, should_stop
        self._course = course or Course.of(run.parameters)
        self._parameters = self._course.parameters
        order = start.state.batch_order if start else BATCH_ORDER
        self._plan = Plan(dataset.shapes, self._course.planned, self._course.rate_unit, order)
        self._start = self.newest = start
        weights = min_snr_weights(base.scheduler, self._parameters.snr_gamma)
        self._loss_weights = weights.to(base.device)
        self._clock, self._pace = Clock(), Pace(base.device)
        self._writer = CheckpointWriter(emit)
        folder = Path(run.work_folder) / CURVES if run.tensorboard else None
        self._curves = Curves(folder, first_step=start.state.step if start else 0)
        self._examiner = Examiner(run, base, dataset, should_stop, self._clock)

    def train(self) -> TrainingResult:
        """Train to the last epoch, or to a stop; then the run is saved where it stands.

        Raises:
            TrainingDiverged: The loss or the gradients stopped being finite.
            TrainingFailed: The base predicts what this loop does not train, or a part of the LoRA
                does not learn.
            CheckpointUnusable: `start` is of another run.
        """
        if self._base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._base.device)
        with self._writer, one_run_accelerator(self._base.device, self._base.dtype) as accelerator:
            with self._curves, contextlib.ExitStack() as stack:
                state = self._begin(accelerator)
                if state.lean:
                    stack.enter_context(state.lean)
                self._base.offload_encoders()
                stopped = self._loop(state, accelerator)
            self._writer.settle()
        best = best_of(state.probes)
        delivered = None if stopped else self._choose(state, best)
        return TrainingResult(
            epochs=len(state.losses),
            steps=state.step,
            loss=state.losses[-1] if state.losses else None,
            losses=tuple(state.losses),
            seconds=self._clock.seconds,
            steps_per_second=self._clock.steps_per_second,
            peak_memory_bytes=peak_memory_bytes(self._base.device),
            skipped_steps=state.skipped,
            resumed_from=self._start.state.epoch if self._start else None,
            stopped=stopped,
            parameters=self._parameters,
            warnings=self._warnings(state) + verdict(state.probes),
            probes=tuple(state.probes),
            best_epoch=best.epoch if best else None,
            delivered_epoch=delivered,
            samples=dict(state.samples),
            probe_seconds=self._examiner.probe_seconds,
            sample_seconds=self._examiner.sample_seconds,
        )

    def _choose(self, state: LoopState, best: Probed | None) -> int:
        """Leave the weights that are asked for on the base; returns their epoch."""
        if self._parameters.deliver != "best" or not best or not state.best:
            return state.epoch
        state.take_the_best()
        log.info("best_checkpoint_chosen", extra={"epoch": best.epoch, "of": state.epoch})
        return best.epoch

    def _loop(self, state: LoopState, accelerator: Accelerator) -> StopReason | None:
        """Step to the plan's end, or to a stop, whose reason is returned."""
        plan = self._plan
        while True:
            if not plan.inside_epoch(state.step):
                seen = self._examiner.examine(state)
                if seen:
                    self._refuse_divergence(state)
                self._curves.draw(self._points(state), state.step)
                self._save_if_due(state, accelerator)
                if seen and state.step == plan.total_steps:
                    break
            if reason := self._should_stop():
                if state.step != state.saved_step:
                    self._count(state)
                    self._save(state, accelerator)
                return reason
            if state.step < plan.total_steps:  # else the last examination is to be made again
                self._step(state, accelerator)
        if state.updates < UPDATES_BEFORE_CHECK:
            loop_state.assert_moved(state, self._base, self._parameters)
        return None

    def _points(self, state: LoopState) -> dict[str, float | None]:
        """The points of the curves at the end of an epoch."""
        newest = state.probes[-1] if state.probes else None
        probed = newest if newest and newest.step == state.step else None
        return {
            "train/loss": state.losses[-1] if state.losses else None,
            "train/learning_rate": self._plan.learning_rate(state.step - 1) if state.step else None,
            "train/steps_per_second": self._clock.steps_per_second,
            "probe/training": probed.training if probed else None,
            "probe/held_out": probed.held_out if probed else None,
        }

    def _step(self, state: LoopState, accelerator: Accelerator) -> None:
        """One optimizer step. Nothing in it waits for the device."""
        norm = self._backward(state, accelerator)
        state.optimizer.param_groups[0]["lr"] = self._plan.learning_rate(state.step)
        loop_state.update(state, norm, accelerator)
        state.step += 1
        self._pace.keep()
        self._clock.tick()
        if not self._plan.inside_epoch(state.step):
            self._end_epoch(state)
        self._report_progress(state)

    def _backward(self, state: LoopState, accelerator: Accelerator) -> Tensor:
        """Gradients of one optimizer step, clipped; returns their norm before that."""
        batches = self._plan.batches(state.step)
        images = sum(map(len, batches))
        for batch, chance in self._parts(batches, state.noise):
            losses, weighted = denoising_losses(
                self._base,
                self._dataset.batch(batch, state.epoch),
                chance,
                empty_text=self._dataset.embeddings[""],
                weights=self._loss_weights,
                autocast=contextlib.nullcontext() if state.lean else accelerator.autocast(),
            )
            # Every image of a step counts alike, also where the last batch is smaller.
            accelerator.backward(weighted.sum() / images)
            if state.lean:
                state.lean.gather()
            state.tally.add_losses(losses)
        norm: Tensor = accelerator.clip_grad_norm_(state.stepped, self._parameters.max_grad_norm)
        return norm

    def _parts(
        self, batches: list[list[int]], noise: torch.Generator
    ) -> Iterator[tuple[list[int], Chance]]:
        """As many images at a time as memory allows, and what is random about them."""
        size = self._parameters.batch_size
        for shape, alike in itertools.groupby(
            batches, lambda batch: self._dataset.shapes[batch[0]]
        ):
            images = list(itertools.chain.from_iterable(alike))
            # Drawn for all of them, so that smaller batches change nothing but rounding.
            chance = Chance.draw(
                (len(images), *shape),
                timesteps=self._base.scheduler.config.num_train_timesteps,
                caption_dropout=self._parameters.caption_dropout,
                noise_offset=self._parameters.noise_offset,
                generator=noise,
            )
            parts = [images[i : i + size] for i in range(0, len(images), size)]
            yield from zip(parts, chance.split(size), strict=True)

    def _end_epoch(self, state: LoopState) -> None:
        counted = self._count(state)
        if not counted.loss_count:
            raise TrainingDiverged(
                f"Training diverged: epoch {len(state.losses) + 1} had no finite loss. Lower "
                "learning_rate."
            )
        state.losses.append(counted.loss_sum / counted.loss_count)
        state.tally.start_epoch()
        epoch = len(state.losses)
        log.info("epoch_done", extra={"epoch": epoch, "step": state.step, "loss": state.losses[-1]})

    def _count(self, state: LoopState) -> Counted:
        """Read the tally: whether steps were skipped, too many perhaps, and whether all learns."""
        before, counted = state.updates, state.tally.read()
        skipped = state.step - counted.updates
        if skipped > state.skipped:
            log.warning(
                "steps_skipped", extra={"step": state.step, "steps": skipped - state.skipped}
            )
        state.updates, state.skipped = counted.updates, skipped
        state.skipped_in_a_row = counted.skipped_in_a_row
        if counted.longest_row > MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(
                f"Training diverged before step {state.step + 1}: {counted.longest_row} steps in a "
                "row had no finite gradient. Lower learning_rate."
            )
        if before < UPDATES_BEFORE_CHECK <= state.updates:
            loop_state.assert_moved(state, self._base, self._parameters)
        return counted

    def _refuse_divergence(self, state: LoopState) -> None:
        """Notice a loss that is finite, climbs and stays there."""
        if worse := diverged(state.probes, ends=len(state.losses) == self._parameters.epochs):
            raise TrainingDiverged(
                f"Training diverged: after epoch {worse.epoch} the loss on the training images, "
                f"measured with the same noise each time, is {worse.training:.4f}; without the "
                f"LoRA it is {state.probes[0].training:.4f}. Lower learning_rate."
            )

    def _save_if_due(self, state: LoopState, accelerator: Accelerator) -> None:
        """Save at the run's interval and at its end; in mid-trouble wait for the next epoch."""
        interval, epoch = self._run.checkpoint_interval, len(state.losses)
        ends = epoch == self._parameters.epochs
        since = self._plan.epochs_done(state.saved_step)
        if state.step == state.saved_step or (epoch // interval == since // interval and not ends):
            return
        if not loop_state.weights_are_finite(state):
            raise TrainingDiverged(
                f"Training diverged: after epoch {epoch} the weights are not finite. Lower "
                "learning_rate."
            )
        # A checkpoint between two skipped steps, or after a climb, may lead into a divergence.
        if ends or not (state.skipped_in_a_row or is_worse_than_none(state.probes)):
            self._save(state, accelerator)

    def _begin(self, accelerator: Accelerator) -> LoopState:
        """A fresh state, or the one of the checkpoint to start from."""
        state = loop_state.begin(self._base, self._course, accelerator)
        changed = bool(self._course.changes)
        if self._start:
            checkpoint.refuse_another_run(
                self._start.state, self._about(), names=self._dataset.names
            )
            loop_state.restore(state, self._start, accelerator)
            changed = self._course != self._start.state.course
            log.info("resumed", extra={"epoch": len(state.losses), "step": state.step})
        self._emit(
            Started(
                task_id=self._run.task_id,
                done=state.step,
                total=self._plan.total_steps,
                facts={
                    "epoch": len(state.losses),
                    "total_epochs": self._parameters.epochs,
                    "images_used": len(self._dataset.usable),
                },
                warnings=self._warnings(state),
            )
        )
        if changed:  # a resumed run must find the change
            self._save(state, accelerator)
        return state

    def _save(self, state: LoopState, accelerator: Accelerator) -> None:
        began = time.monotonic()
        epoch, inside = len(state.losses), self._plan.inside_epoch(state.step)
        name = folder_name(
            epoch, state.step, inside_epoch=inside, changes=len(self._course.changes)
        )
        folder = Path(self._run.work_folder) / "checkpoints" / name
        captured, ready = loop_state.capture(state, self._about(), accelerator)

        def save() -> None:
            ready()
            checkpoint.save(folder, captured)

        saved = CheckpointSaved(self._run.task_id, name, epoch, state.step, str(folder), 0.0)
        self._writer.write(saved, save)
        self.newest = captured
        state.saved_step = state.step
        self._clock.leave_out(time.monotonic() - began)

    def _about(self) -> RunState:
        """Whose checkpoint it is, its counters still at zero."""
        return RunState(
            task_id=self._run.task_id,
            style_id=self._run.style_id,
            claim=self._run.claim,
            base_model=self._base.hash,
            course=self._course,
            pictures=self._dataset.identities,
            total_steps=self._plan.total_steps,
            epoch=0,
            step=0,
            updates=0,
            skipped_in_a_row=0,
            losses=(),
            scaler=None,
            encoders=self._base.encoders_hash,
            batch_order=self._plan.batch_order,
        )

    def _report_progress(self, state: LoopState) -> None:
        if not self._clock.due() and state.step < self._plan.total_steps:
            return
        self._emit(
            Progress(
                task_id=self._run.task_id,
                stage=Stage.TRAINING,
                done=state.step,
                total=self._plan.total_steps,
                per_second=self._clock.warm_steps_per_second,
                gpu_memory_allocated=allocated_bytes(self._base.device),
                gpu_memory_reserved=reserved_bytes(self._base.device),
                facts={
                    "epoch": len(state.losses),
                    "total_epochs": self._parameters.epochs,
                    "loss": state.losses[-1] if state.losses else None,
                },
            )
        )

    def _warnings(self, state: LoopState) -> tuple[str, ...]:
        warnings = [*self._base.warnings, *self._dataset.warnings, *self._course.changes]
        if self._plan.total_steps > USUAL_STEPS:
            warnings.append(
                f"{self._plan.total_steps} steps are many: by experience, styles take 1,000 to "
                f"{USUAL_STEPS:,}. More may copy the images instead of learning the style; fewer "
                "epochs are recommended."
            )
        if state.skipped:
            warnings.append(
                f"{state.skipped} steps were skipped because their gradient was not finite."
            )
        return tuple(warnings)
