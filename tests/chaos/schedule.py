"""The faults of a run and their times, drawn from a seed before the start.

So a run can be repeated.
"""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Collection

from tests.chaos.crash_points import API_POINTS, POINTS, STOP_POINTS, Order
from tests.chaos.timing import LONGEST_FREEZE_IN_LEASES


class Kind(enum.StrEnum):
    """The faults, in words for the time line."""

    WORKER_KILLED = "worker killed"
    CHILD_KILLED = "trainer process killed"
    CHILD_HANGS = "trainer process hangs"
    FROZEN = "worker frozen for longer than its lease"
    PREEMPTED = "SIGTERM with 5 s"
    CRASH_POINT = "crash point"
    DISK_FULL = "disk full"
    BROKER_KILLED = "broker killed and started"
    BROKER_RESTARTED = "broker restarted"
    TRAINING_QUEUE_DELETED = "training queue deleted"
    DEAD_QUEUE_DELETED = "dead queue deleted"
    OWN_QUEUE_DELETED = "endings or delay queue deleted"
    PUBLISHED_TWICE = "message published twice"
    BROKER_RESET = "connection to the broker reset"
    BROKER_SILENT = "connection to the broker black-holed"
    BROKER_HALF_OPEN = "connection to the broker half open"
    BROKER_REFUSES = "broker refuses connections"
    S3_500 = "S3 answers 500"
    S3_503 = "S3 answers 503"
    S3_SLOW = "S3 slow"
    S3_SILENT = "S3 black-holed"
    S3_ANSWER_LOST = "S3's answers lost after the write"
    S3_409 = "S3 answers 409"
    S3_RESET = "connections to S3 reset"
    S3_AWAY = "S3 away"
    STOP_POINT = "worker stopped between two S3 requests for longer than its lease"
    DISK_FULL_MID_WRITE = "disk full in mid-write"
    CLOCK_STEP = "clock of a worker steps"
    TWO_VERSIONS = "the last release takes jobs too"
    S3_AWAY_LONG = "S3 away for longer than a lease"
    S3_CUT = "S3's answers cut off in the body"
    S3_FLIPPED = "S3's answers damaged on the way"
    S3_412 = "S3 answers 412 without a reason"
    CHECKPOINT_DAMAGED = "newest checkpoint damaged"
    CHECKPOINT_DELETED = "newest checkpoint deleted"
    BROKER_CONFIRMS_LOST = "publisher confirms lost"
    BROKER_ALARM = "broker short of memory"
    ENDING_401 = "endings answered 401"
    ENDING_403 = "endings answered 403"
    ENDING_404 = "endings answered 404 by a proxy"
    ENDING_429 = "endings answered 429 with a long Retry-After"
    ENDING_SLOW = "endings answered slowly"
    BACKEND_500 = "backend answers 500"
    BACKEND_429 = "backend answers 429"
    BACKEND_HANGS = "backend hangs"
    BACKEND_CUT = "backend's answers cut off"
    BACKEND_REDIRECTS = "backend redirects progress to another host"
    API_KILLED = "API process killed"
    API_FROZEN = "API process frozen"
    API_PREEMPTED = "SIGTERM to an API process"
    API_CRASH_POINT = "API crash point"
    API_BROKER_RESET = "API's connection to the broker reset"
    API_BROKER_SILENT = "API's connection to the broker black-holed"
    API_CONFIRMS_LOST = "API's publisher confirms lost"
    API_S3_AWAY = "S3 away for the API"
    DATABASE_KILLED = "database killed and started"
    DATABASE_RESET = "connections to the database reset"
    DATABASE_SILENT = "connections to the database black-holed"
    DATABASE_SLOW = "database slow"
    DATABASE_RESTORED = "database restored from a backup"
    NEWS_LATE = "webhooks to the API late, twice and out of order"
    NEWS_FORGED = "webhooks to the API forged"
    ORDER_REPEATED = "order repeated with its idempotency key"


OF_API = tuple(
    kind for kind in Kind if kind.name.startswith(("API_", "DATABASE_", "NEWS_", "ORDER_"))
)
"""Faults of the API; they need one."""
WITHOUT_API = tuple(kind for kind in Kind if kind not in OF_API)


_WEIGHTS = {
    Kind.CRASH_POINT: 8,
    Kind.WORKER_KILLED: 3,
    Kind.CHILD_KILLED: 2,
    Kind.FROZEN: 3,
    Kind.PREEMPTED: 3,
    Kind.PUBLISHED_TWICE: 2,
}
"""How often a kind is in the deck; once where nothing is said."""
_OF_API_WEIGHT = 3
"""The same for the faults of the API, which are fewer kinds."""

_WORST = {Kind.BROKER_KILLED, Kind.BROKER_RESTARTED, Kind.BROKER_ALARM, Kind.TWO_VERSIONS}
"""Seconds of starting something, in which little else happens: half as often."""
DEADLY = {
    Kind.WORKER_KILLED,
    Kind.PREEMPTED,
    Kind.CRASH_POINT,
    Kind.DISK_FULL,
    Kind.DISK_FULL_MID_WRITE,
    Kind.CHECKPOINT_DAMAGED,
    Kind.CHECKPOINT_DELETED,
    Kind.TWO_VERSIONS,
}
"""They end the process of their worker."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        number: From 1.
        pause: Seconds after the one before.
        kind: The kind of fault.
        slot: The number of the worker; -1 for all of them.
        seconds: Duration of a longer fault.
        chance: Part of the requests that a fault of requests hits.
        order: The order for crash points.
        detail: A choice within the kind.
        seed: The seed of its random choices.
    """

    number: int
    pause: float
    kind: Kind
    slot: int
    seconds: float
    chance: float
    detail: int
    seed: int
    order: Order | None = None

    def __str__(self) -> str:
        whose = "all workers" if self.slot < 0 else f"worker {self.slot}"
        if self.kind in OF_API:
            whose = f"API process {self.slot}"
        more = ""
        if self.order:
            more = f", {self.order.victim}, {self.order.point}, time {self.order.nth}"
        return f"{self.kind} ({whose}, {self.seconds:.1f} s, {self.chance:.0%}{more})"


# pylint: disable-next=too-many-locals  # one for each property of a fault
def schedule(
    seed: int,
    count: int,
    *,
    workers: int,
    lease: float,
    kinds: Collection[Kind] = WITHOUT_API,
    points: Collection[str] = POINTS,
    stop_points: Collection[str] = STOP_POINTS,
    api_points: Collection[str] = API_POINTS,
    pace: float = 1.0,
) -> list[Fault]:
    """The faults of a run.

    Args:
        seed: The same seed gives the same faults.
        count: Number of faults.
        workers: Number of workers. No fault ends the process of number 0, so that leaks are
            found.
        lease: `LEASE_TTL_SECONDS`.
        kinds: The kinds to choose from.
        points: Crash points to choose from.
        stop_points: Points to choose from at which a worker is stopped.
        api_points: Crash points of the API to choose from.
        pace: Times a second or so from one fault to the next.
    """
    dice = random.Random(seed)
    deck = {
        Kind.CRASH_POINT: _Deck(dice, points),
        Kind.STOP_POINT: _Deck(dice, stop_points),
        Kind.API_CRASH_POINT: _Deck(dice, api_points),
    }
    faults = []
    for number, kind in enumerate(_draw(dice, count, kinds), start=1):
        order = _order(dice, kind, deck[kind].draw()) if kind in deck else None
        seconds = _seconds(dice, kind, lease)
        faults.append(
            Fault(
                number=number,
                pause=dice.uniform(0.3, 2.0) * pace,
                kind=kind,
                slot=_slot(dice, kind, workers),
                seconds=seconds,
                chance=dice.choice((0.3, 0.6, 1.0)),
                detail=dice.randrange(1000),
                seed=dice.randrange(2**32),
                order=order,
            )
        )
    return faults


class _Deck:
    """Draws each of the points before any of them again."""

    def __init__(self, dice: random.Random, points: Collection[str]) -> None:
        self._dice, self._points = dice, sorted(points)
        self._left: list[str] = []

    def draw(self) -> str:
        """The next one."""
        self._left = self._left or self._dice.sample(self._points, len(self._points))
        return self._left.pop()


def _order(dice: random.Random, kind: Kind, point: str) -> Order:
    nth = _nth(dice, point)
    if kind is Kind.STOP_POINT:
        return Order(point, nth, act="stop")
    if kind is Kind.API_CRASH_POINT:
        return Order(point, dice.randint(1, 3))
    # The child dies with its worker, and sometimes without it.
    return Order(point, nth, dice.choice(("worker", "worker", "worker", "child")))


def _nth(dice: random.Random, point: str) -> int:
    often = "jobs" in point or "progress" in point
    many = "checkpoints" in point or "models" in point
    return dice.randint(1, 12 if often else 4 if many else 1)


def _seconds(dice: random.Random, kind: Kind, lease: float) -> float:
    seconds = dice.uniform(0.5, 2.5)
    if kind in (Kind.FROZEN, Kind.STOP_POINT):
        seconds = lease * dice.uniform(1.5, LONGEST_FREEZE_IN_LEASES)
    if kind is Kind.S3_AWAY_LONG:
        seconds = lease * dice.uniform(1.2, 2.0)
    if kind in (Kind.DISK_FULL_MID_WRITE, Kind.CLOCK_STEP):
        seconds = dice.uniform(2.0, 5.0)
    if kind is Kind.BROKER_CONFIRMS_LOST:
        seconds = dice.uniform(4.0, 8.0)  # a worker has to publish a message meanwhile
    if kind in (Kind.BROKER_SILENT, Kind.CHILD_HANGS):
        seconds = dice.uniform(2.0, 7.0)
    return seconds


def _slot(dice: random.Random, kind: Kind, workers: int) -> int:
    if kind in DEADLY:
        return dice.randrange(min(1, workers - 1), workers)
    if kind in OF_API:
        return dice.randrange(2)
    if kind is Kind.BROKER_CONFIRMS_LOST:
        return -1
    if kind.name.startswith(("S3_", "BROKER_")) and dice.random() < 0.3:
        return -1
    return dice.randrange(workers)


def _draw(dice: random.Random, count: int, kinds: Collection[Kind]) -> list[Kind]:
    """Every kind in turn, in a new order each time, those with a weight more often."""
    drawn: list[Kind] = []
    rounds = 0
    while len(drawn) < count:
        deck = [
            kind
            for kind in kinds
            for _ in range(_WEIGHTS.get(kind, _OF_API_WEIGHT if kind in OF_API else 1))
            if not (kind in _WORST and rounds % 2 and len(kinds) > len(_WORST))
        ]
        dice.shuffle(deck)
        drawn += deck
        rounds += 1
    return drawn[:count]
