"""`python -m tests.chaos --seed N --faults N`: injects faults, and counts the losses."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos import mutants, mutation_run
from tests.chaos.crash_points import API_POINTS, POINTS, STOP_POINTS
from tests.chaos.reference import Destiny
from tests.chaos.schedule import WITHOUT_API, Kind
from tests.chaos.suite import Outcome, Plan, run
from tests.chaos.timing import LLM, QUEUES, STYLE

_MUTANTS_FOLDER = Path(tempfile.gettempdir()) / "chaos-mutants"
"""Always the same, so that a run that was cut off goes on."""


def main() -> int:
    """Run the suite; 0 where every invariant held, else 1."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the same seed, the same faults")
    parser.add_argument(
        "--faults", type=int, default=60, help="how many; from 50 on each kind must strike"
    )
    parser.add_argument(
        "--with-api", action="store_true", help="order over the API, and break it too"
    )
    parser.add_argument(
        "--kinds", default=STYLE, help=f"of jobs, separated by commas: {STYLE}, {LLM}"
    )
    parser.add_argument("--queue-type", choices=("classic", "quorum"), default="classic")
    parser.add_argument("--workers", type=int, default=3, help="at a time; the last with --once")
    parser.add_argument("--real-trainer", action="store_true", help="train; slow, so few faults")
    parser.add_argument("--only", help="of the faults and named points, those with these words")
    parser.add_argument("--destinies", help="of the jobs' destinies, those with these words")
    parser.add_argument("--jobs", type=int, default=0, help="order so many at least")
    parser.add_argument("--epochs", type=int, nargs=2, default=(10, 30), help="of a job")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="a fault waits until the last one is over"
    )
    parser.add_argument("--one-style", action="store_true", help="all jobs are of one style")
    parser.add_argument("--settle-seconds", type=float, default=150.0, help="wait so long")
    parser.add_argument("--mutant", choices=mutants.NAMES, help="must make it fail")
    parser.add_argument(
        "--mutants", nargs="*", choices=mutants.NAMES, help="see that each is found; none: all"
    )
    parser.add_argument("--folder", type=Path, help="for logs; a new one by default")
    parsed = parser.parse_args()
    if parsed.mutants is not None:
        return mutation_run.run(parsed.folder or _MUTANTS_FOLDER, parsed.mutants)
    plan = _plan(parser, parsed)
    outcome = run(plan)
    console = Console()
    console.print(table(outcome))
    for title, counts in _details(outcome).items():
        told = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
        console.print(f"{title}: {told or 'none'}", highlight=False)
    for sentence in outcome.verdict.broken:
        console.print(f"broken: {sentence}", style="red", markup=False, soft_wrap=True)
    if outcome.verdict.broken:
        end = f"logs: {plan.folder}"
        words = [f"seed {plan.seed}; the time line:", *outcome.line.lines, end]
        console.print(*words, sep="\n", markup=False, highlight=False, soft_wrap=True)
        return 1
    return 0


def _plan(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> Plan:
    kinds, points, stops, api_points = tuple(Kind), POINTS, STOP_POINTS, API_POINTS
    if parsed.only is not None:
        kinds, points, stops, api_points = chosen(parsed.only)
    if not parsed.with_api:
        kinds = tuple(kind for kind in kinds if kind in WITHOUT_API)
    if parsed.only is not None:
        if not kinds and parsed.only != "nothing":
            parser.error(f"--only: nothing is called so; there are {', '.join((*Kind, *POINTS))}")
    destinies = tuple(Destiny)
    if parsed.destinies is not None:
        destinies = tuple(one for one in destinies if _has(one, parsed.destinies))
    return Plan(
        seed=parsed.seed,
        faults=parsed.faults if kinds else 0,
        folder=(parsed.folder or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve(),
        queue_type=parsed.queue_type,
        workers=parsed.workers,
        real_trainer=parsed.real_trainer,
        lease=5.0 if parsed.real_trainer else 3.0,
        kinds=kinds,
        points=points,
        stop_points=stops,
        api_points=api_points,
        with_api=parsed.with_api,
        job_kinds=_job_kinds(parser, parsed.kinds),
        destinies=destinies,
        demand=parsed.faults >= len(kinds) and not parsed.real_trainer,
        mutant=parsed.mutant,
        jobs=parsed.jobs,
        one_style=parsed.one_style,
        one_at_a_time=parsed.one_at_a_time,
        epochs=tuple(parsed.epochs),
        settle_seconds=parsed.settle_seconds,
    )


def _job_kinds(parser: argparse.ArgumentParser, words: str) -> tuple[str, ...]:
    names = tuple(words.split(","))
    if STYLE not in names or not set(names) <= set(QUEUES):
        parser.error(f"--kinds: must be {STYLE}, or {STYLE},{LLM}")
    return names


def chosen(
    words: str,
) -> tuple[tuple[Kind, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The faults and points whose names contain one of these words, separated by commas.

    Points are crash points, stop points, and crash points of the API.

    `killed at WORDS` and `stopped at WORDS` choose the points for only one of the first two, and
    `API killed at WORDS` those of the API.
    """
    kinds: set[Kind] = set()
    points: list[str] = []
    stops: list[str] = []
    of_api: list[str] = []
    for word in words.split(","):
        if word.startswith("API killed at "):
            name = word.removeprefix("API killed at ")
            of_api += [point for point in API_POINTS if name in point]
            continue
        name = word.removeprefix("killed at ").removeprefix("stopped at ")
        found = [point for point in POINTS if name in point]
        if not word.startswith("stopped at "):
            points += found
        if not word.startswith("killed at "):
            stops += [point for point in found if point in STOP_POINTS]
        kinds |= {kind for kind in Kind if word in kind}
    kinds |= {Kind.CRASH_POINT} if points else set()
    kinds |= {Kind.STOP_POINT} if stops else set()
    kinds |= {Kind.API_CRASH_POINT} if of_api else set()
    ordered = tuple(kind for kind in Kind if kind in kinds)
    return (
        *(ordered, tuple(points) or POINTS, tuple(stops) or STOP_POINTS),
        tuple(of_api) or API_POINTS,
    )


def _has(name: str, words: str) -> bool:
    return any(word in name for word in words.split(",") if word)


def table(outcome: Outcome) -> Table:
    """The run in numbers."""
    count, plan, work = outcome.verdict.count, outcome.plan, outcome.verdict.count.work
    shown = Table(title=f"seed {plan.seed}, {plan.faults} faults, {plan.queue_type} queue")
    shown.add_column("")
    shown.add_column("", justify="right")
    waste = work.wasted_epochs / max(1, len(outcome.faults))
    rows = {
        "jobs ordered": count.published,
        "ended": count.ended,
        "lost": count.lost,
        "duplicated": count.duplicated,
        "unexplained": outcome.verdict.unexplained,
        "saved by the sweep alone": count.swept,
        "given up, as may be": count.given_up,
        "recovered (more than one run)": work.recovered,
        "claims": work.claims,
        "epochs trained": work.epochs,
        "epochs wasted": work.wasted_epochs,
        "epochs wasted a fault": f"{waste:.2f}",
        "epochs wasted at once, at most": work.worst_waste,
        "faults": len(outcome.faults),
        "kinds of fault that struck": f"{sum(map(bool, outcome.hits.values()))}"
        f" of {len(plan.kinds)}",
        "seconds until settled": f"{outcome.settled_after:.1f}",
        "seconds in all": f"{outcome.seconds:.0f}",
    }
    for name, value in rows.items():
        shown.add_row(name, str(value))
    return shown


def _details(outcome: Outcome) -> dict[str, Counter[str]]:
    """The faults: kinds, number of hits, places, and destinies of the jobs."""
    return {
        "ordered faults": Counter(str(fault.kind) for fault in outcome.faults),
        "hits": Counter({kind: outcome.hits[kind] for kind in outcome.plan.kinds}),
        "at named points": outcome.verdict.count.crash_points,
        "jobs": outcome.verdict.count.destinies,
    }


if __name__ == "__main__":
    sys.exit(main())
