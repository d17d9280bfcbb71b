"""The API as operators start it, in a process that can be ordered to die at a named point."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import config
from api import serve as serving
from api.app import create
from api.duties import leases, relay
from api.gate.once import Once
from api.life import ledger, news, steering
from api.store import database
from api.store import jobs as store
from services.broker import outbox
from services.broker.client import Link
from services.s3.s3_service import S3Service
from tests.chaos import mutants
from tests.chaos.crash_points import CrashPoints
from tests.chaos.journal import Journal

_POINTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "outbox row": ((store, "put_out"),),
    "answer": ((Once, "keep"),),
    "commit": ((database.Writing, "finish"),),
    "order to S3": ((ledger, "keep_order"),),
    "admission": ((store, "admit"),),
    "publication": ((Link, "publish"),),
    "mark": ((relay.Relay, "publish"),),
    "news": ((news, "change"),),
    "steering": ((steering, "cancel"), (steering, "pause"), (steering, "resume")),
}


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.with_api.server")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--slot", required=True)
    parser.add_argument("--who", required=True)
    parser.add_argument("--mutant", choices=mutants.NAMES)
    parsed = parser.parse_args()
    points = CrashPoints(
        parsed.folder / f"crash-{parsed.slot}.json",
        Journal(parsed.folder / "journal.jsonl", parsed.who),
    )
    _shorten_waits()
    if parsed.mutant:
        mutants.apply(parsed.mutant, of_api=True)
    for act, places in _POINTS.items():
        for owner, name in places:
            setattr(owner, name, _between(points, act, getattr(owner, name)))
    settings = config.load_api()
    serving.serve(create(settings), settings.api.api_host, settings.api.api_port)


def _between(points: CrashPoints, act: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*given: Any, **how: Any) -> Any:
        points.reached(f"before {act}")
        result = original(*given, **how)
        points.reached(f"after {act}")
        return result

    return wrapped


def _shorten_waits() -> None:
    """Shorten waiting times without a setting."""
    setattr(leases, "LEASE_SECONDS", 4.0)
    setattr(relay, "CONFIRM_SECONDS", 5.0)
    setattr(relay, "RESTART_SECONDS", 1.0)
    begin, open_s3 = outbox.Backoff.__init__, S3Service.__init__
    setattr(outbox.Backoff, "__init__", lambda self: begin(self, 0.3, 3.0))
    short = {"connect_timeout": 2.0, "read_timeout": 3.0}
    setattr(S3Service, "__init__", lambda self, **how: open_s3(self, **(how | short)))


if __name__ == "__main__":
    main()
