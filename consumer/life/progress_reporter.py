"""Progress webhooks by the clock: at once when training starts, then every
`PROGRESS_INTERVAL_SECONDS`."""

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
    """Sends the newest state of one job, in a thread of its own; never queues an older one, never
    outlives `close`.

    Args:
        kind: The kind of the job.
        job: The job.
        webhooks: Who sends.
        next_sequence: Gives each report its number.
        stop: Is asked to cancel or to pause when the backend says so.
        interval_seconds: Time between two reports.
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
    ) -> None:
        self._kind = kind
        self._job = job
        self._webhooks = webhooks
        self._origin = webhooks.origin_for(job.webhook_url)
        self._next_sequence = next_sequence
        self._stop = stop
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
        # Where no ending follows, nothing has to wait for a backend that hangs: a shutdown has
        # seconds to give the job back.
        self.close(wait=not (isinstance(error, Stopped) and error.reason in _NO_ENDING_FOLLOWS))

    def close(self, *, wait: bool = True) -> None:
        """No report is begun after this.

        Args:
            wait: For the report in hand, so that it cannot arrive after an ending.
        """
        self._every.stop(join_seconds=None if wait else 0)

    def saw(self, progress: Progress) -> None:
        """Take the newest state. The start of training is reported at once, everything else by the
        clock."""
        starts = progress.stage is Stage.TRAINING and self._latest.stage is not Stage.TRAINING
        # Training that starts over is not measured yet; the rate before that is the best there is.
        rate = progress.per_second or self._latest.per_second
        self._latest = dataclasses.replace(progress, per_second=rate)
        if starts:
            self._every.hurry()

    def _report(self) -> None:
        answer = self._webhooks.send_progress(self._origin, self._body())
        # Only on the backend's own word: a router answers 404 while the backend is deployed.
        if answer is ProgressAnswer.CANCEL:
            log.info("job_cancelled_by_backend", answer=answer.name)
            self._stop.request(StopReason.CANCELLED)
        elif answer is ProgressAnswer.PAUSE:
            log.info("job_paused_by_backend")
            self._stop.request(StopReason.PAUSED)

    def _body(self) -> dict[str, Any]:
        report = self._kind.progress(self._latest)
        return _report(self._kind, self._job, report, self._next_sequence())


def queued(
    kind: JobKind, job: Job, latest: Progress | None, place: int, seconds: float, *, sequence: int
) -> dict[str, Any]:
    """The report of a job that waits for another attempt.

    Args:
        kind: The kind of the job.
        job: The job.
        latest: How far it was; None where nothing was trained.
        place: In the queue, counted from 1.
        seconds: Until it is expected to be taken.
        sequence: Its number among the job's news.
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
