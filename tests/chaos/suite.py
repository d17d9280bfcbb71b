"""A whole run: start, break things, let everything settle, judge.

    schedule ──▶ injector ──▶ proxies (broker, S3, backend), signals, crash points
                                 │
    jobs ──▶ RabbitMQ node ──▶ 3 workers: `main.worker`, each with its trainer process
                                 │                                 │
    verdict ◀── backend's requests, records and objects on S3, queues, logs, journal

What is where: `schedule` draws every fault from the seed before anything starts; `injector` carries
them out (`tcp_proxy` and `windows` break connections and answers, `fleet` kills and starts
workers);
`worker` is the product's worker with `instruments` around it, which die at named `crash_points` and
keep a `journal` of claims and epochs; `stand_in_trainer` trains by sleeping; `verdict` counts and
holds the invariants; `safeguards` takes one away, to see that the suite notices.

The faults, their order and their targets are the seed's, and so is each job. Not the seed's is
where in its work a worker is when a fault hits it, nor how many jobs it takes to keep all of them
busy: the processes run free, and so the same seed may end differently. A broken invariant therefore
prints what happened and leaves every log in the folder.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from pathlib import Path

from sandbox.photographs import photographs
from sandbox.stand_in_model import build_stand_in
from tests.chaos import journal
from tests.chaos.crash_points import POINTS
from tests.chaos.fleet import Fleet, Slot, wait_for
from tests.chaos.injector import Injector, TimeLine
from tests.chaos.jobs import Jobs, journal_of
from tests.chaos.journal import Journal
from tests.chaos.safeguards import Safeguard
from tests.chaos.schedule import Fault, Kind, schedule
from tests.chaos.timing import DEAD_QUEUE, MEDIA
from tests.chaos.verdict import Evidence, Verdict
from tests.chaos.world import World

STOP_SECONDS = 8.0
REAL_PACE = 6.0
"""With the real trainer, which takes seconds to import torch: faults are to find it at work."""
MORE_FILES, MORE_THREADS, MORE_MEMORY_KIB = 16, 4, 40_000
"""What a worker may have gained over a run: its pools of connections are no leak."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for.

    Attributes:
        folder: Logs, journal and time line go here.
        lease: `LEASE_TTL_SECONDS`.
        epoch_seconds: How long the stand-in takes for one.
        settle_seconds: How long everything may take to settle once nothing goes wrong any more.
        kinds, points: The faults and the crash points to choose from.
        without: The safeguard that the workers lack.
    """

    seed: int
    faults: int
    folder: Path
    queue_type: str = "classic"
    workers: int = 3
    real_trainer: bool = False
    lease: float = 3.0
    epoch_seconds: float = 0.25
    settle_seconds: float = 150.0
    kinds: tuple[Kind, ...] = tuple(Kind)
    points: tuple[str, ...] = POINTS
    without: Safeguard | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        faults: Those that were carried out.
    """

    plan: Plan
    verdict: Verdict
    line: TimeLine
    seconds: float
    settled_after: float
    faults: list[Fault]


def run(plan: Plan) -> Outcome:
    """Carry the plan out."""
    began = time.monotonic()
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.folder.mkdir(parents=True)
    line = TimeLine(plan.folder / "timeline.txt")
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # its connections break on purpose
    line.note(f"seed {plan.seed}, {plan.faults} faults, {plan.queue_type} queue")
    with World.running(
        plan.folder, workers=plan.workers, queue_type=plan.queue_type, lease=plan.lease
    ) as world:
        jobs = _jobs(plan, world)
        more = _base_model(plan)
        slots = [
            Slot(number, plan.folder, world.settings(number) | more, _arguments(plan))
            for number in range(plan.workers)
        ]
        broken: list[str] = []
        with Fleet(slots) as fleet:
            baseline = _warm_up(fleet, world, jobs)
            line.note(f"workers are warm: {baseline}")
            injector = Injector(world, fleet, jobs, line)
            faults = _break_things(plan, injector, jobs)
            line.note("faults have ceased")
            settled_after = _settle(world, jobs, plan.settle_seconds)
            line.note(f"settled after {settled_after:.1f} s")
            broken += _queues(world, quiet=plan.lease + 2.0)  # longer than any delay
            broken += _vitals(fleet, baseline)
            broken += _stop(fleet)
        broken += _queues(world)
        evidence = Evidence(
            world=world,
            folder=plan.folder,
            jobs=jobs.published,
            notes=journal.read(journal_of(plan.folder)),
            dead=injector.dead,
            exact=not plan.real_trainer,
        )
        verdict = Verdict(evidence)
        verdict.reach()
        verdict.broken[:0] = broken
    line.note("judged")
    (plan.folder / "broken.txt").write_text("\n".join(verdict.broken), encoding="utf-8")
    return Outcome(plan, verdict, line, time.monotonic() - began, settled_after, faults)


def _break_things(plan: Plan, injector: Injector, jobs: Jobs) -> list[Fault]:
    """So many faults, with work for every worker all the time. Those that were carried out."""
    faults: list[Fault] = []
    for fault in schedule(
        plan.seed,
        2 * plan.faults,  # some find nothing to break
        workers=plan.workers,
        lease=plan.lease,
        kinds=plan.kinds,
        points=plan.points,
        pace=REAL_PACE if plan.real_trainer else 1.0,
    ):
        if len(faults) == plan.faults:
            break
        while jobs.unended() < plan.workers:
            jobs.publish()
        if injector.inject(fault):
            faults.append(fault)
    injector.cease()
    return faults


def _arguments(plan: Plan) -> tuple[str, ...]:
    return (
        *("--epoch-seconds", str(plan.epoch_seconds)),
        *(("--real-trainer",) if plan.real_trainer else ()),
        *(("--without", plan.without) if plan.without else ()),
    )


def _jobs(plan: Plan, world: World) -> Jobs:
    suites_own = Journal(journal_of(plan.folder), "suite")
    if not plan.real_trainer:
        return Jobs(world, suites_own, epochs=(10, 30))
    addresses = []
    for photograph in photographs()[:3]:
        key = f"training/{photograph.name}"
        world.s3.put_object(Bucket=MEDIA, Key=key, Body=photograph.content)
        addresses.append(f"s3://{MEDIA}/{key}")
    return Jobs(world, suites_own, epochs=(6, 12), pictures=addresses)


def _base_model(plan: Plan) -> dict[str, str]:
    if not plan.real_trainer:
        return {}
    return {"BASE_MODEL": str(build_stand_in(plan.folder / "base-model"))}


def _warm_up(fleet: Fleet, world: World, jobs: Jobs) -> dict[str, int]:
    """One job for each worker, and a few more for those that were slow to start."""
    for _ in fleet.slots:
        jobs.publish()
    if _settle(world, jobs, 90.0) == float("inf"):
        raise RuntimeError("the first jobs did not end, before anything was broken")
    return fleet.slots[0].vitals()


def _settle(world: World, jobs: Jobs, seconds: float) -> float:
    """How long it took until every ending was delivered, and cleared up after; infinity for too
    long."""
    began = time.monotonic()

    def settled() -> bool:
        heard = {each.task_id for each in world.backend.endings() if each.accepted}
        if not {job.task_id for job in jobs.published} <= heard:
            return False
        records = world.records().values()
        if not all(record["delivery"] in ("delivered", "set_aside") for record in records):
            return False
        return {record["task_id"] for record in records} == world.settled()

    return time.monotonic() - began if wait_for(settled, seconds, every=0.5) else float("inf")


def _queues(world: World, *, quiet: float = 0.0) -> list[str]:
    """All queues but the dead one get empty, and stay so: a worker may have had a copy in hand."""
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


def _vitals(fleet: Fleet, baseline: dict[str, int]) -> list[str]:
    """The worker that was never killed has what it had; a single one is killed like any."""
    slot = fleet.slots[0]
    if len(fleet.slots) == 1:
        return []
    if slot.starts > 1:
        return [f"worker 0 was started {slot.starts} times, though nothing killed it"]
    now = slot.vitals()
    allowed = {"files": MORE_FILES, "threads": MORE_THREADS, "memory": MORE_MEMORY_KIB}
    return [
        f"worker 0 has {now[name]} {name}, {baseline[name]} before"
        for name, more in allowed.items()
        if now[name] > baseline[name] + more
    ]


def _stop(fleet: Fleet) -> list[str]:
    broken = [
        f"{who} ended with {code}, wanted 0"
        for who, code in fleet.stop(STOP_SECONDS).items()
        if code
    ]
    for slot in fleet.slots:
        broken += [
            f"{each.who} ended with {each.code}, wanted {each.wanted or 'no end'}"
            for each in slot.exits
            if each.code not in each.wanted
        ]
    return broken
