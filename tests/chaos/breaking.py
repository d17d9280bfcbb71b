"""The part of a run in which faults are injected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tests.chaos.conductor import Conductor
from tests.chaos.injector import Injector
from tests.chaos.jobs import Jobs
from tests.chaos.noted import noted
from tests.chaos.process_faults import in_time
from tests.chaos.schedule import Fault, Kind, schedule
from tests.chaos.settling import Patience, empty_queues, settle

if TYPE_CHECKING:
    from tests.chaos.suite import Plan

REAL_PACE = 6.0
"""With the real trainer, which takes seconds to import torch: faults are to find it at work."""
ENCORES = 3
"""How often a kind of fault is tried again that has struck nothing."""


def break_things(plan: Plan, injector: Injector, jobs: Jobs) -> list[Fault]:
    """Inject the given number of faults while every worker has work; returns those carried out.

    If every kind must strike, kinds without a hit are tried again.
    """
    faults: list[Fault] = []
    possible = [kind for kind in plan.kinds if not (plan.upgrades and kind is Kind.TWO_VERSIONS)]

    def inject(drawn: list[Fault], most: int) -> None:
        for fault in drawn:
            if len(faults) >= most:
                break
            if plan.one_at_a_time:
                injector.join()
            while jobs.unended() < plan.workers:
                jobs.publish()
            if injector.inject(fault):
                faults.append(fault)

    # Twice as many, since some find nothing to break.
    inject(_drawn(plan, plan.seed, 2 * plan.faults, possible), plan.faults)
    for encore in range(ENCORES if plan.demand else 0):
        for destiny in jobs.undrawn():
            jobs.publish(destiny=destiny)
        injector.join()
        # Faults that are still active may still strike.
        in_time(lambda: not _missing(plan, injector, possible))
        kinds = _missing(plan, injector, possible)
        inject(_drawn(plan, _seed(plan, encore + 1), len(kinds), kinds), 10**6)
    if plan.demand:
        in_time(lambda: not _missing(plan, injector, possible))
    while len(jobs.published) < plan.jobs:
        jobs.publish()
    injector.cease()
    return faults


def upgrade(plan: Plan, injector: Injector, jobs: Jobs, conductor: Conductor) -> list[Fault]:
    """Run the last release together with the new workers, with the queues that it made.

    Then let the new workers make the queues again. Returns the faults that were carried out.

    Raises:
        RuntimeError: The jobs meanwhile did not end.
    """
    faults: list[Fault] = []
    for encore in range(1 + ENCORES):
        drawn = _drawn(plan, _seed(plan, encore), 1, [Kind.TWO_VERSIONS])
        faults += [fault for fault in drawn if injector.inject(fault)]
        if injector.hits.of(Kind.TWO_VERSIONS):
            break
    world = injector.world
    settled_after = settle(world, jobs, conductor, Patience(plan.settle_seconds))
    if settled_after == math.inf or empty_queues(world, quiet=plan.lease):
        raise RuntimeError("the jobs did not end while the last release was there")
    world.delete_own_queues()
    return faults


def _missing(plan: Plan, injector: Injector, possible: list[Kind]) -> list[Kind]:
    """The kinds that have struck nothing yet."""
    inside = noted(plan.folder)
    return [kind for kind in possible if not injector.hits.of(kind) and not inside[kind]]


def _seed(plan: Plan, encore: int) -> int:
    return plan.seed + 1000 * encore


def _drawn(plan: Plan, seed: int, count: int, kinds: list[Kind]) -> list[Fault]:
    if not kinds:
        return []
    return schedule(
        seed,
        count,
        workers=plan.workers,
        lease=plan.lease,
        kinds=kinds,
        points=plan.points,
        stop_points=plan.stop_points,
        api_points=plan.api_points,
        pace=REAL_PACE if plan.real_trainer else 1.0,
    )
