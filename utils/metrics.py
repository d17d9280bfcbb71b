"""The worker's metrics, by their Prometheus names.

The only importer of prometheus_client. The metrics have their own registry, made once per worker
and passed to the parts that count. Names and units follow Prometheus' conventions:
seconds, bytes, ratios from 0 to 1; a counter ends in `_total`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics

from utils.errors import ErrorCode, Refusal

PREFIX = "training_server"
NO_CODE = "none"
"""The label `code` of a job that did not fail."""

READINESS = ("broker", "s3", "gpu", "base_model")
"""The parts of readiness: the label `check`, and the names in `/ready`."""

WASTE = ("failed", "retry", "machine", "lease_lost", "shutdown", "paused", "cancelled")
"""Reasons for wasted GPU time: the label `reason` of `wasted_gpu_seconds_total`."""

PUT_OFFS = ("storage", "damaged_record", "newer_record", "newer_message", "crash")
"""Reasons to put a message off: the label `reason` of `messages_put_off_total`."""

_QUICK = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SAVING = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_JOBS = (30.0, 60.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0)
_OPENMETRICS = "application/openmetrics-text"


class Metrics:
    """One worker's metrics. Safe to share between threads.

    An attribute has its metric's name without the prefix, and without the `_total` of counters.

    Attributes:
        counters_of_kinds, gauges_of_kinds: The metrics that kinds of jobs have declared, by name.
    """

    def __init__(self) -> None:
        # Without creation times: they are half of all series, and no alert uses them.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.counters_of_kinds: dict[str, Counter] = {}
        self.gauges_of_kinds: dict[str, Gauge] = {}
        prometheus_client.ProcessCollector(registry=self.registry)
        self._add_jobs()
        self._add_training()
        self._add_queues()
        self._add_services()
        self._add_machine()
        self._start_at_zero()

    def _add_jobs(self) -> None:
        self.jobs = self._counter(
            "jobs", "Jobs that this worker has ended, by ending and error code", "ending", "code"
        )
        self.job_in_hand = self._gauge("job_in_hand", "1 while the worker holds a job")
        self.job_duration_seconds = self._histogram(
            "job_duration_seconds", "Time from a claim to the job's ending", _JOBS, "ending"
        )
        self.job_wait_seconds = self._histogram(
            "job_wait_seconds", "Time from a message's creation to its first delivery", _JOBS
        )
        self.job_retries = self._counter(
            "job_retries", "Attempts that failed and are retried, by error code", "code"
        )
        self.jobs_given_back = self._counter(
            "jobs_given_back", "Jobs that this worker returned unfinished, by reason", "reason"
        )
        self.messages = self._counter("messages", "Messages taken from a queue", "queue")
        self.redeliveries = self._counter(
            "redeliveries", "Messages that the broker had delivered before", "queue"
        )
        self.messages_refused = self._counter(
            "messages_refused", "Messages that can never become a job, by error code", "code"
        )
        self.messages_put_off = self._counter(
            "messages_put_off", "Messages put off for a while, by reason", "reason"
        )
        self.messages_dead_lettered = self._counter(
            "messages_dead_lettered", "Messages given up and put in the dead queue, by code", "code"
        )
        self.leases_lost = self._counter("leases_lost", "Leases on a job that were lost")
        self.records_swept = self._counter(
            "records_swept", "Records that no message pointed to, published again by the sweep"
        )
        self.endings_pending = self._gauge(
            "endings_pending", "Endings that the backend has not accepted yet, at the last sweep"
        )
        self.oldest_pending_ending_age_seconds = self._gauge(
            "oldest_pending_ending_age_seconds",
            "How long the backend has not taken the oldest of them, at the last sweep; 0 with none",
        )

    def _add_training(self) -> None:
        self.training_seconds = self._counter(
            "training_seconds", "Time in which the trainer worked on a run"
        )
        self.steps = self._counter("steps", "Optimizer steps trained, repeated ones too")
        self.wasted_gpu_seconds = self._counter(
            "wasted_gpu_seconds",
            "Trainer time whose work was thrown away: after the last registered checkpoint of an "
            "attempt that broke off, or all of a run whose job failed",
            "reason",
        )
        self.steps_per_second = self._gauge("steps_per_second", "Speed of the current run")
        self.job_progress_ratio = self._gauge(
            "job_progress_ratio", "Completed part of the current job"
        )
        self.job_remaining_seconds = self._gauge(
            "job_remaining_seconds", "Estimated remaining training time of the current job"
        )
        self.lease_remaining_seconds = self._gauge(
            "lease_remaining_seconds",
            "Time until the lease on the current job expires unless renewed",
        )
        self.checkpoint_save_seconds = self._histogram(
            "checkpoint_save_seconds", "Time for which training paused for a checkpoint", _SAVING
        )
        self.checkpoint_upload_seconds = self._histogram(
            "checkpoint_upload_seconds", "Time from upload to registration of a checkpoint", _SAVING
        )
        self.trainer_up = self._gauge("trainer_up", "1 while the trainer process lives")
        self.trainer_restarts = self._counter(
            "trainer_restarts", "Trainer processes started in place of one that died or hung"
        )
        self.trainer_processes = self._gauge(
            "trainer_processes",
            "Processes, one to a GPU, that train a run of a language model together",
        )
        self.trainer_gpu_memory_allocated_bytes = self._gauge(
            "trainer_gpu_memory_allocated_bytes", "Memory of the GPU that the trainer's tensors use"
        )

    def _add_queues(self) -> None:
        self.queue_messages = self._gauge(
            "queue_messages", "Messages ready in a queue, without those being handled", "queue"
        )
        self.queue_consumers = self._gauge("queue_consumers", "Consumers of a queue", "queue")
        self.queue_oldest_message_age_seconds = self._gauge(
            "queue_oldest_message_age_seconds",
            "The oldest waiting training message has waited at most so long; 0 with none waiting, "
            "no number while nothing is known",
        )
        self.broker_connected = self._gauge("broker_connected", "1 while connected to RabbitMQ")
        self.consuming = self._gauge("consuming", "1 while the worker takes training messages")
        self.broker_reconnects = self._counter(
            "broker_reconnects", "Connections to RabbitMQ after the first"
        )
        self.publications_refused = self._counter(
            "publications_refused", "Publications that RabbitMQ did not accept", "refusal"
        )
        self.publications_stuck = self._counter(
            "publications_stuck", "Refusals of a publication in its shortest form"
        )

    def _add_services(self) -> None:
        self.webhook_attempts = self._counter(
            "webhook_attempts", "Webhooks sent, by kind and status class", "kind", "outcome"
        )
        self.webhook_duration_seconds = self._histogram(
            "webhook_duration_seconds", "One attempt at a webhook", _QUICK, "kind"
        )
        self.s3_requests = self._counter(
            "s3_requests", "Calls to S3, with the client's own repetitions", "operation", "outcome"
        )
        self.s3_request_duration_seconds = self._histogram(
            "s3_request_duration_seconds",
            "One call to S3, until its answer's head where a body follows",
            _QUICK,
            "operation",
        )
        self.s3_bytes = self._counter(
            "s3_bytes", "Bytes of objects sent to and received from S3", "direction"
        )

    def _add_machine(self) -> None:
        self.gpu_memory_used_bytes = self._gauge(
            "gpu_memory_used_bytes", "GPU memory in use by all processes", "gpu"
        )
        self.gpu_memory_size_bytes = self._gauge("gpu_memory_size_bytes", "GPU memory", "gpu")
        self.gpu_utilisation_ratio = self._gauge(
            "gpu_utilisation_ratio", "Part of the time in which a kernel ran", "gpu"
        )
        self.gpu_temperature_celsius = self._gauge(
            "gpu_temperature_celsius", "Temperature of the GPU's chip", "gpu"
        )
        self.gpu_power_watts = self._gauge("gpu_power_watts", "Power drawn by the GPU", "gpu")
        self.gpu_throttled = self._gauge(
            "gpu_throttled",
            "1 while the GPU holds its clocks down for this reason",
            "gpu",
            "reason",
        )
        self.disk_free_bytes = self._gauge(
            "disk_free_bytes", "Free disk space at the worker's folders", "folder"
        )
        self.disk_size_bytes = self._gauge(
            "disk_size_bytes", "Size of the disks of these folders", "folder"
        )
        self.ready = self._gauge("ready", "1 while /ready answers 200")
        self.ready_check = self._gauge("ready_check", "1 while this part is ready", "check")
        self.worker = Info(f"{PREFIX}_worker", "Facts about this worker", registry=self.registry)

    def declare(self, counters: Mapping[str, str], gauges: Mapping[str, str]) -> None:
        """Add the metrics of a kind of job. One that another kind has declared is shared.

        Args:
            counters, gauges: Help texts, by name.
        """
        for name, text in counters.items():
            if name not in self.counters_of_kinds:
                self.counters_of_kinds[name] = self._counter(name, text)
        for name, text in gauges.items():
            if name not in self.gauges_of_kinds:
                self.gauges_of_kinds[name] = self._gauge(name, text)

    def _start_at_zero(self) -> None:
        """`increase()` does not count the first event of a series that appears with it."""
        self.jobs.labels("complete", NO_CODE)
        for code in ErrorCode:
            self.jobs.labels("failed", code)
            self.job_retries.labels(code)
            self.messages_dead_lettered.labels(code)
        self.messages_refused.labels(ErrorCode.INVALID_MESSAGE)
        self.messages_refused.labels(ErrorCode.UNKNOWN_TYPE)
        for queue in ("training", "endings"):
            self.messages.labels(queue)
            self.redeliveries.labels(queue)
        for refusal in Refusal:
            self.publications_refused.labels(refusal)
        for reason in PUT_OFFS:
            self.messages_put_off.labels(reason)
        for reason in WASTE:
            self.wasted_gpu_seconds.labels(reason)
        for direction in ("sent", "received"):
            self.s3_bytes.labels(direction)
        for check in READINESS:
            self.ready_check.labels(check)
        self.queue_oldest_message_age_seconds.set(float("nan"))

    def render(self, accept: str) -> tuple[bytes, str]:
        """Everything as text for a scraper.

        Args:
            accept: The request's `Accept` header.

        Returns:
            The text, and its content type: OpenMetrics if the request accepts it.
        """
        return _rendered(self.registry, accept)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, labels, buckets=buckets, registry=self.registry)


class ApiMetrics:
    """The metrics of one API process. Safe to share between threads.

    Attributes are named as in `Metrics`.
    """

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        self.requests = Counter(
            f"{PREFIX}_api_requests",
            "Requests, by route and status",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            f"{PREFIX}_api_request_seconds",
            "Time from a request to the end of its answer, without event streams",
            ("route",),
            buckets=_QUICK,
            registry=self.registry,
        )
        self.webhooks = Counter(
            f"{PREFIX}_api_webhooks",
            "Webhooks of workers that were verified, by kind",
            ("kind",),
            registry=self.registry,
        )
        self.webhooks_sent = Counter(
            f"{PREFIX}_api_webhooks_sent",
            "Webhooks sent to organisations, by status class",
            ("outcome",),
            registry=self.registry,
        )
        self.webhooks_waiting = self._gauge(
            "api_webhooks_waiting", "Webhooks for organisations that are not delivered yet"
        )
        self.webhooks_oldest_seconds = self._gauge(
            "api_webhooks_oldest_seconds", "Age of the oldest of them; 0 with none"
        )
        self.jobs = self._gauge("api_jobs", "Jobs that have not ended, by status", "status")
        self.outbox = self._gauge("api_outbox", "Messages that are due and not confirmed")
        self.outbox_oldest_seconds = self._gauge(
            "api_outbox_oldest_seconds", "How long the oldest of them has been due; 0 with none"
        )
        self.waiting_oldest_seconds = self._gauge(
            "api_waiting_oldest_seconds",
            "How long the oldest job has waited for its organisation's turn; 0 with none",
        )
        self.database_up = self._gauge("api_database_up", "1 if the database can be used")
        self.broker_connected = self._gauge("api_broker_connected", "1 while connected to RabbitMQ")
        self.streams = self._gauge("api_event_streams", "Open event streams of this process")
        self.relay_age = self._gauge(
            "api_relay_age_seconds",
            "Seconds since the relay of this process last ran; NaN: never",
        )

    def render(self, accept: str) -> tuple[bytes, str]:
        """As `Metrics.render`."""
        return _rendered(self.registry, accept)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)


def _rendered(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    # Not `choose_encoder`, which would read versions and escapings off a stranger's header.
    if _OPENMETRICS in _kinds(accept):
        encode: Callable[[CollectorRegistry], bytes] = openmetrics.generate_latest
        return encode(registry), openmetrics.CONTENT_TYPE_LATEST
    return prometheus_client.generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def formats(accept: str) -> frozenset[str]:
    """The formats of Prometheus that an `Accept` header names, as scrapers' do; empty: none."""
    return frozenset(_kinds(accept) & {"text/plain", _OPENMETRICS})


def _kinds(accept: str) -> set[str]:
    return {part.split(";")[0].strip().lower() for part in accept.split(",")}
