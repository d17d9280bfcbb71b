"""Named points at which the suite can kill or stop a worker, or kill its trainer process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

from tests.chaos.journal import Journal

FOLDERS = ("jobs", "checkpoints", "staging", "models")
S3_ACTS = (
    *(f"write {folder}" for folder in FOLDERS),
    "copy",
    *(f"delete {folder}" for folder in ("checkpoints", "staging")),
    *(f"list {folder}" for folder in ("checkpoints", "models")),
)
STOP_POINTS = tuple(f"{moment} {act}" for act in S3_ACTS for moment in ("before", "after"))
"""Points between two requests to S3, at which a worker may be stopped for longer than its lease."""
POINTS = tuple(
    f"{moment} {act}"
    for act in (
        *S3_ACTS,
        "webhook progress",
        "webhook complete",
        "webhook failed",
        "publish",
        "ack",
        "requeue",
    )
    for moment in ("before", "after")
)
API_POINTS = tuple(
    f"{moment} {act}"
    for act in (
        *("outbox row", "answer", "commit", "order to S3", "admission", "publication", "mark"),
        *("news", "steering"),
    )
    for moment in ("before", "after")
)
"""Points in the work of an API process."""


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """Kill or stop at the n-th time that a point is reached.

    Attributes:
        victim: `worker` or `child`.
        act: `kill`, or `stop` (SIGSTOP; the suite continues it).
    """

    point: str
    nth: int
    victim: str = "worker"
    act: str = "kill"

    def give(self, path: Path) -> None:
        """Write the order into the worker's file; it replaces an older one."""
        half = path.with_suffix(".part")
        half.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        os.replace(half, path)


class CrashPoints:
    """In the worker: looks for an order at each point, and obeys.

    Args:
        path: The file of the order.
        journal: Gets an entry before the process dies or stops.

    Attributes:
        child: Process id of the trainer process, once there is one.
    """

    def __init__(self, path: Path, journal: Journal) -> None:
        self.child: int | None = None
        self._path = path
        self._journal = journal
        self._lock = threading.Lock()
        self._order: Order | None = None
        self._reached = 0

    def reached(self, point: str) -> None:
        """Die or stop at this point, if the order names it."""
        try:
            order = Order(**json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return
        with self._lock:
            if order != self._order:
                self._order, self._reached = order, 0
            if order.point != point:
                return
            self._reached += 1
            if self._reached < order.nth:
                return
            self._order = None
            self._path.unlink(missing_ok=True)
        victim = self.child if order.victim == "child" else os.getpid()
        if victim is None:
            return
        self._journal.note("crash_point", point=point, victim=order.victim, act=order.act)
        if order.act == "stop":
            os.kill(victim, signal.SIGSTOP)
            time.sleep(0.05)  # the signal stops every thread, this one perhaps a moment later
            return
        os.kill(victim, signal.SIGKILL)
        if order.victim == "worker":
            time.sleep(60)  # not one more line is executed
