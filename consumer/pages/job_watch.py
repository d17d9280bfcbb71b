"""The job in hand as it goes: what `/status` tells of it, and what the metrics count of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from jobs.kinds import JobKind
from jobs.message import Job
from services.records.job_lease import JobLease
from utils.events import CheckpointSaved, Event, Progress, Stage, Started
from utils.metrics import Metrics

DELIVERING = "delivering"
"""Stage of a job that has ended, while the backend has yet to take the ending."""


class JobWatch:
    """One claim on a job, from the claim to whatever came of it. Safe to share between threads.

    Args:
        kind: The kind of the job.
        job: The job.
        lease: The hold on it.
        metrics: Where it is counted.

    Attributes:
        latest: How far the job is, as the trainer said last; None before it said anything.
    """

    def __init__(self, kind: JobKind, job: Job, lease: JobLease, metrics: Metrics) -> None:
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
        self._epoch = self._done = 0
        self._saved_at: dict[str, float] = {}
        self._kept_at = 0.0

    @property
    def seconds(self) -> float:
        """Since the claim."""
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
        """The ending is in the record; the backend is told of it now."""
        self._has_ended = True

    def saw(self, event: Event) -> None:
        """Take note of what the trainer says."""
        self._count_time()
        match event:
            case Started():
                self._epoch, self._done = event.facts.get("epoch", 0), event.done
            case Progress():
                self._saw_progress(event)
            case CheckpointSaved():
                self._saved_at[event.name] = time.monotonic()
                self._metrics.checkpoint_save_seconds.observe(event.seconds)
            case _:
                pass

    def uploaded(self, name: str, seconds: float) -> None:
        """A checkpoint is registered: what was trained up to it is not lost any more."""
        self._metrics.checkpoint_upload_seconds.observe(seconds)
        self._kept_at = self._saved_at.get(name, self._kept_at)

    def wasted(self, reason: str, *, all_of_it: bool = False) -> None:
        """The run broke off.

        Args:
            reason: One of `utils.metrics.WASTE`.
            all_of_it: Nobody goes on from its checkpoints either.
        """
        if self._run_began_at is None:
            return
        end = self._run_over_at or time.monotonic()
        begin = self._run_began_at if all_of_it else max(self._run_began_at, self._kept_at)
        self._metrics.wasted_gpu_seconds.labels(reason).inc(max(0.0, end - begin))

    def show_lease(self) -> None:
        """Bring what changes by itself up to date."""
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
            "epoch": latest.facts.get("epoch", 0) if latest else 0,
            "total_epochs": (latest.facts if latest else self._at_first).get("total_epochs", 0),
            "step": latest.done if latest else 0,
            "total_steps": latest.total if latest else 0,
            "loss": latest.facts.get("loss") if latest else None,
            "steps_per_second": latest.per_second if latest else None,
            "estimated_seconds": latest.seconds_left if latest else None,
        }
        return facts

    def _saw_progress(self, progress: Progress) -> None:
        self.latest = progress
        left, facts = progress.seconds_left, progress.facts
        epoch, loss = facts.get("epoch", 0), facts.get("loss")
        self._lease.saw(epoch=epoch, loss=loss, seconds_left=left)
        # Less than before: training had to start over from a checkpoint.
        self._metrics.epochs.inc(max(0, epoch - self._epoch))
        self._metrics.steps.inc(max(0, progress.done - self._done))
        self._epoch, self._done = epoch, progress.done
        if progress.total:
            self._metrics.job_progress_ratio.set(progress.done / progress.total)
        if progress.per_second is not None:
            self._metrics.steps_per_second.set(progress.per_second)
        if loss is not None:
            self._metrics.loss.set(loss)
        if left is not None:
            self._metrics.job_remaining_seconds.set(left)
        if progress.gpu_memory_allocated is not None:
            self._metrics.trainer_gpu_memory_allocated_bytes.set(progress.gpu_memory_allocated)

    def _count_time(self) -> None:
        if self._run_began_at is not None:
            now = time.monotonic()
            self._metrics.training_seconds.inc(now - self._counted_to)
            self._counted_to = now
