"""What the desk does with each event of a run: it reports the newest state, uploads checkpoints."""

from __future__ import annotations

from consumer.checkpoint_uploads import CheckpointUploads
from consumer.observer import Observer
from consumer.progress_reporter import ProgressReporter
from consumer.training_job import TrainingJob
from utils.events import CheckpointSaved, Event, Finished, Progress, Stage, Started
from utils.logger import get_logger

log = get_logger(__name__)


def dispatch(
    event: Event, observer: Observer, reporter: ProgressReporter, uploads: CheckpointUploads
) -> None:
    """Hand one event of the trainer to whom it concerns."""
    observer.saw(event)
    match event:
        case Started():
            log.info(
                "training_started",
                epoch=event.epoch,
                total_epochs=event.total_epochs,
                total_steps=event.total_steps,
                pictures=event.pictures_used,
            )
        case Progress():
            reporter.saw(event)
        case CheckpointSaved():
            uploads.submit(event)
        case _:
            pass  # how the run ended is the caller's to see


def uploading(finished: Finished, job: TrainingJob) -> Progress:
    """The state of a job whose model is on its way to S3."""
    return Progress(
        task_id=job.task_id,
        stage=Stage.UPLOADING,
        epoch=finished.epoch,
        total_epochs=finished.epoch,
        step=finished.step,
        total_steps=finished.step,
        loss=finished.loss,
    )
