"""Faults that strike inside the workers, as the journal and the workers' logs show them."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

from tests.chaos import journal
from tests.chaos.jobs import journal_of
from tests.chaos.schedule import Kind

_KINDS = {
    "crash_point kill": Kind.CRASH_POINT,
    "crash_point stop": Kind.STOP_POINT,
    "disk_full": Kind.DISK_FULL,
    "write_cut": Kind.DISK_FULL_MID_WRITE,
    "clock_stepped": Kind.CLOCK_STEP,
}


def noted(folder: Path) -> collections.Counter[str]:
    """How often each of these kinds has struck so far."""
    found: collections.Counter[str] = collections.Counter()
    spoilt: dict[tuple[str, str], str] = {}
    for note in journal.read(journal_of(folder)):
        name = " ".join(filter(None, (note["kind"], note.get("act"))))
        if name == "crash_point kill" and note["who"].startswith("api-"):
            found[Kind.API_CRASH_POINT] += 1
        elif name in _KINDS:
            found[_KINDS[name]] += 1
        elif note["kind"] == "published" and note["times"] > 1:
            found[Kind.PUBLISHED_TWICE] += 1
        elif note["kind"] == "spoilt":
            spoilt[note["task"], note["name"]] = note["how"]
    for line in log_lines(folder, "broker_blocks_publishers", "checkpoint_damaged"):
        if line["event"] == "broker_blocks_publishers":
            found[Kind.BROKER_ALARM] += 1
        elif how := spoilt.get((line.get("task_id", ""), line.get("checkpoint", ""))):
            found[how] += 1
    return found


def log_lines(folder: Path, *events: str) -> list[dict[str, Any]]:
    """The lines of these events in all workers' logs."""
    found = []
    for log in folder.glob("worker-*.log"):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("{") and any(event in line for event in events):
                try:
                    values = json.loads(line)
                except ValueError:  # its writer was killed
                    continue
                if values.get("event") in events:
                    found.append(values)
    return found
