"""The current job: its facts for `/status` and its share of the metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.kinds import JobKind
from jobs.message import Job
from services.records.job_lease import JobLease
from utils.events import CheckpointSaved, Event, Progress, Stage, Started
from utils.metrics import Metrics

DELIVERING = "delivering"
"""Stage of a job that has ended, until the backend accepts the ending."""


class JobWatch:
    """One claim on a job, from the claim to its result. Safe to share between threads.

    Args:
        kind: The kind of the job.
        job: The job.
        lease: The hold on the job.
        metrics: Count the job.

    Attributes:
        kind: The kind of the job.
        latest: The newest progress report of the trainer; None before the first.
    """

    def __init__(self, kind: JobKind, job: Job, lease: JobLease, metrics: Metrics) -> None:
        self.kind = kind
        self.latest: Progress | None = None
        self._identity_fields = kind.identity_fields(job.subject)
        self._at_first = kind.beginning(job.spec)
        self._lease = lease
        self._metrics = metrics
        self._began_at = time.monotonic()
        self._run_began_at: float | None = None
        self._counted_to = 0.0
        self._run_over_at: float | None = None
        self._has_ended = False
        self._done = 0
        self._counts: Mapping[str, float] = {}
        metrics.declare(kind.counters, kind.gauges)
        # The record still has what the holder before saw.
        lease.saw(kind.shown(self._at_first).record, seconds_left=None)
        self._saved_at: dict[str, float] = {}
        self._kept_at = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the claim."""
        return time.monotonic() - self._began_at

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """While the block runs the trainer works on the job."""
        self._run_began_at = self._counted_to = time.monotonic()
        self._run_over_at = None
        try:
            yield
        finally:
            self._count_time()
            self._run_over_at = self._counted_to

    @property
    def stage(self) -> str:
        """The job's stage: the trainer names it while it works, and this process afterwards."""
        if self._has_ended:
            return DELIVERING
        stage = self.latest.stage if self.latest else Stage.PREPARING
        if self._run_over_at is not None and stage is Stage.EXPORTING:
            return str(Stage.UPLOADING)
        return str(stage)

    def ended(self) -> None:
        """The ending is in the record, and its delivery to the backend begins."""
        self._has_ended = True

    def saw(self, event: Event) -> None:
        """Take an event of the trainer."""
        self._count_time()
        match event:
            case Started():
                self._counts, self._done = self.kind.shown(event.facts).counts, event.done
            case Progress():
                self._saw_progress(event)
            case CheckpointSaved():
                self._saved_at[event.name] = time.monotonic()
                self._metrics.checkpoint_save_seconds.observe(event.seconds)
            case _:
                pass

    def uploaded(self, name: str, seconds: float) -> None:
        """A checkpoint is registered: the training up to it cannot be lost any more."""
        self._metrics.checkpoint_upload_seconds.observe(seconds)
        self._kept_at = self._saved_at.get(name, self._kept_at)

    def wasted(self, reason: str, *, all_of_it: bool = False) -> None:
        """The run ended without a result.

        Args:
            reason: One of `utils.metrics.WASTE`.
            all_of_it: No later run continues from its checkpoints.
        """
        if self._run_began_at is None:
            return
        end = self._run_over_at or time.monotonic()
        begin = self._run_began_at if all_of_it else max(self._run_began_at, self._kept_at)
        self._metrics.wasted_gpu_seconds.labels(reason).inc(max(0.0, end - begin))

    def show_lease(self) -> None:
        """Update the metrics that change with time."""
        self._metrics.lease_remaining_seconds.set(max(0.0, self._lease.remaining))

    def facts(self) -> dict[str, Any]:
        """The job for `/status`: JSON values."""
        record, latest = self._lease.record, self.latest
        facts: dict[str, Any] = {
            "task_id": record.task_id,
            **self._identity_fields,
            "claim": record.claim,
            "attempts": record.attempts_with_this,
            "seconds": round(self.seconds, 1),
            "lease_remaining_seconds": round(self._lease.remaining, 1),
            "stage": self.stage,
            **self.kind.shown(latest.facts if latest else self._at_first).status,
            "step": latest.done if latest else 0,
            "total_steps": latest.total if latest else 0,
            "steps_per_second": latest.per_second if latest else None,
            "estimated_seconds": latest.seconds_left if latest else None,
        }
        return facts

    def _saw_progress(self, progress: Progress) -> None:
        self.latest = progress
        left, shown = progress.seconds_left, self.kind.shown(progress.facts)
        self._lease.saw(shown.record, seconds_left=left)
        # Less than before: training had to start over from a checkpoint.
        for name, count in shown.counts.items():
            self._metrics.counters_of_kinds[name].inc(max(0, count - self._counts.get(name, 0)))
        self._metrics.steps.inc(max(0, progress.done - self._done))
        self._counts, self._done = shown.counts, progress.done
        if progress.total:
            self._metrics.job_progress_ratio.set(progress.done / progress.total)
        if progress.per_second is not None:
            self._metrics.steps_per_second.set(progress.per_second)
        for name, value in shown.gauges.items():
            if value is not None:
                self._metrics.gauges_of_kinds[name].set(value)
        if left is not None:
            self._metrics.job_remaining_seconds.set(left)
        if progress.gpu_memory_allocated is not None:
            self._metrics.trainer_gpu_memory_allocated_bytes.set(progress.gpu_memory_allocated)

    def _count_time(self) -> None:
        if self._run_began_at is not None:
            now = time.monotonic()
            self._metrics.training_seconds.inc(now - self._counted_to)
            self._counted_to = now
