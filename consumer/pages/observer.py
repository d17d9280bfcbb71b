"""Worker state for the status pages and the metrics.

The parts of the worker report facts to one object. It decides nothing, and it never fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from consumer.pages.job_watch import JobWatch
from consumer.pages.queue_watch import QueueWatch
from jobs.kinds import JobKind
from jobs.message import Job
from jobs.record import Ending, EndingKind
from services.broker.settlement import Delivery, Queue
from services.records.job_lease import JobLease
from services.telemetry.tracing import Tracing
from utils.errors import ErrorCode, Refusal, StopReason
from utils.events import Event, Progress, Stage
from utils.gpu_monitor import THROTTLE_REASONS, GpuReading
from utils.metrics import NO_CODE, Metrics

_SPANS = {Stage.PREPARING: "vet", Stage.TRAINING: "train", Stage.EXPORTING: "export"}


class Observer:  # pylint: disable=too-many-public-methods  # one per event
    """The current job, the queues, and the counts since the start.

    Args:
        metrics: Receive the counts.
        tracing: Receives the spans.

    Attributes:
        metrics, tracing: The same.
        queues: Lengths and waiting times of the queues.
        last: The newest progress report of the newest job; kept after its end.
        last_kind: The kind of that job.
        gpus_lost: GPUs that could be read cannot be read any more.
    """

    def __init__(self, metrics: Metrics | None = None, tracing: Tracing | None = None) -> None:
        self.metrics = metrics or Metrics()
        self.tracing = tracing or Tracing()
        self.queues = QueueWatch(self.metrics)
        self.last: Progress | None = None
        self.last_kind: JobKind | None = None
        self.gpus_lost = False
        self._gpus_seen = False
        self._job: JobWatch | None = None
        self._stage: Stage | None = None
        self._stage_span = contextlib.ExitStack()

    @property
    def job(self) -> JobWatch | None:
        """The current job."""
        return self._job

    @contextlib.contextmanager
    def holding(self, kind: JobKind, job: Job, lease: JobLease) -> Iterator[None]:
        """Keep the job as the current one while the block runs."""
        self._job = JobWatch(kind, job, lease, self.metrics)
        self.metrics.job_in_hand.set(1)
        self.metrics.job_progress_ratio.set(0)
        claimed = {**kind.identity_fields(job.subject), "claim": lease.claim_number}
        try:
            with self.tracing.job(job.task_id, carrier=job.headers, **claimed):
                yield
        finally:
            self._job = None
            for gauge in (
                self.metrics.job_in_hand,
                self.metrics.job_remaining_seconds,
                self.metrics.lease_remaining_seconds,
                self.metrics.steps_per_second,
                self.metrics.trainer_gpu_memory_allocated_bytes,
            ):
                gauge.set(0)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Count the time of the block as training of the current job."""
        self._stage = None
        with self._job.run() if self._job else contextlib.nullcontext(), self._stage_span:
            yield

    def saw(self, event: Event) -> None:
        """Take an event of the trainer about the current job."""
        if self._job is None:
            return
        self._job.saw(event)
        self.last, self.last_kind = self._job.latest, self._job.kind
        if isinstance(event, Progress) and event.stage is not self._stage:
            self._stage = event.stage
            self._stage_span.close()
            self._stage_span.enter_context(
                self.tracing.span(_SPANS.get(event.stage, str(event.stage)))
            )

    def uploaded(self, name: str, seconds: float) -> None:
        """A checkpoint of the current job is registered."""
        if self._job:
            self._job.uploaded(name, seconds)

    def took(self, delivery: Delivery) -> None:
        """A message was delivered."""
        self.metrics.messages.labels(str(delivery.queue)).inc()
        if delivery.redelivered:
            self.metrics.redeliveries.labels(str(delivery.queue)).inc()

    def looked(self, queue: Queue, messages: int, consumers: int) -> None:
        """The broker reported a queue's length."""
        self.queues.looked(queue, messages, consumers)

    def connected(self, *, again: bool) -> None:
        """A connection to the broker is open."""
        self.metrics.broker_connected.set(1)
        if again:
            self.metrics.broker_reconnects.inc()

    def disconnected(self) -> None:
        """The connection to the broker is closed."""
        self.metrics.broker_connected.set(0)
        self.metrics.consuming.set(0)
        self.queues.lost_sight()

    def publication_refused(self, refusal: Refusal) -> None:
        """The broker did not take a publication. It is tried again."""
        self.metrics.publications_refused.labels(refusal).inc()

    def publication_stuck(self) -> None:
        """The broker does not take a publication even in its shortest form."""
        self.metrics.publications_stuck.inc()

    def refused(self, code: ErrorCode) -> None:
        """A message can never become a job."""
        self.metrics.messages_refused.labels(code).inc()

    def put_off(self, reason: str) -> None:
        """A message was put off."""
        self.metrics.messages_put_off.labels(reason).inc()

    def dead_lettered(self, code: ErrorCode) -> None:
        """A message goes to the dead queue."""
        self.metrics.messages_dead_lettered.labels(code).inc()

    def swept(self) -> None:
        """The sweep publishes a record again that no message points to."""
        self.metrics.records_swept.inc()

    def lease_lost(self) -> None:
        """A lease was lost to another worker, or it expired."""
        self.metrics.leases_lost.inc()

    def endings_pending(self, count: int, oldest_seconds: float) -> None:
        """The sweep has counted the endings that the backend has not accepted yet."""
        self.metrics.endings_pending.set(count)
        self.metrics.oldest_pending_ending_age_seconds.set(oldest_seconds)

    def ended(self, ending: Ending) -> None:
        """The current job has its ending."""
        self.metrics.jobs.labels(ending.kind, ending.code or NO_CODE).inc()
        self.tracing.note(ending=ending.kind, code=ending.code)
        if self._job is None:
            return
        self._job.ended()
        seconds = self._job.seconds
        self.metrics.job_duration_seconds.labels(ending.kind).observe(seconds)
        if ending.kind is EndingKind.COMPLETE:
            self.queues.finished(seconds)
        else:
            cancelled = ending.code == ErrorCode.CANCELLED
            self._job.wasted("cancelled" if cancelled else "failed", all_of_it=True)

    def tried_again(self, code: ErrorCode) -> None:
        """The current attempt failed, and another one follows."""
        self.metrics.job_retries.labels(code).inc()
        self.tracing.note(tried_again=code)
        self._wasted("retry")

    def given_back(self, reason: StopReason) -> None:
        """The worker stops, or another worker has the current job."""
        self.metrics.jobs_given_back.labels(reason).inc()
        self.tracing.note(given_back=reason)
        self._wasted(str(reason))

    def unfit(self) -> None:
        """The machine fails, and the current job goes to another one."""
        self.metrics.jobs_given_back.labels("machine").inc()
        self._wasted("machine")

    def gpus(self, readings: list[GpuReading]) -> None:
        """Take the readings of the GPUs. Missing values, and those of a lost GPU, are not shown."""
        metrics = self.metrics
        self._gpus_seen = self._gpus_seen or bool(readings)
        self.gpus_lost = self._gpus_seen and not readings
        for gauge in (
            metrics.gpu_memory_used_bytes,
            metrics.gpu_memory_size_bytes,
            metrics.gpu_utilisation_ratio,
            metrics.gpu_temperature_celsius,
            metrics.gpu_power_watts,
            metrics.gpu_throttled,
        ):
            if not readings:
                gauge.clear()
        for reading in readings:
            gpu = str(reading.index)
            metrics.gpu_memory_used_bytes.labels(gpu).set(reading.memory_used_bytes)
            metrics.gpu_memory_size_bytes.labels(gpu).set(reading.memory_total_bytes)
            if reading.utilisation_percent is not None:
                metrics.gpu_utilisation_ratio.labels(gpu).set(reading.utilisation_percent / 100)
            if reading.temperature_celsius is not None:
                metrics.gpu_temperature_celsius.labels(gpu).set(reading.temperature_celsius)
            if reading.power_watts is not None:
                metrics.gpu_power_watts.labels(gpu).set(reading.power_watts)
            if reading.throttled is not None:
                for reason in THROTTLE_REASONS:
                    metrics.gpu_throttled.labels(gpu, reason).set(reason in reading.throttled)

    def _wasted(self, reason: str) -> None:
        if self._job:
            self._job.wasted(reason)
