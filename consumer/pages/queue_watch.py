"""The lengths and waiting times of the queues, as far as a worker can know them.

A worker can ask for a queue's length, and it sees a message only on delivery. Two bounds follow.
A message that waits now came after the queue was last seen empty. Since a queue is first in, first
out, the message was also made after the one that was delivered last. So the oldest message has
waited no longer than the smaller of the two times.
"""

from __future__ import annotations

import datetime
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

from services.broker.settlement import Queue
from utils.metrics import Metrics

_KNOWN_JOBS = 20
_LONGEST_BELIEVED = 30 * 86400.0  # the time comes from the message


class QueueWatch:
    """The state of the queues. Safe to share between threads.

    Args:
        metrics: Show the state.
        clock: A monotonic clock in seconds.
    """

    def __init__(self, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.Lock()
        self._lengths: dict[Queue, int] = {}
        self._consumers = 0
        self._empty_at: float | None = None
        self._newest_made_at: float | None = None
        self._durations: deque[float] = deque(maxlen=_KNOWN_JOBS)

    def looked(self, queue: Queue, messages: int, consumers: int) -> None:
        """The broker reported the ready messages and the consumers of a queue."""
        self._metrics.queue_messages.labels(queue).set(messages)
        self._metrics.queue_consumers.labels(queue).set(consumers)
        with self._lock:
            self._lengths[queue] = messages
            if queue is Queue.TRAINING:
                self._consumers = consumers
                if not messages:
                    self._empty_at = self._clock()
        self._show_age()

    def lost_sight(self) -> None:
        """The connection is closed, so the known lengths are out of date."""
        with self._lock:
            self._lengths.clear()
            self._consumers = 0
            self._empty_at = None
        self._metrics.queue_messages.clear()
        self._metrics.queue_consumers.clear()
        self._show_age()

    def took(self, created_at: str | None) -> None:
        """A training message was delivered for the first time.

        Args:
            created_at: The creation time in the message.
        """
        age = age_of(created_at)
        if age is None:
            return
        self._metrics.job_wait_seconds.observe(age)
        with self._lock:
            self._newest_made_at = self._clock() - age
        self._show_age()

    def finished(self, seconds: float) -> None:
        """A job took this many seconds from the claim to the model."""
        with self._lock:
            self._durations.append(seconds)

    @property
    def length(self) -> int | None:
        """Training messages that wait; None while the number is unknown."""
        return self._lengths.get(Queue.TRAINING)

    def may_hold_messages(self) -> bool:
        """Whether training messages may wait; true while their number is unknown."""
        return self.length != 0

    @property
    def oldest_seconds(self) -> float | None:
        """The longest possible wait of the oldest training message; None while it is unknown."""
        with self._lock:
            length = self._lengths.get(Queue.TRAINING)
            since = [at for at in (self._empty_at, self._newest_made_at) if at is not None]
            if length == 0:
                return 0.0
            if length is None or not since:
                return None
            return self._clock() - max(since)

    def place_at_the_end(self, delay_seconds: float) -> tuple[int, float] | None:
        """The place of a message that joins the queue after a delay, and when its turn comes.

        Returns:
            Its place, counted from 1, and the seconds until a worker takes it, by the mean of the
            jobs that this worker has finished; None while either is unknown.
        """
        with self._lock:
            length = self._lengths.get(Queue.TRAINING)
            if length is None or not self._durations:
                return None
            rounds = length / max(1, self._consumers)
            return length + 1, delay_seconds + rounds * statistics.fmean(self._durations)

    def _show_age(self) -> None:
        age = self.oldest_seconds
        self._metrics.queue_oldest_message_age_seconds.set(float("nan") if age is None else age)


def age_of(created_at: str | None) -> float | None:
    """Seconds since the time in a message (ISO 8601, UTC by default).

    None if the time is missing or cannot be true.
    """
    if created_at is None:
        return None
    try:
        made = datetime.datetime.fromisoformat(created_at)
    except ValueError:
        return None
    if made.tzinfo is None:
        made = made.replace(tzinfo=datetime.UTC)
    age = (datetime.datetime.now(datetime.UTC) - made).total_seconds()
    # A backend's clock may be a little fast.
    return max(0.0, age) if -60.0 < age < _LONGEST_BELIEVED else None
