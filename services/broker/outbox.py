"""Publications that the broker has not confirmed yet. They outlive every connection.

A publication that the broker refuses blocks no other. After a few refusals it takes a shorter form:
first a dead letter with the whole body and no headers but the reasons, then one with the first
bytes of the body.
"""

from __future__ import annotations

import dataclasses
import queue
import random
import time
from concurrent.futures import Future

from services.broker.settlement import Publication
from utils.errors import Refusal

FIRST_DELAY = 0.5  # seconds
LONGEST_DELAY = 30.0  # seconds
MAX_STRIKES = 3
"""Refusals of one form of a publication before it takes the next, shorter one."""


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
        form: The form in which the publication is tried now.
        confirmed: Done when the broker has confirmed the message; cancelled if it never will.
        due: It is not tried before this time (`time.monotonic`).
        tries: Refusals so far, for any cause.
        strikes: Refusals of the present form that are the publication's own fault.
        is_suspect: The connection was lost during its publication, perhaps by the broker's fault.
        is_cut: The present form is the shortest.
    """

    form: Publication
    confirmed: Future[None] = dataclasses.field(default_factory=Future)
    backoff: Backoff = dataclasses.field(default_factory=Backoff)
    due: float = 0.0
    tries: int = 0
    strikes: int = 0
    is_suspect: bool = False
    is_cut: bool = False

    @property
    def is_stuck(self) -> bool:
        """Whether no shorter form is left. It is tried all the same."""
        return self.strikes >= MAX_STRIKES

    def strike(self, refusal: Refusal, why: str) -> bool:
        """Count a refusal, and take a shorter form after too many that are the publication's fault.

        Returns:
            Whether it has another form now.
        """
        self.tries += 1
        match refusal:
            case Refusal.FULL | Refusal.UNANSWERED:
                return False  # the broker's state: any other message would fare the same
            case Refusal.LOST if not self.is_suspect:
                self.is_suspect = True  # counted from the next time on, after a probe
                return False
            case _:
                self.strikes += 1
        if self.strikes < MAX_STRIKES:
            return False
        shorter = self._shorter(refusal, why)
        if shorter is None:
            return False
        self.form, self.strikes = shorter, 0
        self.backoff.reset()
        return True

    def _shorter(self, refusal: Refusal, why: str) -> Publication | None:
        if self.is_cut:
            return None
        letter = self.form.given_up(why)
        if letter != self.form:
            return letter
        if refusal is Refusal.ROUTE:
            return None  # a shorter one would have no queue either
        self.is_cut = True
        return letter.cut()


class Outbox:
    """Any thread puts in; the connection's owner takes out."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[Parcel] = queue.SimpleQueue()
        self._waiting: list[Parcel] = []
        self._abandoned = False

    def put(self, publication: Publication) -> Future[None]:
        """Publish it. The future is done when the broker has confirmed it."""
        parcel = Parcel(publication)
        if self._abandoned:
            parcel.confirmed.cancel()
        else:
            self._arrived.put(parcel)
        return parcel.confirmed

    def due(self) -> list[Parcel]:
        """The parcels to try now: the least refused first, then the oldest."""
        while not self._arrived.empty():
            self._waiting.append(self._arrived.get())
        now = time.monotonic()
        found = [parcel for parcel in self._waiting if parcel.due <= now]
        return sorted(found, key=lambda parcel: parcel.tries)

    def confirm(self, parcel: Parcel) -> None:
        """The broker has confirmed the parcel."""
        self._waiting.remove(parcel)
        parcel.confirmed.set_result(None)

    def put_off(self, parcel: Parcel) -> float:
        """Try the parcel again later, after the others.

        Returns:
            The delay in seconds.
        """
        delay = LONGEST_DELAY if parcel.is_stuck else parcel.backoff.next()
        parcel.due = time.monotonic() + delay
        return delay

    def acquit(self) -> None:
        """The connection failed without a publication, so earlier losses were not their fault."""
        for parcel in self._waiting:
            if parcel.is_suspect:
                parcel.strikes = 0

    def is_empty(self) -> bool:
        """Whether everything is confirmed."""
        return not self._waiting and self._arrived.empty()

    def abandon(self) -> None:
        """Publish nothing more, and cancel what waits for a confirmation."""
        self._abandoned = True
        self.due()
        for parcel in self._waiting:
            parcel.confirmed.cancel()
        self._waiting.clear()
