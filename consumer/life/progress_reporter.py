"""Sends progress webhooks: one at the start of training, then one at each interval.

The interval is `PROGRESS_INTERVAL_SECONDS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from consumer.life.stop_signal import StopSignal
from jobs.kinds import JobKind
from jobs.message import Job
from services.webhooks.webhook_service import ProgressAnswer, WebhookService
from utils.errors import Stopped, StopReason
from utils.events import Progress, Stage
from utils.logger import get_logger
from utils.threads import Every

log = get_logger(__name__)

_NO_ENDING_FOLLOWS = (StopReason.SHUTDOWN, StopReason.LEASE_LOST)


class ProgressReporter:
    """Sends the newest state of one job in a separate thread, until `close`.

    Older states are dropped, not queued.

    Args:
        kind: The kind of the job.
        job: The job.
        webhooks: Sends the reports.
        next_sequence: Gives each report its number.
        stop: Requested if the backend answers that the job is cancelled or paused.
        interval_seconds: Time between two reports.
        samples: Returns the keys of the newest samples in the state bucket.
    """

    def __init__(
        self,
        kind: JobKind,
        job: Job,
        webhooks: WebhookService,
        *,
        next_sequence: Callable[[], int],
        stop: StopSignal,
        interval_seconds: float,
        samples: Callable[[], tuple[str, ...]] = lambda: (),
    ) -> None:
        self._kind = kind
        self._job = job
        self._webhooks = webhooks
        self._origin = webhooks.origin_for(job.webhook_url)
        self._next_sequence = next_sequence
        self._stop = stop
        self._samples = samples
        self._latest = beginning(kind, job)
        self._every = Every(interval_seconds, self._report, name="progress", at_once=False)

    def __enter__(self) -> Self:
        self._every.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # If no ending follows, do not wait for a backend that hangs: a shutdown has only seconds
        # to return the job.
        self.close(wait=not (isinstance(error, Stopped) and error.reason in _NO_ENDING_FOLLOWS))

    def close(self, *, wait: bool = True) -> None:
        """Begin no further report.

        Args:
            wait: Wait for the report that is being sent, so that it cannot arrive after an ending.
        """
        self._every.stop(join_seconds=None if wait else 0)

    def saw(self, progress: Progress) -> None:
        """Take the newest state.

        The start of training is sent at once, any other at the next interval.
        """
        starts = progress.stage is Stage.TRAINING and self._latest.stage is not Stage.TRAINING
        # After a restart of training there is no measured rate yet; the previous one is kept.
        rate = progress.per_second or self._latest.per_second
        self._latest = dataclasses.replace(progress, per_second=rate)
        if starts:
            self._every.hurry()

    def _report(self) -> None:
        answer = self._webhooks.send_progress(self._origin, self._body())
        # Only if the backend itself answers: a router answers 404 while the backend is deployed.
        if answer is ProgressAnswer.CANCEL:
            log.info("job_cancelled_by_backend", answer=answer.name)
            self._stop.request(StopReason.CANCELLED)
        elif answer is ProgressAnswer.PAUSE:
            log.info("job_paused_by_backend")
            self._stop.request(StopReason.PAUSED)

    def _body(self) -> dict[str, Any]:
        report = self._kind.progress(self._latest)
        if samples := self._samples():
            report |= {"samples": list(samples)}
        return _report(self._kind, self._job, report, self._next_sequence())


def queued(
    kind: JobKind, job: Job, latest: Progress | None, place: int, seconds: float, *, sequence: int
) -> dict[str, Any]:
    """The report of a job that waits for another attempt.

    Args:
        kind: The kind of the job.
        job: The job.
        latest: Its newest progress; None if nothing was trained.
        place: Its place in the queue, counted from 1.
        seconds: Expected seconds until a worker takes it.
        sequence: Number of this report among the job's reports.
    """
    latest = latest or beginning(kind, job)
    waiting = {
        "stage": str(Stage.QUEUED),
        "estimated_seconds": round(seconds),
        "queue_position": place,
    }
    return _report(kind, job, kind.progress(latest) | waiting, sequence)


def paused(kind: JobKind, job: Job, latest: Progress | None, *, sequence: int) -> dict[str, Any]:
    """The report of a job that is paused; the arguments are those of `queued`."""
    state = {"stage": str(Stage.PAUSED), "estimated_seconds": 0}
    return _report(kind, job, kind.progress(latest or beginning(kind, job)) | state, sequence)


def beginning(kind: JobKind, job: Job) -> Progress:
    """The state of a job that has done nothing yet."""
    return Progress(job.task_id, Stage.PREPARING, 0, 0, facts=kind.beginning(job.spec))


def _report(kind: JobKind, job: Job, progress: dict[str, Any], sequence: int) -> dict[str, Any]:
    return {
        **kind.identity_fields(job.subject),
        "progress": progress,
        "task_id": job.task_id,
        "sequence": sequence,
    }
