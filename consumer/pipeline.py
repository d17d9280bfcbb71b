"""A job's life, top to bottom: claim, fetch, train, publish, tell, settle.

Runs in the job thread of the front desk, one job at a time. It never touches the connection: it
returns a `Settlement`, which the connection's owner carries out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path

from config import Settings
from consumer import endings, messages, run_events
from consumer.checkpoint_uploads import CheckpointUploads, clear_up, newest_usable_checkpoint
from consumer.endings import Endings
from consumer.lease_relay import relayed
from consumer.machine import require_fit
from consumer.model_publisher import ModelPublisher
from consumer.observer import Observer
from consumer.pictures import fetch_pictures, fetch_validation_pictures
from consumer.progress_reporter import ProgressReporter, RouteMemory, queued
from consumer.settlement import OWN_COPY, Delivery, Publication, Settlement
from consumer.stop_signal import Shutdown, StopSignal
from consumer.trainer_process import TrainerProcess
from consumer.training_job import TrainingJob, from_understood
from consumer.work_folder import WorkFolder
from services.job_lease import JobLease
from services.job_record import Ending, JobRecord, JobRequest
from services.job_records import Claimed, Ended, HeldElsewhere, JobRecords, OtherBody
from services.s3_service import S3Service
from services.webhook_service import WebhookService
from training.lora_config import CURVES, TrainingRun
from utils import logger
from utils.errors import (
    DiskFull,
    GpuBroken,
    InvalidMessage,
    LeaseLost,
    MachineError,
    Stopped,
    StopReason,
    StorageError,
    TrainingFailed,
    TrainingServerError,
    WorkerCrashed,
    code_of,
    is_retryable,
)

log = logger.get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Desk:
    """What the pipeline works with; made in `main`."""

    settings: Settings
    s3: S3Service
    webhooks: WebhookService
    records: JobRecords
    endings: Endings
    publisher: ModelPublisher
    trainer: TrainerProcess
    folders: WorkFolder
    shutdown: Shutdown
    machine_fails: Callable[[MachineError], None]
    observer: Observer


class Pipeline:
    """Takes deliveries of the training queue and says what becomes of them."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._settings = desk.settings
        self._routes = RouteMemory()

    def handle(self, delivery: Delivery) -> Settlement:
        """Do what a message asks for, unless its record says that there is nothing to do."""
        try:
            job = messages.parse(
                delivery.body, message_id=delivery.message_id, settings=self._settings
            )
        except InvalidMessage as error:
            return self._desk.endings.refuse(delivery, error)
        job = dataclasses.replace(job, headers=delivery.carried_headers)
        with logger.bound(task_id=job.task_id, style_id=job.style_id):
            try:
                return self._handle_job(job, delivery)
            except (LeaseLost, StorageError) as error:
                # Either the job is another worker's, or nothing can be known of it now.
                log.warning("job_put_off", reason=str(error))
                return self._put_off(job, self._settings.lease_ttl_seconds)

    def _handle_job(self, job: TrainingJob, delivery: Delivery) -> Settlement:
        own_copy = OWN_COPY in delivery.headers
        claim = self._desk.records.claim(
            JobRequest(
                task_id=job.task_id,
                style_id=job.style_id,
                identity=job.identity,
                message=job.understood(),
                webhook_url=job.webhook_url,
                id_is_derived=job.id_is_derived,
            ),
            new_run_after=(
                None
                if delivery.redelivered or own_copy
                else self._settings.deduplication_window_seconds
            ),
        )
        match claim:
            case Claimed():
                # The record is the truth: its id may have got a count, and another worker's
                # defaults may differ from ours. The message stays what was sent.
                record = claim.lease.record
                job = dataclasses.replace(
                    self._as_recorded(record, job),
                    task_id=record.task_id,
                    body=job.body,
                    headers=job.headers,
                )
                if not (delivery.redelivered or own_copy):
                    self._desk.observer.queues.took(job.created_at)
                with (
                    logger.bound(task_id=job.task_id),
                    claim.lease as lease,
                    self._desk.observer.holding(job, lease),
                ):
                    return self._work(job, lease)
            case HeldElsewhere():
                log.info("job_held_elsewhere", wait_seconds=round(claim.wait_seconds, 1))
                return self._put_off(job, self._settings.lease_ttl_seconds)
            case Ended():
                log.info("job_ended_before", ending=str(claim.record.delivery))
                return self._deliver_what_is_left(claim.record.task_id, delivery.body)
            case OtherBody():
                error = InvalidMessage(
                    f"task_id: {job.task_id} belongs to a job that asks for something else",
                    field="task_id",
                    task_id=job.task_id,
                    style_id=job.style_id,
                )
                return self._desk.endings.refuse(delivery, error)

    def _as_recorded(self, record: JobRecord, job: TrainingJob) -> TrainingJob:
        """The job as it was understood first; as it is understood now where that cannot be read."""
        try:
            return from_understood(record.message, self._settings)
        except ValueError as error:  # damaged, or written by another version
            log.warning("record_not_understood", reason=str(error))
            return job

    def _work(self, job: TrainingJob, lease: JobLease) -> Settlement:
        """From a claim to an ending, or back to the queue."""
        stop = StopSignal()
        dead: tuple[Publication, ...] = ()
        try:
            with self._desk.shutdown.covering(stop), relayed(lease, stop):
                ending = self._train_and_publish(job, lease, stop)
        except Stopped as stopped:
            return self._give_back(job, lease, stopped)
        except (TrainingServerError, OSError) as raised:
            error = _of_the_disk(raised) if isinstance(raised, OSError) else raised
            if isinstance(error, MachineError) and self._is_unfit(error):
                return self._leave_to_another_machine(job, lease, error)
            if is_retryable(error) and not self._is_last_attempt(lease):
                return self._try_again(job, lease, error)
            ending, dead = self._failed(job, lease, error)
        except Exception as error:  # pylint: disable=broad-exception-caught
            # A bug of ours must not cost the artist the ending; the stack trace is in the log.
            log.exception("job_broke")
            ours = TrainingFailed(
                f"internal error ({type(error).__name__}); the worker's log says more"
            )
            ending, dead = self._failed(job, lease, ours)
        return self._settle(job, lease, ending, dead)

    def _settle(
        self, job: TrainingJob, lease: JobLease, ending: Ending, dead: tuple[Publication, ...]
    ) -> Settlement:
        """The ending is durable before anybody is told, and the message acked after that."""
        lease.end(ending)
        log.info("job_ended", ending=str(ending.kind), code=ending.code)
        self._desk.observer.ended(ending)
        clear_up(self._desk.s3, self._settings.state_bucket_name, lease.record)
        with self._desk.observer.tracing.span("tell"):
            parked = self._desk.endings.deliver(
                lease, original=job.body, for_seconds=endings.DELIVER_AT_ONCE_SECONDS
            )
        return Settlement.ack(*dead, *parked)

    def _train_and_publish(self, job: TrainingJob, lease: JobLease, stop: StopSignal) -> Ending:
        desk, settings = self._desk, self._settings
        if lease.record.attempts >= settings.max_attempts:
            raise _given_up(lease)
        stop.check()
        desk.publisher.repair(job.style_id, job.task_id, lease)
        with (
            desk.folders.job() as folder,
            ProgressReporter(
                job,
                desk.webhooks,
                self._routes,
                next_sequence=lease.next_sequence,
                stop=stop,
                interval_seconds=settings.progress_interval_seconds,
            ) as reporter,
            CheckpointUploads(
                job,
                lease,
                desk.s3,
                settings.state_bucket_name,
                curves=folder / CURVES,
                patience=desk.shutdown.seconds_for_saving,
                uploaded=desk.observer.uploaded,
            ) as uploads,
        ):
            with desk.observer.tracing.span("fetch"):
                run = self._fetched_run(job, lease, folder, stop)
            stop.check()
            with desk.observer.training():
                finished = run_events.continued_or_from_the_beginning(
                    desk.trainer,
                    run,
                    lambda event: run_events.dispatch(event, desk.observer, reporter, uploads),
                    stop,
                    max_seconds=settings.max_job_seconds,
                    patience=desk.shutdown.seconds_for_saving,
                )
            uploads.settle()
            stop.check()
            reporter.saw(run_events.uploading(finished, job))
            with desk.observer.tracing.span("upload"):
                published = desk.publisher.publish(
                    Path(finished.folder),
                    finished.files,
                    job,
                    lease,
                    stop,
                    ordered_at=job.created_at or lease.record.created_at,
                )
        # The reporter is closed: no progress follows the ending.
        return endings.complete(job, finished, published.model_url, sequence=lease.next_sequence())

    def _fetched_run(
        self, job: TrainingJob, lease: JobLease, folder: Path, stop: StopSignal
    ) -> TrainingRun:
        """What the trainer is told, with everything that it needs in the job's folder."""
        s3, settings = self._desk.s3, self._settings
        return TrainingRun(
            task_id=job.task_id,
            style_id=job.style_id,
            claim=lease.claim_number,
            pictures=fetch_pictures(s3, settings, job, folder / "pictures", stop),
            parameters=job.hyper_parameters,
            work_folder=str(folder),
            resume_from=newest_usable_checkpoint(
                s3, settings.state_bucket_name, lease.record, folder
            ),
            min_images=settings.min_images,
            max_image_pixels=settings.max_image_pixels,
            checkpoint_interval=settings.checkpoint_interval,
            validation_pictures=fetch_validation_pictures(
                s3, settings, job, folder / "validation", stop
            ),
            sample_prompts=job.sample_prompts,
            trigger_word=job.trigger_word,
            sample_steps=settings.sample_steps,
            preview_share=settings.preview_share,
            tensorboard=settings.tensorboard,
        )

    def _is_last_attempt(self, lease: JobLease) -> bool:
        return lease.record.attempts_with_this >= self._settings.max_attempts

    def _try_again(
        self, job: TrainingJob, lease: JobLease, error: TrainingServerError
    ) -> Settlement:
        """The message comes back after a while; whoever gets it resumes from the last
        checkpoint."""
        delays = self._settings.retry_delays_seconds
        # An attempt that made a checkpoint counts as none, and waits like the first.
        delay = delays[min(max(1, lease.record.attempts_with_this), len(delays)) - 1]
        log.warning(
            "job_will_be_tried_again",
            code=str(code_of(error)),
            reason=str(error),
            attempts=lease.record.attempts_with_this,
            delay_seconds=delay,
        )
        self._desk.observer.tried_again(code_of(error))
        self._tell_place(job, lease, delay)
        lease.release(
            count_attempt=True, error=(str(code_of(error)), str(error)), quiet_seconds=delay
        )
        return self._put_off(job, delay)

    def _tell_place(self, job: TrainingJob, lease: JobLease, delay: float) -> None:
        """Tell the artist how long the job waits now, where that can be said; in one attempt."""
        desk = self._desk
        place = desk.observer.queues.place_at_the_end(delay)
        if place is None or desk.observer.job is None or desk.shutdown.event.is_set():
            return
        report = queued(job, desk.observer.job.latest, *place, sequence=lease.next_sequence())
        desk.webhooks.send_progress(desk.webhooks.origin_for(job.webhook_url), report)

    def _failed(
        self, job: TrainingJob, lease: JobLease, error: TrainingServerError
    ) -> tuple[Ending, tuple[Publication, ...]]:
        self._desk.publisher.repair(job.style_id, job.task_id, lease)
        attempts = min(lease.record.attempts_with_this, self._settings.max_attempts)
        log.error("job_failed", code=str(code_of(error)), reason=str(error), attempts=attempts)
        ending = endings.failed(
            job.style_id, job.task_id, error, attempts=attempts, sequence=lease.next_sequence()
        )
        if not is_retryable(error):
            return ending, ()
        # Given up, though another attempt might have helped: kept for a person to send back.
        dead = Publication.to_dead(
            job.body,
            code=str(code_of(error)),
            message=str(error),
            task_id=job.task_id,
            attempts=attempts,
        )
        return ending, (dead,)

    def _give_back(self, job: TrainingJob, lease: JobLease, stopped: Stopped) -> Settlement:
        """The worker shuts down, or the job is another's: no attempt is counted."""
        log.info("job_given_back", reason=str(stopped.reason))
        self._desk.observer.given_back(stopped.reason)
        if stopped.reason is StopReason.LEASE_LOST:
            return self._put_off(job, self._settings.lease_ttl_seconds)
        with contextlib.suppress(LeaseLost):
            lease.release(count_attempt=False, within=Shutdown.RESERVE_SECONDS / 2)
        return Settlement.requeue()

    def _is_unfit(self, error: MachineError) -> bool:
        """Whether the machine is to blame. A job that breaks every GPU in turn must end, too."""
        if not isinstance(error, GpuBroken):
            return True
        try:
            require_fit(self._settings.trainer_environment(), allow_cpu=self._settings.allow_cpu)
        except GpuBroken:
            return True
        log.warning("gpu_computes_again", reason="a fresh process finds nothing wrong with it")
        return False

    def _leave_to_another_machine(
        self, job: TrainingJob, lease: JobLease, error: MachineError
    ) -> Settlement:
        """No attempt is counted, and this worker takes no further job."""
        log.error("machine_unfit", reason=str(error))
        self._desk.observer.unfit()
        self._desk.machine_fails(error)
        delay = self._settings.retry_delays_seconds[0]
        lease.release(
            count_attempt=False, error=(str(code_of(error)), str(error)), quiet_seconds=delay
        )
        return self._put_off(job, delay)

    def _put_off(self, job: TrainingJob, seconds: float) -> Settlement:
        """The message comes back after a while; until then the GPU takes another job.

        Its id rides in `message_id`, which counts where the body has none.
        """
        headers = job.headers | {OWN_COPY: True}
        return Settlement.delayed(
            job.body, seconds=seconds, message_id=job.task_id, headers=headers
        )

    def _deliver_what_is_left(self, task_id: str, original: bytes) -> Settlement:
        """A job that has ended is not trained again, whatever the queue says."""
        claim = self._desk.records.adopt_ending(task_id)
        if not isinstance(claim, Claimed):
            # Delivered, or in the hands of another worker, whose endings' queue has it.
            return Settlement.ack()
        with claim.lease as lease:
            return Settlement.ack(
                *self._desk.endings.deliver(lease, original=original, for_seconds=0)
            )


def _of_the_disk(error: OSError) -> MachineError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull()
    return MachineError(f"the worker's disk cannot be used: {error.strerror}")


def _given_up(lease: JobLease) -> TrainingServerError:
    """Why a job is not tried once more: its workers died of it, or its last error says."""
    last = lease.record.last_error
    detail = f"; the last error was: {last.message}" if last else ""
    return WorkerCrashed(
        f"given up after {lease.record.attempts} attempts that made no progress{detail}"
    )
