"""The places of waiting jobs in the queue, and when they are expected to start.

Many requests show places, and each change of the queue changes all of them. So the places are
computed at most a few times per second and process; a job that is not among them is looked up at
once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

from sqlalchemy.orm import Session

from api.store import jobs as store
from api.store.database import now
from api.views import QueueTurn

FRESH_SECONDS = 0.25
RATE_SECONDS = 10.0


class WaitingLine:
    """The queue as one process sees it.

    Args:
        depth: Jobs that are with the workers at once.
    """

    def __init__(self, depth: int) -> None:
        self._at_once = max(1, depth - 1)
        self._lock = threading.Lock()
        self._turns: dict[str, QueueTurn] = {}
        self._until = 0.0
        self._rates: dict[str, tuple[float, float | None]] = {}

    def turns(self, session: Session, needed: Collection[str]) -> dict[str, QueueTurn]:
        """The places of all waiting jobs.

        Args:
            session: Reads the queue.
            needed: Ids of jobs that wait.
        """
        with self._lock:
            turns, until = self._turns, self._until
        if time.monotonic() < until and all(each in turns for each in needed):
            return turns
        turns = self._computed(session)
        with self._lock:
            self._turns, self._until = turns, time.monotonic() + FRESH_SECONDS
        return turns

    def _computed(self, session: Session) -> dict[str, QueueTurn]:
        turns: dict[str, QueueTurn] = {}
        at, seconds, known = now(), 0.0, True
        for position, each in enumerate(store.waiting(session), 1):
            rate = self._rate(session, each.kind)
            known = known and rate is not None
            turns[each.job_id] = QueueTurn(position, at + seconds if known else None)
            seconds += (rate or 0.0) / self._at_once
        return turns

    def _rate(self, session: Session, kind: str) -> float | None:
        """How long a job of a kind takes on average, measured every few seconds."""
        until, rate = self._rates.get(kind, (0.0, None))
        if time.monotonic() >= until:
            rate = store.mean_seconds(session, kind)
            self._rates[kind] = (time.monotonic() + RATE_SECONDS, rate)
        return rate
