"""The lengths and waiting times of the queues, as far as a worker can know them.

A worker can ask for a queue's length, and it sees a message only on delivery. Two bounds follow.
A message that waits now came after the queue was last seen empty. Since a queue is first in, first
out, the message was also made after the one that was delivered last. So the oldest message has
waited no longer than the smaller of the two times.
"""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable

from services.broker.settlement import Queue
from utils.metrics import Metrics

_KNOWN_JOBS = 20
_LONGEST_BELIEVED = 30 * 86400.0  # seconds; the creation time comes from the message


@dataclasses.dataclass
class _Seen:
    """The known facts about a training queue; each is None until it is known."""

    length: int | None = None
    consumers: int = 0
    empty_at: float | None = None
    newest_made_at: float | None = None

    def oldest_seconds(self, now: float) -> float | None:
        """The oldest message has waited at most this long."""
        since = [at for at in (self.empty_at, self.newest_made_at) if at is not None]
        if self.length == 0:
            return 0.0
        return None if self.length is None or not since else now - max(since)


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
        self._seen: defaultdict[Queue, _Seen] = defaultdict(_Seen)
        self._durations: deque[float] = deque(maxlen=_KNOWN_JOBS)

    def looked(self, queue: Queue, messages: int, consumers: int) -> None:
        """The broker reported the ready messages and the consumers of a queue."""
        self._metrics.queue_messages.labels(str(queue)).set(messages)
        self._metrics.queue_consumers.labels(str(queue)).set(consumers)
        if queue.is_training:
            with self._lock:
                seen = self._seen[queue]
                seen.length, seen.consumers = messages, consumers
                if not messages:
                    seen.empty_at = self._clock()
        self._show_age()

    def lost_sight(self) -> None:
        """The connection is closed, so the known lengths are out of date."""
        with self._lock:
            for seen in self._seen.values():
                seen.length, seen.consumers, seen.empty_at = None, 0, None
        self._metrics.queue_messages.clear()
        self._metrics.queue_consumers.clear()
        self._show_age()

    def took(self, created_at: str | None, queue: Queue = Queue.TRAINING) -> None:
        """A training message was delivered for the first time.

        Args:
            created_at: The creation time in the message.
            queue: The queue that it came from.
        """
        age = age_of(created_at)
        if age is None:
            return
        self._metrics.job_wait_seconds.observe(age)
        with self._lock:
            self._seen[queue].newest_made_at = self._clock() - age
        self._show_age()

    def finished(self, seconds: float) -> None:
        """A job took this many seconds from the claim to the model."""
        with self._lock:
            self._durations.append(seconds)

    @property
    def length(self) -> int | None:
        """Training messages that wait, over all queues; None while the number is unknown."""
        with self._lock:
            lengths = [seen.length for seen in self._seen.values() if seen.length is not None]
        return sum(lengths) if lengths else None

    def may_hold_messages(self, queue: Queue = Queue.TRAINING) -> bool:
        """Whether training messages may wait in a queue; true while its length is unknown."""
        with self._lock:
            return queue not in self._seen or self._seen[queue].length != 0

    @property
    def oldest_seconds(self) -> float | None:
        """The longest possible wait of the oldest training message; None while it is unknown."""
        with self._lock:
            now = self._clock()
            ages = [seen.oldest_seconds(now) for seen in self._seen.values()]
        return max((age for age in ages if age is not None), default=None)

    def place_at_the_end(
        self, delay_seconds: float, queue: Queue = Queue.TRAINING
    ) -> tuple[int, float] | None:
        """The place of a message that joins a queue after a delay, and when its turn comes.

        Workers take turns between their queues, so the messages before it are those of the same
        queue and at most as many of each other one.

        Returns:
            Its place in its queue, counted from 1, and the seconds until a worker takes it, by the
            mean of the jobs that this worker has finished; None while either is unknown.
        """
        with self._lock:
            length = self._seen[queue].length if queue in self._seen else None
            if length is None or not self._durations:
                return None
            before = sum(min(seen.length or 0, length) for seen in self._seen.values())
            consumers = sum(seen.consumers for seen in self._seen.values())
            rounds = before / max(1, consumers)
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
