"""The steps of a job, in order: claim, fetch, train, publish, notify the backend, settle.

Runs in the job thread of the front desk, one job at a time. It never touches the connection: it
returns a `Settlement`, which the connection's owner carries out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from pathlib import Path
from typing import Any

from consumer.desk import Desk
from consumer.life import endings, run_events
from consumer.life.checkpoint_uploads import CheckpointUploads, clear_up, newest_usable_checkpoint
from consumer.life.inputs import fetch_inputs
from consumer.life.job_size import require_room
from consumer.life.lease_relay import relayed
from consumer.life.preview_uploads import PreviewUploads
from consumer.life.progress_reporter import ProgressReporter, paused, queued
from consumer.life.put_offs import Why, why_of
from consumer.life.stop_signal import Shutdown, StopSignal
from consumer.pages.queue_watch import age_of
from jobs.kinds import Claim, JobKind, KindRun
from jobs.layout import CURVES, PREVIEW_FOLDER, Place, place_of
from jobs.message import Job, from_understood, parse
from jobs.record import (
    PAUSED_SECONDS,
    PROTOCOL_LEVEL,
    Ending,
    EndingKind,
    JobRecord,
    JobRequest,
    OwedCopy,
)
from services.broker.settlement import (
    CRASHES,
    OWN_COPY,
    PUT_OFF_REASON,
    PUT_OFFS,
    Delivery,
    Queue,
    Settlement,
)
from services.records.job_lease import JobLease
from services.records.job_records import Claimed, Ended, HeldElsewhere, OtherBody
from services.telemetry.tracing import trace_id_of
from utils import logger
from utils.errors import (
    DiskFull,
    ErrorCode,
    GpuBroken,
    InvalidMessage,
    JobTooLarge,
    LeaseLost,
    MachineError,
    NoRoomForJob,
    Stopped,
    StopReason,
    StorageError,
    TimeLimit,
    TrainingFailed,
    TrainingServerError,
    WorkerCrashed,
    code_of,
    is_retryable,
)

log = logger.get_logger(__name__)

_MOST_REJECTIONS = 10
"""After this many rejections in a row, for any reason, the job itself is at fault. If there is only
one worker, it may be the same one each time."""
_OF_THE_ORDER = (
    ErrorCode.IMAGE_DOWNLOAD_FAILED,
    ErrorCode.LOW_QUALITY_DATA,
    ErrorCode.JOB_TOO_LARGE,
    ErrorCode.TIME_LIMIT,
)


class Pipeline:
    """Handles deliveries of the training queue and decides how each is settled."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._limits = desk.limits
        self._put_offs = desk.put_offs

    def handle(self, delivery: Delivery) -> Settlement:
        """Do the job that a message orders, unless its record shows that nothing is left to do."""
        if (needed := delivery.min_level) > PROTOCOL_LEVEL:
            detail = (
                f"the message requires protocol level {needed}, but this worker has level "
                f"{PROTOCOL_LEVEL}; update the worker"
            )
            return self._put_offs.put_off(delivery, Why.NEWER_MESSAGE, detail)
        try:
            job = parse(delivery.body, message_id=delivery.message_id, kinds=self._desk.kinds)
        except InvalidMessage as error:
            return self._desk.endings.refuse(delivery, error)
        job = dataclasses.replace(job, headers=delivery.carried_headers)
        with logger.bound(**self._log_fields(job), task_id=job.task_id):
            try:
                return self._handle_job(job, delivery)
            except StorageError as error:
                # The job's record cannot be read now, so it is unknown whether the job was claimed.
                return self._put_offs.put_off(
                    delivery, why_of(error), str(error), task_id=job.task_id
                )

    def _handle_job(self, job: Job, delivery: Delivery) -> Settlement:
        may_be_claimed = delivery.redelivered or OWN_COPY in delivery.headers
        claim = self._desk.records.claim(
            JobRequest(
                task_id=job.task_id,
                kind=job.kind,
                subject=job.subject,
                identity=job.identity,
                message=job.understood(),
                webhook_url=job.webhook_url,
                id_is_derived=job.id_is_derived,
                min_level=delivery.min_level,
            ),
            new_run_after=(None if may_be_claimed else self._limits.deduplication_window_seconds),
        )
        match claim:
            case Claimed(lease=lease):
                # The record is the source of truth: its id may have a count, and the defaults of
                # the worker that wrote it may differ. The message stays as it was sent.
                job = dataclasses.replace(
                    self._as_recorded(lease.record, job),
                    task_id=lease.record.task_id,
                    body=job.body,
                    headers=job.headers,
                )
                if not may_be_claimed:
                    self._desk.observer.queues.took(job.created_at, delivery.queue)
                with logger.bound(**self._log_fields(job), task_id=job.task_id):
                    return self._hold(job, lease)
            case HeldElsewhere(record=record):
                log.info("job_held_elsewhere", wait_seconds=round(claim.wait_seconds, 1))
                return Settlement.ack(self._desk.endings.watched(record, delivery.body))
            case Ended(record=record):
                log.info("job_ended_before", ending=str(record.delivery))
                return self._desk.endings.deliver_what_is_left(record.task_id, delivery.body)
            case OtherBody():
                error = InvalidMessage(
                    f"task_id: {job.task_id} belongs to a job that asks for something else",
                    field="task_id",
                    task_id=job.task_id,
                    kind=job.kind,
                    subject=job.subject,
                )
                return self._desk.endings.refuse(delivery, error)

    def _hold(self, job: Job, lease: JobLease) -> Settlement:
        """Work on a job under its lease; once the lease is lost, only keep the job's message."""
        try:
            with lease, self._desk.observer.holding(self._kind(job), job, lease):
                return self._work(job, lease)
        except LeaseLost as error:
            log.warning("job_left_to_another_worker", reason=str(error))
            return self._watch(job, lease)

    def _as_recorded(self, record: JobRecord, job: Job) -> Job:
        """The job as its record has it; if the record cannot be read, as the message has it."""
        try:
            return from_understood(self._kind(job), record.message)
        except ValueError as error:  # damaged, or written by another version
            log.warning("record_not_understood", reason=str(error))
            return job

    def _work(self, job: Job, lease: JobLease) -> Settlement:
        """Train and publish a claimed job, then end it, retry it or return it to the queue."""
        stop = StopSignal()
        try:
            with self._desk.shutdown.covering(stop), relayed(lease, stop):
                ending = self._train_and_publish(job, lease, stop)
        except Stopped as stopped:
            return self._give_back(job, lease, stopped)
        except (TrainingServerError, OSError) as raised:
            error = _of_the_disk(raised) if isinstance(raised, OSError) else raised
            if isinstance(error, MachineError) and self._is_unfit(error):
                given_up = self._rejected_too_often(lease, error)
                if given_up is None:
                    return self._leave_to_another_machine(job, lease, error)
                error = given_up
            elif is_retryable(error) and not self._is_last_attempt(lease):
                return self._try_again(job, lease, error)
            return self._fail(job, lease, error)
        except Exception as error:  # pylint: disable=broad-exception-caught
            # A bug in the worker must still lead to an ending; the stack trace is in the log.
            log.exception("job_broke")
            ours = TrainingFailed(
                f"internal error ({type(error).__name__}); the worker's log has the stack trace"
            )
            return self._fail(job, lease, ours)
        return self._settle(job, lease, ending, None)

    def _fail(self, job: Job, lease: JobLease, error: TrainingServerError) -> Settlement:
        """End the job as failed, once no file of it is left in the model's folder."""
        try:
            self._desk.publisher.repair(_place(job), job.task_id, lease)
        except (StorageError, MachineError) as trouble:
            if not self._is_last_attempt(lease):
                return self._try_again(job, lease, trouble)
            # The turn's note stays: the next publisher repairs the folder.
            log.error("folder_not_repaired", reason=str(trouble))
        ending, owed = self._failed(job, lease, error)
        return self._settle(job, lease, ending, owed)

    def _settle(
        self, job: Job, lease: JobLease, ending: Ending, owed: OwedCopy | None
    ) -> Settlement:
        """Write the ending and the copy for the dead queue into the record, then send them.

        The message is acknowledged only after that.
        """
        desk = self._desk
        lease.end(ending, owed)
        if ending.kind is EndingKind.COMPLETE:
            desk.publisher.confirm(_place(job), job.task_id, lease)
        log.info("job_ended", ending=str(ending.kind), code=ending.code)
        desk.observer.ended(ending)
        cleared = clear_up(desk.state_s3, desk.state_bucket, lease.record, kinds=desk.kinds)
        with desk.observer.tracing.span("tell"):
            left = desk.endings.deliver(
                lease, original=job.body, for_seconds=endings.DELIVER_AT_ONCE_SECONDS
            )
        if cleared and not left:
            desk.records.forget(job.task_id)
        return Settlement.ack(*left)

    def _train_and_publish(self, job: Job, lease: JobLease, stop: StopSignal) -> Ending:
        desk, limits, kind = self._desk, self._limits, self._kind(job)
        stop.check()  # a paused job stays as it is, also beyond its limits
        if lease.record.attempts >= limits.max_attempts:
            raise _given_up(lease)
        self._require_time(job, lease)
        desk.publisher.repair(_place(job), job.task_id, lease)
        with (
            desk.folders.job() as folder,
            contextlib.nullcontext(
                PreviewUploads(folder / PREVIEW_FOLDER, desk.state_s3, desk.state_bucket, lease)
            ) as previews,
            ProgressReporter(
                kind,
                job,
                desk.webhooks,
                next_sequence=lease.next_sequence,
                stop=stop,
                interval_seconds=limits.progress_interval_seconds,
                samples=previews.newest,
            ) as reporter,
            CheckpointUploads(
                job,
                lease,
                desk.state_s3,
                desk.state_bucket,
                kept_file=kind.checkpoint_file,
                curves=folder / CURVES,
                previews=previews,
                patience=desk.shutdown.seconds_for_saving,
                uploaded=desk.observer.uploaded,
            ) as uploads,
        ):
            with desk.observer.tracing.span("fetch"):
                run = self._fetched_run(kind, job, lease, folder, stop)
            stop.check()
            with desk.observer.training():
                finished = run_events.continued_or_from_the_beginning(
                    desk.trainer,
                    kind,
                    run,
                    self._log_fields(job),
                    lambda event: run_events.dispatch(event, desk.observer, reporter, uploads),
                    stop,
                    max_seconds=max(0.0, limits.max_job_seconds - lease.seconds_run),
                    patience=desk.shutdown.seconds_for_saving,
                )
            uploads.settle()
            stop.check()
            reporter.saw(run_events.uploading(finished, job))
            with desk.observer.tracing.span("upload"):
                published = desk.publisher.publish(
                    Path(finished.folder),
                    finished.files,
                    _place(job),
                    lease,
                    stop,
                    ordered_at=lease.record.ordered_at,
                )
        # The reporter is closed: no progress follows the ending.
        return endings.complete(kind, job, finished, published, sequence=lease.next_sequence())

    def _fetched_run(
        self, kind: JobKind, job: Job, lease: JobLease, folder: Path, stop: StopSignal
    ) -> KindRun:
        """The run for the trainer, with all files that it needs in the job's folder."""
        desk = self._desk
        require_room(
            desk.s3,
            desk.state_s3,
            kind,
            job,
            folder,
            stop,
            state_bucket=desk.state_bucket,
            max_job_bytes=self._limits.max_job_bytes,
            checkpoints=lease.record.checkpoints,
        )
        fetched = fetch_inputs(
            desk.s3, kind.inputs(job.spec), folder, max_bytes=kind.max_input_bytes, stop=stop
        )
        resume_from = newest_usable_checkpoint(
            desk.state_s3, desk.state_bucket, lease.record, folder
        )
        claim = Claim(job.task_id, lease.claim_number, folder, resume_from)
        return kind.run(job.spec, fetched, claim)

    def _kind(self, job: Job) -> JobKind:
        return self._desk.kinds.of(job.kind)

    def _identity(self, job: Job) -> dict[str, Any]:
        """The fields that name the job's subject in log lines."""
        return self._kind(job).identity_fields(job.subject)

    def _log_fields(self, job: Job) -> dict[str, Any]:
        """The fields of the job's log lines, here and in the trainer: its subject and its trace."""
        return self._identity(job) | {"trace_id": trace_id_of(job.headers, job.task_id)}

    def _require_time(self, job: Job, lease: JobLease) -> None:
        """Check the time limits of a whole job: the work on it, and its wait in the queue.

        Raises:
            TimeLimit: One of them is exceeded.
        """
        limit = self._limits.max_job_seconds
        if lease.seconds_run >= limit:
            raise TimeLimit(
                f"workers have spent {lease.seconds_run:.0f} seconds on the job in all; "
                f"the limit is {limit:.0f} (MAX_JOB_SECONDS)"
            )
        longest = self._limits.max_wait_seconds
        waited = age_of(job.created_at) if lease.claim_number == 1 else None
        if longest is not None and waited is not None and waited > longest:
            raise TimeLimit(
                f"the job has waited {waited:.0f} seconds in the queue; the limit is {longest:.0f} "
                "(MAX_WAIT_SECONDS); nothing was trained"
            )

    def _is_last_attempt(self, lease: JobLease) -> bool:
        return lease.record.attempts_with_this >= self._limits.max_attempts

    def _try_again(self, job: Job, lease: JobLease, error: TrainingServerError) -> Settlement:
        """Return the message after a delay.

        The worker that gets it resumes from the last checkpoint.
        """
        delays = self._limits.retry_delays_seconds
        # An attempt that made a checkpoint is not counted; its delay is the first one.
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
        return self._after(job, lease, delay)

    def _tell_place(self, job: Job, lease: JobLease, delay: float) -> None:
        """Send the expected waiting time in a progress webhook, if it is known; in one attempt."""
        desk = self._desk
        place = desk.observer.queues.place_at_the_end(delay, Queue.of_kind(job.kind))
        if place is None or desk.observer.job is None or desk.shutdown.event.is_set():
            return
        report = queued(
            self._kind(job), job, desk.observer.job.latest, *place, sequence=lease.next_sequence()
        )
        desk.webhooks.send_progress(desk.webhooks.origin_for(job.webhook_url), report)

    def _failed(
        self, job: Job, lease: JobLease, error: TrainingServerError
    ) -> tuple[Ending, OwedCopy | None]:
        attempts = min(lease.record.attempts_with_this, self._limits.max_attempts)
        code = code_of(error)
        _log_failure(code, str(error), attempts)
        ending = endings.failed(
            self._identity(job),
            job.task_id,
            error,
            attempts=attempts,
            sequence=lease.next_sequence(),
        )
        if not is_retryable(error):
            return ending, None
        # A further attempt might help, so the dead queue keeps a copy that an operator can send
        # back.
        return ending, OwedCopy(str(code), str(error), attempts)

    def _give_back(self, job: Job, lease: JobLease, stopped: Stopped) -> Settlement:
        """Return a job because of a shutdown, a pause or a lost lease; no attempt is counted."""
        log.info("job_given_back", reason=str(stopped.reason))
        self._desk.observer.given_back(stopped.reason)
        if stopped.reason is StopReason.LEASE_LOST:
            return self._watch(job, lease)
        if stopped.reason is StopReason.PAUSED and self._stays_paused(job, lease):
            return self._pause(job, lease)
        with contextlib.suppress(LeaseLost):
            lease.release(count_attempt=False, within=Shutdown.RESERVE_SECONDS / 2)
        return Settlement.requeue()

    def _stays_paused(self, job: Job, lease: JobLease) -> bool:
        """Make the pause durable. False if it was taken back meanwhile, or S3 cannot be used."""
        requests = self._desk.records.requests
        try:
            if not self._desk.shutdown.event.is_set():  # which has seconds only
                self._desk.publisher.repair(_place(job), job.task_id, lease)
            if lease.paused.is_set():
                return requests.wants_pause(job.task_id)
            requests.pause(job.task_id)  # the backend asked for it in an answer
        except (StorageError, MachineError) as error:
            log.warning("job_not_paused", reason=str(error))
            return False
        return True

    def _pause(self, job: Job, lease: JobLease) -> Settlement:
        """The job waits without a message until it is resumed."""
        stopping = self._desk.shutdown.event.is_set()
        lease.release(
            count_attempt=False,
            quiet_seconds=PAUSED_SECONDS,
            within=Shutdown.RESERVE_SECONDS / 2 if stopping else None,
        )
        log.info("job_paused")
        if not stopping:
            self._tell_paused(job, lease)
        return Settlement.ack()

    def _tell_paused(self, job: Job, lease: JobLease) -> None:
        """Report the pause to the backend in one attempt: the record holds it."""
        desk = self._desk
        latest = desk.observer.job.latest if desk.observer.job else None
        report = paused(self._kind(job), job, latest, sequence=lease.next_sequence())
        desk.webhooks.send_progress(desk.webhooks.origin_for(job.webhook_url), report)

    def _watch(self, job: Job, lease: JobLease) -> Settlement:
        """Leave a job to another worker; its message is checked until the job is settled."""
        self._desk.observer.lease_lost()
        return Settlement.ack(self._desk.endings.watched(lease.record, job.body))

    def _is_unfit(self, error: MachineError) -> bool:
        """Whether the machine is at fault. A job that breaks every GPU must end, too."""
        if not isinstance(error, GpuBroken):
            return True
        try:
            self._desk.test_machine()
        except GpuBroken:
            return True
        log.warning("gpu_computes_again", reason="a fresh process finds nothing wrong with it")
        return False

    def _rejected_too_often(
        self, lease: JobLease, error: MachineError
    ) -> TrainingServerError | None:
        """The error that ends a job after too many rejections; None if it may go on."""
        rejections = lease.record.rejections + 1
        if isinstance(error, (DiskFull, NoRoomForJob)):
            workers = len(lease.record.rejecters_with_this)
            if workers >= self._limits.max_machines or rejections >= _MOST_REJECTIONS:
                return JobTooLarge(
                    f"no worker has enough disk space for the job; {workers} workers tried "
                    f"{rejections} times in all: {error}"
                )
        elif rejections >= _MOST_REJECTIONS:
            return WorkerCrashed(f"{rejections} machines could not train the job: {error}")
        return None

    def _leave_to_another_machine(
        self, job: Job, lease: JobLease, error: MachineError
    ) -> Settlement:
        """Return a job that this machine cannot do; no attempt is counted.

        A worker whose machine is unfit takes no further job.
        """
        if isinstance(error, NoRoomForJob):
            log.warning("job_rejected", reason=str(error))
        else:
            log.error("machine_unfit", reason=str(error))
            self._desk.machine_fails(error)
        self._desk.observer.unfit()
        delays = self._limits.retry_delays_seconds
        delay = delays[min(lease.record.rejections, len(delays) - 1)]
        lease.release(
            count_attempt=False,
            error=(str(code_of(error)), str(error)),
            quiet_seconds=delay,
            rejected=True,
        )
        return self._after(job, lease, delay)

    def _after(self, job: Job, lease: JobLease, seconds: float) -> Settlement:
        """Return the message of a claimed job after a delay.

        Until then the worker takes other jobs.

        `message_id` is the id of the claimed run. It counts if the body has no id, so that the copy
        means this run and not a later order with the same body.
        """
        counts = (PUT_OFFS, PUT_OFF_REASON, CRASHES)  # of this attempt's message
        headers = {name: value for name, value in job.headers.items() if name not in counts}
        headers[OWN_COPY] = True
        return Settlement.delayed(
            job.body,
            seconds=seconds,
            message_id=lease.record.task_id,
            headers=headers,
            queue=Queue.of_kind(job.kind),
        )


def _place(job: Job) -> Place:
    return place_of(job.kind, job.subject, job.task_id)


def _log_failure(code: ErrorCode, reason: str, attempts: int) -> None:
    """Log a failed job: as a warning if the order is at fault, since an error pages an operator."""
    level = log.error
    if code is ErrorCode.CANCELLED:
        level = log.info
    elif code in _OF_THE_ORDER:
        level = log.warning
    level("job_failed", code=str(code), reason=reason, attempts=attempts)


def _of_the_disk(error: OSError) -> MachineError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull()
    return MachineError(f"the worker's disk (WORK_DIR) cannot be used: {error.strerror}")


def _given_up(lease: JobLease) -> TrainingServerError:
    """The error of a job that has no attempts left."""
    last = lease.record.last_error
    detail = f"; the last error was: {last.message}" if last else ""
    return WorkerCrashed(
        f"given up after {lease.record.attempts} attempts that made no progress{detail}"
    )
