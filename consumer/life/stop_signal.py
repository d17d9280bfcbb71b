"""Cooperative stopping: a request to stop a job, with its reason.

The job obeys at its next step.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from utils.errors import Cancelled, LeaseLost, Stopped, StopReason, TimeLimit, TrainingServerError

# A lost lease comes first: the worker that lost it may not write any more, not even that the job
# was cancelled. A cancelled job has an ending, so it comes before a pause and a shutdown, which
# have none. A paused job must not return to the queue, so a pause comes before a shutdown.
_WEIGHT = {
    StopReason.SHUTDOWN: 1,
    StopReason.PAUSED: 2,
    StopReason.TIME_LIMIT: 3,
    StopReason.CANCELLED: 4,
    StopReason.LEASE_LOST: 5,
}


class StopSignal:
    """A request to stop one job.

    Any thread may make it, also repeatedly; the strongest reason counts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: StopReason | None = None
        self._requested = threading.Event()
        self._listeners: list[Callable[[StopReason], None]] = []

    @property
    def reason(self) -> StopReason | None:
        """The reason to stop the job; None without a request."""
        return self._reason

    def request(self, reason: StopReason) -> None:
        """Ask the job to stop."""
        with self._lock:
            if self._reason and _WEIGHT[self._reason] >= _WEIGHT[reason]:
                return
            self._reason = reason
            listeners = tuple(self._listeners)
        self._requested.set()
        for listener in listeners:
            listener(reason)

    def subscribe(self, listener: Callable[[StopReason], None]) -> None:
        """Call `listener` at each request, at once if there has been one."""
        with self._lock:
            self._listeners.append(listener)
            reason = self._reason
        if reason:
            listener(reason)

    def wait(self, seconds: float) -> bool:
        """Sleep until a stop is requested, or the time is over.

        Returns whether one was requested.
        """
        return self._requested.wait(seconds)

    def error(self) -> TrainingServerError | None:
        """The request as an error to raise; None while there is none."""
        match self._reason:
            case None:
                return None
            case StopReason.CANCELLED:
                return Cancelled()
            case StopReason.TIME_LIMIT:
                return TimeLimit()
            case StopReason.LEASE_LOST:
                return LeaseLost()
            case reason:
                return Stopped(reason)

    def check(self) -> None:
        """Raise the request, if there is one.

        Raises:
            Cancelled: The job was cancelled.
            TimeLimit: The job took too long.
            LeaseLost: Another worker holds the job.
            Stopped: The worker shuts down, or the job was paused.
        """
        if error := self.error():
            raise error


class Shutdown:
    """A request to stop the whole worker, by SIGTERM or Ctrl-C. It stops the current job, too.

    Args:
        grace_seconds: Time between SIGTERM and SIGKILL (`SHUTDOWN_GRACE_SECONDS`).
    """

    # Seconds reserved at the end for releasing the lease and returning the message.
    RESERVE_SECONDS = 1.5

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._requested_at: float | None = None
        self._lock = threading.Lock()
        self._jobs: list[StopSignal] = []
        self.event = threading.Event()

    def request(self) -> None:
        """Take no further job, and stop the current one at its next step."""
        with self._lock:
            self._requested_at = self._requested_at or time.monotonic()
            self.event.set()
            jobs = tuple(self._jobs)
        for job in jobs:
            job.request(StopReason.SHUTDOWN)

    @contextlib.contextmanager
    def covering(self, stop: StopSignal) -> Iterator[None]:
        """While the block runs, a shutdown asks this job to stop."""
        with self._lock:
            self._jobs.append(stop)
        if self.event.is_set():
            stop.request(StopReason.SHUTDOWN)
        try:
            yield
        finally:
            with self._lock:
                self._jobs.remove(stop)

    def seconds_for_saving(self) -> float:
        """Seconds that the last checkpoint's upload may still take.

        They are unlimited without a shutdown.
        """
        if self._requested_at is None:
            return float("inf")
        end = self._requested_at + self._grace_seconds - self.RESERVE_SECONDS
        return max(0.0, end - time.monotonic())
