"""`python -m tests.chaos --seed N --faults N`: breaks everything, and counts what was lost."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.crash_points import POINTS
from tests.chaos.safeguards import Safeguard
from tests.chaos.schedule import Kind
from tests.chaos.suite import Outcome, Plan, run


def main() -> int:
    """Run the suite; 0 where every invariant held, else 1."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the same seed, the same faults")
    parser.add_argument("--faults", type=int, default=40, help="how many")
    parser.add_argument("--queue-type", choices=("classic", "quorum"), default="classic")
    parser.add_argument("--workers", type=int, default=3, help="at a time")
    parser.add_argument("--real-trainer", action="store_true", help="train; slow, so few faults")
    parser.add_argument("--only", help="of the faults and crash points, those with these words")
    parser.add_argument("--without", type=Safeguard, choices=Safeguard, help="must make it fail")
    parser.add_argument("--folder", type=Path, help="for logs; a new one by default")
    parsed = parser.parse_args()
    kinds, points = _chosen(parser, parsed.only) if parsed.only else (tuple(Kind), POINTS)
    plan = Plan(
        seed=parsed.seed,
        faults=parsed.faults,
        folder=(parsed.folder or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve(),
        queue_type=parsed.queue_type,
        workers=parsed.workers,
        real_trainer=parsed.real_trainer,
        lease=5.0 if parsed.real_trainer else 3.0,
        kinds=kinds,
        points=points,
        without=parsed.without,
    )
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


def _chosen(
    parser: argparse.ArgumentParser, words: str
) -> tuple[tuple[Kind, ...], tuple[str, ...]]:
    """The kinds of fault, and the crash points, that have one of these words in their names."""
    kinds = {kind for kind in Kind if any(word in kind for word in words.split(","))}
    points = tuple(point for point in POINTS if any(word in point for word in words.split(",")))
    if points:
        kinds.add(Kind.CRASH_POINT)
    if not kinds:
        parser.error(f"--only: nothing is called so; there are {', '.join((*Kind, *POINTS))}")
    return tuple(kind for kind in Kind if kind in kinds), points or POINTS


def table(outcome: Outcome) -> Table:
    """The run in numbers."""
    count, plan = outcome.verdict.count, outcome.plan
    shown = Table(title=f"seed {plan.seed}, {plan.faults} faults, {plan.queue_type} queue")
    shown.add_column("")
    shown.add_column("", justify="right")
    waste = count.wasted_epochs / max(1, len(outcome.faults))
    rows = {
        "jobs published": count.published,
        "ended": count.ended,
        "lost": count.lost,
        "duplicated": count.duplicated,
        "recovered (more than one run)": count.recovered,
        "claims": count.claims,
        "epochs trained": count.epochs,
        "epochs wasted": count.wasted_epochs,
        "epochs wasted a fault": f"{waste:.2f}",
        "epochs wasted at once, at most": count.worst_waste,
        "faults": len(outcome.faults),
        "seconds until settled": f"{outcome.settled_after:.1f}",
        "seconds in all": f"{outcome.seconds:.0f}",
        "invariants broken": len(outcome.verdict.broken),
    }
    for name, value in rows.items():
        shown.add_row(name, str(value))
    return shown


def _details(outcome: Outcome) -> dict[str, Counter[str]]:
    """What was broken, and where."""
    return {
        "faults": Counter(str(fault.kind) for fault in outcome.faults),
        "killed at": outcome.verdict.count.crash_points,
    }


if __name__ == "__main__":
    sys.exit(main())
