"""`python -m tools.mutants`: the command line of `scripts/mutants`, and its report."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path

from tools.mutants.mutation import Mutant, mutants_of
from tools.mutants.running import (
    BaselineFails,
    Outcome,
    Results,
    Trees,
    baseline,
    in_parallel,
    run_mutant,
    unit_tests_of,
)

ROOT = Path(__file__).resolve().parents[2]

MODULES = (
    "consumer/pipeline.py",
    "consumer/life/put_offs.py",
    "consumer/life/endings.py",
    "consumer/life/sweeper.py",
    "consumer/publishing/model_publisher.py",
    "consumer/publishing/model_folder.py",
    "consumer/life/checkpoint_uploads.py",
    "services/broker/connection.py",
    "services/broker/client.py",
    "consumer/training_consumer.py",
    "services/broker/outbox.py",
    "services/broker/settlement.py",
    "consumer/pages/queue_watch.py",
    "jobs/record.py",
    "services/records/job_records.py",
    "services/records/job_lease.py",
    "services/records/lease.py",
    "services/records/index.py",
    "services/records/sweep.py",
    "services/records/turns.py",
    "training/runtime/inbox.py",
)
"""The code that runs a job's life and the broker connection."""

EXTRA_TESTS: dict[str, tuple[str, ...]] = {
    "consumer/life/put_offs.py": (
        "tests/unit/consumer/test_endings.py",
        "tests/unit/consumer/test_pipeline.py",
    ),
    "consumer/life/endings.py": ("tests/unit/consumer/test_pipeline.py",),
    "consumer/pages/queue_watch.py": ("tests/unit/consumer/test_observer.py",),
    "services/records/job_lease.py": ("tests/unit/services/test_job_records.py",),
    "services/records/index.py": ("tests/unit/services/test_job_records.py",),
    "services/records/sweep.py": ("tests/unit/consumer/test_sweeper.py",),
    "services/records/turns.py": ("tests/unit/consumer/test_publishing.py",),
    "consumer/publishing/model_folder.py": ("tests/unit/consumer/test_publishing.py",),
    "consumer/publishing/model_publisher.py": ("tests/unit/consumer/test_publishing.py",),
}
"""Tests of a module that neither import it nor are named after it."""

WANTED = 0.9
"""The share of mutants that the unit tests must notice."""


def main(
    arguments: Sequence[str],
    *,
    root: Path = ROOT,
    modules: Sequence[str] = MODULES,
    extra: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Run mutants and report them.

    Returns:
        The exit code. 0: at least nine of ten were noticed; 1: fewer; 2: there is no result.
    """
    options = _options(arguments, modules)
    found = [
        mutant
        for module in options.modules or modules
        for mutant in mutants_of(module, (root / module).read_text(encoding="utf-8"))
    ]
    sample = found
    if 0 < options.sample < len(found):
        sample = sorted(random.Random(options.seed).sample(found, options.sample))
    if options.list:
        for mutant in sample:
            print(_described(mutant))
        return 0
    print(f"{len(sample)} of {len(found)} mutants, seed {options.seed}", flush=True)
    try:
        outcomes = _run(root, sample, options, EXTRA_TESTS if extra is None else extra)
    except BaselineFails as error:
        print(f"scripts/mutants: {error}", file=sys.stderr)
        return 2
    return _report(outcomes)


def _options(arguments: Sequence[str], modules: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/mutants",
        description="Change the core's code in one place at a time and run its unit tests.",
        epilog=f"Modules: {', '.join(modules)}",
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="only these; default: all")
    parser.add_argument("--sample", type=int, default=60, help="how many mutants; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    options = parser.parse_args(arguments)
    if unknown := set(options.modules) - set(modules):
        parser.error(f"not in the list of modules: {', '.join(sorted(unknown))}")
    return options


def _run(
    root: Path,
    sample: Sequence[Mutant],
    options: argparse.Namespace,
    extra: Mapping[str, Sequence[str]],
) -> dict[Mutant, Outcome]:
    kept = root / "build" / "mutants.json"
    if options.fresh:
        kept.unlink(missing_ok=True)
    results = Results(kept, root)
    tests = {path: unit_tests_of(root, path, extra) for path in {mutant.path for mutant in sample}}
    keys = {mutant: results.key(mutant, tests[mutant.path]) for mutant in sample}
    outcomes = {mutant: outcome for mutant in sample if (outcome := results.get(keys[mutant]))}
    if outcomes:
        print(f"{len(outcomes)} are known from an earlier run", flush=True)
    left = {mutant: tests[mutant.path] for mutant in sample if mutant not in outcomes}
    for mutant, outcome in _outcomes(Trees(root, options.jobs), left, options.jobs):
        outcomes[mutant] = outcome
        results.put(keys[mutant], outcome)
        count = f"[{len(outcomes)}/{len(sample)}]"
        print(f"{count} {outcome}: {_described(mutant)}", flush=True)
    return outcomes


def _outcomes(
    trees: Trees, left: Mapping[Mutant, tuple[str, ...]], jobs: int
) -> Iterator[tuple[Mutant, Outcome]]:
    """Each mutant with its outcome, in the order of completion.

    Args:
        trees: The copies of the source to run in.
        left: The mutants, with their tests.
        jobs: Number of runs at the same time.
    """
    with trees.made(), in_parallel(jobs) as pool:
        try:
            firsts = {tests: pool.submit(baseline, trees, tests) for tests in set(left.values())}
            bases = {tests: first.result() for tests, first in firsts.items()}
            running = {
                pool.submit(run_mutant, trees, mutant, bases[tests]): mutant
                for mutant, tests in left.items()
            }
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            trees.end()


def _described(mutant: Mutant) -> str:
    old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
    return f"{mutant.path}:{mutant.line}: {mutant.kind}: {_cut(old)} -> {_cut(new)}"


def _cut(text: str) -> str:
    return text if len(text) <= 70 else f"{text[:67]}…"


def _report(outcomes: Mapping[Mutant, Outcome]) -> int:
    survivors = sorted(each for each, outcome in outcomes.items() if not outcome.is_killed)
    if survivors:
        print("\nSurvived:")
        for mutant in survivors:
            print(f"  {_described(mutant)}")
    total, killed = Counter[str](), Counter[str]()
    for mutant, outcome in outcomes.items():
        total[mutant.path] += 1
        killed[mutant.path] += outcome.is_killed
    print(f"\n{'module':<34} {'mutants':>8} {'killed':>8}")
    for path in sorted(total):
        untested = Outcome.UNTESTED in {o for m, o in outcomes.items() if m.path == path}
        print(f"{path:<34} {total[path]:>8} {killed[path]:>8}{'  no unit test' * untested}")
    share = killed.total() / max(1, total.total())
    print(f"{'all':<34} {total.total():>8} {killed.total():>8}  {share:.1%}")
    if share < WANTED:
        print(f"Fewer than {WANTED:.0%} were killed.")
        return 1
    return 0


if __name__ == "__main__":
    # A stop removes the copies of the tree, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
