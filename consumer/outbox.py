"""Publications that the broker has not confirmed yet. They outlive every connection."""

from __future__ import annotations

import dataclasses
import queue
import random
import time
from concurrent.futures import Future

from consumer.settlement import Publication

FIRST_DELAY = 0.5  # seconds
LONGEST_DELAY = 30.0


class Backoff:
    """Delays that double, with jitter, so that many workers do not come back in step."""

    def __init__(self, first: float = FIRST_DELAY, longest: float = LONGEST_DELAY) -> None:
        self._first, self._longest = first, longest
        self._tries = 0

    def next(self) -> float:
        """The next delay in seconds: between half of it and all of it."""
        delay = min(self._longest, self._first * 2.0 ** min(self._tries, 30))
        self._tries += 1
        return delay * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Begin again with the first delay."""
        self._tries = 0


@dataclasses.dataclass(slots=True)
class Parcel:
    """One publication on its way.

    Attributes:
        confirmed: Done once the broker has taken the message over; cancelled if it never will.
        due: Not to be tried before this (`time.monotonic`).
    """

    publication: Publication
    confirmed: Future[None] = dataclasses.field(default_factory=Future)
    backoff: Backoff = dataclasses.field(default_factory=Backoff)
    due: float = 0.0


class Outbox:
    """Any thread puts in; the connection's owner takes out."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[Parcel] = queue.SimpleQueue()
        self._waiting: list[Parcel] = []
        self._abandoned = False

    def put(self, publication: Publication) -> Future[None]:
        """Have it published. The future is done when the broker has confirmed it."""
        parcel = Parcel(publication)
        if self._abandoned:
            parcel.confirmed.cancel()
        else:
            self._arrived.put(parcel)
        return parcel.confirmed

    def due(self) -> list[Parcel]:
        """What is to be tried now, oldest first."""
        while not self._arrived.empty():
            self._waiting.append(self._arrived.get())
        now = time.monotonic()
        return [parcel for parcel in self._waiting if parcel.due <= now]

    def confirm(self, parcel: Parcel) -> None:
        """The broker has it."""
        self._waiting.remove(parcel)
        parcel.confirmed.set_result(None)

    def put_off(self, parcel: Parcel) -> float:
        """The broker would not take it: try again later, and let the others pass. Returns the delay
        in seconds.
        """
        delay = parcel.backoff.next()
        parcel.due = time.monotonic() + delay
        return delay

    def is_empty(self) -> bool:
        """Whether everything is confirmed."""
        return not self._waiting and self._arrived.empty()

    def abandon(self) -> None:
        """Nothing more will be published: whoever waits for a confirmation learns it."""
        self._abandoned = True
        self.due()
        for parcel in self._waiting:
            parcel.confirmed.cancel()
        self._waiting.clear()
