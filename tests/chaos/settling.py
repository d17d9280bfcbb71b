"""Waits until nothing is left to do, without the sweep for as long as possible."""

from __future__ import annotations

import dataclasses
import math
import time

from tests.chaos import journal
from tests.chaos.conductor import Conductor
from tests.chaos.jobs import Jobs, is_settled, journal_of
from tests.chaos.reference import expected
from tests.chaos.time_line import TimeLine
from tests.chaos.timing import DEAD_QUEUE
from tests.chaos.with_api.verdict import open_rows
from tests.chaos.world import World

_QUIET_LEASES = 4
"""So long nothing has happened: without help, nothing will."""
_QUIET_LEASES_WITH_SWEEP = 9


@dataclasses.dataclass(frozen=True, slots=True)
class Patience:
    """The time limits.

    Attributes:
        seconds: Time for everything to settle, without the sweep and again with it.
        hasty: The sweep is not enabled: unfinished work is finding enough.
    """

    seconds: float
    hasty: bool = False


def settle(
    world: World,
    jobs: Jobs,
    conductor: Conductor,
    patience: Patience,
    line: TimeLine | None = None,
) -> float:
    """Wait until every job is settled, and cleared up after.

    The sweep may publish only jobs whose queue was deleted. If that does not suffice, the sweep is
    enabled for all; the verdict names the jobs that it saved.

    Returns:
        Seconds until then; infinity after the time limit.
    """
    began = time.monotonic()
    if _wait(world, jobs, conductor, patience.seconds):
        return time.monotonic() - began
    if patience.hasty:
        return math.inf
    if line:
        line.note(f"not settled; the sweep is let loose: {sorted(jobs.unsettled())}")
    world.allow_sweep({"*"})
    if _wait(world, jobs, conductor, patience.seconds):
        return time.monotonic() - began
    return math.inf


def empty_queues(world: World, *, quiet: float = 0.0) -> list[str]:
    """All queues except the dead one get empty and stay so: a worker may still hold a copy."""
    deadline = time.monotonic() + quiet + 15.0
    empty_since = None
    while True:
        waiting = {name: n for name, n in world.waiting().items() if n and name != DEAD_QUEUE}
        now = time.monotonic()
        if not waiting:
            empty_since = empty_since or now
            if now - empty_since >= quiet:
                return []
        elif now > deadline:
            return [f"{count} messages wait in {name}" for name, count in waiting.items()]
        else:
            empty_since = None
        time.sleep(0.5)


def _wait(world: World, jobs: Jobs, conductor: Conductor, seconds: float) -> bool:
    """Whether everything settled in time and before all activity ended."""
    deadline = time.monotonic() + seconds
    seen: object = None
    since = time.monotonic()
    while time.monotonic() < deadline:
        if _is_settled(world, jobs, conductor):
            return True
        now = time.monotonic()
        if (seen_now := _fingerprint(world, jobs)) != seen:
            seen, since = seen_now, now
        swept = jobs.unsettled() & world.sweep_allowed or "*" in world.sweep_allowed
        leases = _QUIET_LEASES_WITH_SWEEP if swept else _QUIET_LEASES
        if now - since > leases * world.lease and not conductor.waits():
            return False
        time.sleep(0.5)
    return False


def _is_settled(world: World, jobs: Jobs, conductor: Conductor) -> bool:
    if conductor.pending():
        return False
    records, cancelled = world.records(), world.never_claimed()
    if world.api and (open_rows(world.api, jobs.published) or world.api.unpublished()):
        return False
    heard = {
        each.task_id for each in world.backend.endings() if each.accepted or each.status == 410
    }
    for job in tuple(jobs.published):
        record = records.get(job.record_id)
        if record is None and job.task_id in cancelled:
            continue
        if record is None or not is_settled(record):
            return False
        if expected(job.destiny)[0].taken and job.task_id not in heard:
            return False
    sound = {name for name, record in records.items() if record["state"] != "damaged"}
    return sound == world.settled()


def _fingerprint(world: World, jobs: Jobs) -> object:
    """A value that changes with each act of a worker."""
    notes = journal.read(journal_of(world.folder))
    records = world.records()
    return (
        len(notes),
        len(world.backend.requests),
        sorted((name, one["hold"]["revision"]) for name, one in records.items()),
        tuple(sorted(world.waiting().items())),
        len(world.settled()),
        len(jobs.published),
        [row.status for row in world.api.rows()] if world.api else None,
    )
