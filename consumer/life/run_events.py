"""Runs the trainer for a job and passes its events on, to reports and checkpoint uploads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from consumer.life.checkpoint_uploads import CheckpointUploads
from consumer.life.progress_reporter import ProgressReporter
from consumer.life.stop_signal import StopSignal
from consumer.pages.observer import Observer
from consumer.trainer.trainer_process import TrainerProcess
from jobs.kinds import JobKind, KindRun, Run
from jobs.message import Job
from utils.errors import CheckpointUnusable
from utils.events import CheckpointSaved, Event, Finished, Progress, Stage, Started
from utils.logger import get_logger

log = get_logger(__name__)


def dispatch(
    event: Event, observer: Observer, reporter: ProgressReporter, uploads: CheckpointUploads
) -> None:
    """Pass one event of the trainer to the parts that handle it."""
    observer.saw(event)
    match event:
        case Started():
            log.info(
                "training_started",
                done=event.done,
                **{f"total_{event.unit}s": event.total},
                **event.facts,
            )
        case Progress():
            reporter.saw(event)
        case CheckpointSaved():
            uploads.submit(event)
        case _:
            pass  # the caller handles the end of the run


def continued_or_from_the_beginning(
    trainer: TrainerProcess,
    kind: JobKind,
    run: KindRun,
    log_fields: dict[str, Any],
    on_event: Callable[[Event], None],
    stop: StopSignal,
    *,
    max_seconds: float,
    patience: Callable[[], float],
) -> Finished:
    """Train, from the run's checkpoint if it has one.

    An intact checkpoint may still be unusable: the inputs or the base model have changed, or
    another version wrote it. Training then starts from the beginning, and the job continues.

    Raises:
        As `TrainerProcess.run`.
    """
    try:
        sent = Run.of(run, kind.runner, log_fields)
        return trainer.run(sent, on_event, stop, max_seconds=max_seconds, patience=patience)
    except CheckpointUnusable as error:
        if run.resume_from is None:
            raise
        log.warning("checkpoint_not_continued", reason=str(error))
    afresh = dataclasses.replace(run, resume_from=None)  # type: ignore[type-var]  # a dataclass
    return trainer.run(
        Run.of(afresh, kind.runner, log_fields),
        on_event,
        stop,
        max_seconds=max_seconds,
        patience=patience,
    )


def uploading(finished: Finished, job: Job) -> Progress:
    """The state of a job whose model is on its way to S3."""
    return Progress(
        task_id=job.task_id,
        stage=Stage.UPLOADING,
        done=finished.done,
        total=finished.done,
        facts=finished.facts,
    )
