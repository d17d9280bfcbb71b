"""The worker as operators start it, in a process that can be ordered to die at a named point.

`cli.commands.worker` runs unchanged; the differences are in `tests.chaos.instruments`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from cli import commands
from consumer import worker as desk
from tests.chaos import clock, full_disk, instruments, mutants
from tests.chaos.crash_points import CrashPoints
from tests.chaos.journal import Journal


def main() -> None:
    """Run a worker until it is stopped, or dies."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.worker")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--slot", required=True)
    parser.add_argument("--who", required=True)
    parser.add_argument("--epoch-seconds", type=float, required=True)
    parser.add_argument("--real-trainer", action="store_true")
    parser.add_argument("--once", type=float, help="take one message, wait so long for it")
    parser.add_argument("--mutant", choices=mutants.NAMES)
    parsed = parser.parse_args()
    journal = Journal(parsed.folder / "journal.jsonl", parsed.who)
    points = CrashPoints(parsed.folder / f"crash-{parsed.slot}.json", journal)
    disk_full = parsed.folder / f"disk-full-{parsed.slot}"
    if parsed.mutant:
        mutants.apply(parsed.mutant)
    instruments.shorten_waits()
    instruments.add_crash_points(points)
    instruments.keep_journal(journal)
    instruments.watch_leases(journal)
    instruments.withhold_sweeps(parsed.folder / "sweep-allowed", journal)
    instruments.fill_disk(disk_full, journal)
    full_disk.cut_writes(
        disk_full.with_name(disk_full.name + "-mid-write"),
        lambda name: journal.note("write_cut", name=name),
    )
    if parsed.real_trainer:
        instruments.keep_journal_of_epochs(journal)
    else:
        instruments.take_any_machine()
        command = (
            *(sys.executable, "-m", "tests.chaos.stand_in_trainer"),
            *("--journal", str(parsed.folder / "journal.jsonl"), "--who", parsed.who),
            *("--epoch-seconds", str(parsed.epoch_seconds), "--disk-full", str(disk_full)),
        )
        setattr(desk, "run_worker", functools.partial(desk.run_worker, trainer_command=command))
    clock.shift(
        clock.Clock(
            parsed.folder / f"clock-{parsed.slot}",
            lambda offset: journal.note("clock_stepped", offset=offset),
        )
    )
    if parsed.once is not None:
        commands.worker(once=True, idle_seconds=parsed.once)
    else:
        commands.worker()


if __name__ == "__main__":
    main()
