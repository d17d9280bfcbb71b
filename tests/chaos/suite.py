"""A whole run: start, inject faults, wait until everything has settled, judge.

    schedule ──▶ injector ──▶ proxies (broker, S3, backend), signals, named points, disks, clocks
                                 │
    jobs ──▶ RabbitMQ node ──▶ 3 workers: `main.worker`, each with its trainer process
                                 │                                 │
    verdict ◀── backend's requests, records and objects on S3, queues, logs, journal
       ▲
    reference: where everything of each job must be

docs/chaos.md describes the parts, and how to read a finding.

The seed determines the faults, their order and their targets, and each job with its destiny. It
does not determine the point in a worker's work at which a fault hits it, nor the number of jobs
that keeps all workers busy: the processes run freely, so the same seed may end differently.
Therefore a broken invariant prints the time line and leaves every log in the folder.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from sandbox.photographs import photographs
from tests.chaos import journal, old_release
from tests.chaos.breaking import break_things, upgrade
from tests.chaos.conductor import Conductor
from tests.chaos.crash_points import API_POINTS, POINTS, STOP_POINTS
from tests.chaos.fleet import Fleet, Slot, claims_of, wait_for
from tests.chaos.hits import Hits
from tests.chaos.injector import Injector
from tests.chaos.jobs import Jobs, journal_of
from tests.chaos.journal import Journal
from tests.chaos.noted import noted
from tests.chaos.reference import Destiny
from tests.chaos.schedule import WITHOUT_API, Fault, Kind
from tests.chaos.settling import Patience, empty_queues, settle
from tests.chaos.time_line import TimeLine
from tests.chaos.timing import MEDIA, STYLE
from tests.chaos.verdict import Evidence, Verdict
from tests.chaos.watcher import Watcher
from tests.chaos.with_api.play import ApiPlay
from tests.chaos.world import Message, World
from training.style.stand_in_model import build_stand_in

STOP_SECONDS = 8.0
MORE_FILES, MORE_THREADS, MORE_MEMORY_KIB = 16, 4, 40_000
"""What a worker may have gained over a run: its pools of connections are no leak."""
DEAF_SECONDS = 40.0
"""So long a worker may take no job, once nothing goes wrong any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The options of a run.

    Attributes:
        folder: Folder of logs, journal and time line.
        lease: `LEASE_TTL_SECONDS`.
        epoch_seconds: Duration of an epoch of the stand-in.
        settle_seconds: The longest time to settle after the last fault.
        kinds, points, stop_points, api_points: The faults, the crash points, the points at which
            a worker is stopped, and the crash points of the API, to choose from.
        destinies: The destinies of the jobs that must not complete.
        demand: Each of the kinds must strike, and each destiny must be drawn.
        jobs: The least number of jobs.
        epochs: Fewest and most epochs of a job.
        one_style: All jobs are of one style.
        once: Whether the last worker runs with `--once`.
        mutant: The change in the workers or the API (`tests.chaos.mutants`).
        job_kinds: The kinds of jobs.
        with_api: Jobs are ordered over the API, which breaks too.
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
    kinds: tuple[Kind, ...] = WITHOUT_API
    points: tuple[str, ...] = POINTS
    stop_points: tuple[str, ...] = STOP_POINTS
    api_points: tuple[str, ...] = API_POINTS
    destinies: tuple[Destiny, ...] = tuple(Destiny)
    demand: bool = False
    jobs: int = 0
    epochs: tuple[int, int] = (10, 30)
    one_style: bool = False
    once: bool = True
    one_at_a_time: bool = False
    mutant: str | None = None
    with_api: bool = False
    job_kinds: tuple[str, ...] = (STYLE,)

    @property
    def upgrades(self) -> bool:
        """Whether the last release was there first.

        It refuses own queues that are quorum queues, as new workers make them if the
        training queue is one.
        """
        return self.queue_type == "quorum" and self.faults > 0 and Kind.TWO_VERSIONS in self.kinds


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run.

    Attributes:
        faults: Those that were carried out.
        hits: How often each kind struck something.
    """

    plan: Plan
    verdict: Verdict
    line: TimeLine
    seconds: float
    settled_after: float
    faults: list[Fault]
    hits: collections.Counter[str]


def run(plan: Plan) -> Outcome:
    """Carry out the plan."""
    began = time.monotonic()
    shutil.rmtree(plan.folder, ignore_errors=True)
    journal.forget(journal_of(plan.folder))
    plan.folder.mkdir(parents=True)
    line = TimeLine(plan.folder / "timeline.txt")
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # its connections break on purpose
    line.note(f"seed {plan.seed}, {plan.faults} faults, {plan.queue_type} queue")
    old_tree = None
    if Kind.TWO_VERSIONS in plan.kinds:
        old_tree = old_release.unpack(plan.folder / "last-release")
    with _world(plan, hits := Hits()) as world:
        if plan.upgrades:
            world.declare_own_queues()
        jobs = _jobs(plan, world)
        played = _play(plan, world, jobs, line, old_tree)
        if played.settled_after < math.inf:
            played.broken += empty_queues(world)
        verdict = _judge(plan, world, jobs, played.dead)
        for kind, times in noted(plan.folder).items():
            hits.struck(kind, times)
        verdict.broken[:0] = played.broken + _missed(plan, hits, jobs, old_tree)
    line.note("judged")
    (plan.folder / "broken.txt").write_text("\n".join(verdict.broken), encoding="utf-8")
    seconds = time.monotonic() - began
    return Outcome(
        *(plan, verdict, line, seconds, played.settled_after, played.faults, hits.counts())
    )


@dataclasses.dataclass
class _Played:
    """The events while the workers ran.

    Attributes:
        dead: The messages of deleted dead queues.
    """

    faults: list[Fault]
    settled_after: float
    dead: list[Message]
    broken: list[str]


# pylint: disable-next=too-many-locals  # one for each part of the suite
def _play(plan: Plan, world: World, jobs: Jobs, line: TimeLine, old_tree: Path | None) -> _Played:
    with (
        _workers(plan, world) as fleet,
        ApiPlay.of(world, jobs, line, plan.seed) as api,
        Conductor(world, jobs, plan.folder) as conductor,
    ):
        baseline = _warm_up(fleet, world, jobs, conductor)
        line.note(f"workers are warm: {baseline}")
        injector = Injector(world, fleet, jobs, line, old_tree, api.faults if api else None)
        with Watcher(world, jobs) as watcher:
            faults = upgrade(plan, injector, jobs, conductor) if plan.upgrades else []
            faults += break_things(plan, injector, jobs)
            line.note("faults have ceased")
            deaf = [] if plan.real_trainer else _deaf(fleet, jobs, journal_of(plan.folder))
            patience = Patience(plan.settle_seconds, hasty=plan.mutant is not None)
            settled_after = settle(world, jobs, conductor, patience, line)
            line.note(f"settled after {settled_after:.1f} s")
        broken = api.findings(jobs.published) if api else []
        broken += deaf + watcher.broken + _left(plan, world, jobs, settled_after)
        broken += _vitals(fleet, baseline) + _stop(fleet)
        if conductor.errors:
            raise conductor.errors[0]
    return _Played(faults, settled_after, injector.dead, broken)


def _deaf(fleet: Fleet, jobs: Jobs, notes: Path) -> list[str]:
    """Workers that take no job any more, though there is one for each."""
    waiting = {slot.number: claims_of(notes, slot.number) for slot in fleet.slots}

    def all_have_claimed() -> bool:
        for number, before in tuple(waiting.items()):
            if claims_of(notes, number) > before:
                del waiting[number]
        while jobs.unended() < len(fleet.slots):
            jobs.publish(destiny=Destiny.PLAIN)
        return not waiting

    wait_for(all_have_claimed, DEAF_SECONDS, every=0.5)
    return [f"worker {number} takes no job any more" for number in sorted(waiting)]


def _left(plan: Plan, world: World, jobs: Jobs, settled_after: float) -> list[str]:
    """Activity in the queues after everything has settled, or jobs that did not settle."""
    if settled_after < math.inf:
        return empty_queues(world, quiet=plan.lease + 2.0)  # longer than any delay
    return [
        f"{task_id}: not settled, and only the sweep could save it"
        for task_id in sorted(jobs.unsettled())
    ]


def _world(plan: Plan, hits: Hits) -> contextlib.AbstractContextManager[World]:
    return World.running(
        plan.folder,
        workers=plan.workers,
        queue_type=plan.queue_type,
        lease=plan.lease,
        hits=hits,
        kinds=plan.job_kinds,
        api=(("--mutant", plan.mutant) if plan.mutant else ()) if plan.with_api else None,
    )


def _judge(plan: Plan, world: World, jobs: Jobs, dead: list[Message]) -> Verdict:
    verdict = Verdict(
        Evidence(
            world=world,
            folder=plan.folder,
            jobs=jobs.published,
            notes=journal.read(journal_of(plan.folder)),
            dead=dead,
            exact=not plan.real_trainer,
        )
    )
    verdict.reach()
    return verdict


@contextlib.contextmanager
def _workers(plan: Plan, world: World) -> Iterator[Fleet]:
    more = _base_model(plan) | {"WORK_DIR": str(plan.folder / "training-server")}
    slots = [
        Slot(
            number,
            plan.folder,
            world.settings(number) | more,
            _arguments(plan),
            once=plan.once and plan.workers > 1 and number == plan.workers - 1,
        )
        for number in range(plan.workers)
    ]
    with Fleet(slots) as fleet:
        yield fleet


def _missed(plan: Plan, hits: Hits, jobs: Jobs, old_tree: Path | None) -> list[str]:
    """Demanded kinds and destinies that were not tried."""
    broken = []
    if Kind.TWO_VERSIONS in plan.kinds and old_tree is None:
        broken.append(
            f"not tried: {Kind.TWO_VERSIONS}; this copy has no git history with the commit "
            f"{old_release.COMMIT}"
        )
    if plan.demand:
        broken += [f"hits 0: {kind} struck nothing" for kind in plan.kinds if not hits.of(kind)]
        broken += [f"no job was ordered that {destiny}" for destiny in jobs.undrawn()]
    return broken


def _arguments(plan: Plan) -> tuple[str, ...]:
    return (
        *("--epoch-seconds", str(plan.epoch_seconds)),
        *(("--real-trainer",) if plan.real_trainer else ()),
        *(("--mutant", plan.mutant) if plan.mutant else ()),
    )


def _jobs(plan: Plan, world: World) -> Jobs:
    suites_own = Journal(journal_of(plan.folder), "suite")
    dice = random.Random(plan.seed)
    if not plan.real_trainer:
        return Jobs(
            world,
            suites_own,
            epochs=plan.epochs,
            dice=dice,
            destinies=plan.destinies,
            plain_first=plan.workers,
            one_style=plan.one_style,
        )
    addresses = []
    for photograph in photographs()[:3]:
        key = f"training/{photograph.name}"
        world.s3.put_object(Bucket=MEDIA, Key=key, Body=photograph.content)
        addresses.append(f"s3://{MEDIA}/{key}")
    return Jobs(
        world,
        suites_own,
        epochs=(6, 12),
        dice=dice,
        destinies=(Destiny.INVALID,),
        plain_first=plan.workers,
        images=addresses,
    )


def _base_model(plan: Plan) -> dict[str, str]:
    if not plan.real_trainer:
        return {}
    return {"BASE_MODEL": str(build_stand_in(plan.folder / "base-model"))}


def _warm_up(fleet: Fleet, world: World, jobs: Jobs, conductor: Conductor) -> dict[str, int]:
    """One job for each worker, and a few more for those that were slow to start."""
    for _ in fleet.slots:
        jobs.publish()
    if settle(world, jobs, conductor, Patience(90.0)) == math.inf:
        raise RuntimeError("the first jobs did not end, before anything was broken")
    return fleet.slots[0].vitals()


def _vitals(fleet: Fleet, baseline: dict[str, int]) -> list[str]:
    """The worker that was never killed leaks nothing; a single worker is killed like any."""
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
        f"{who} did not end within {STOP_SECONDS:.0f} s"
        for who, code in fleet.stop(STOP_SECONDS).items()
        if code == -signal.SIGKILL
    ]
    for slot in fleet.slots:
        broken += [
            f"{each.who} ended with {each.code}, wanted {each.wanted or 'no end'}; its log says: "
            f"{each.last_error}"
            for each in slot.exits
            if each.code not in each.wanted
        ]
    return broken
