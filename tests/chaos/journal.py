"""The events of a run, noted by each process that caused one: one file, one line of JSON an event.

Times are `time.monotonic()`, which all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appends events; any number of processes may write to one file.

    Args:
        path: The file; made if it is not there.
        who: Put on every line.
    """

    def __init__(self, path: Path, who: str) -> None:
        self._who = who
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, kind: str, **facts: Any) -> None:
        """Add one event. One write, so that lines of several processes never mix."""
        line = {"t": time.monotonic(), "who": self._who, "kind": kind, **facts}
        os.write(self._file, json.dumps(line).encode() + b"\n")


_READ: dict[Path, tuple[int, list[dict[str, Any]]]] = {}
_LOCK = threading.Lock()


def read(path: Path) -> list[dict[str, Any]]:
    """All events so far, by time. Only what is new since the last call is parsed."""
    if not path.exists():
        return []
    with _LOCK:
        offset, events = _READ.get(path, (0, []))
        with path.open("rb") as file:
            file.seek(offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        events += [json.loads(line) for line in whole.splitlines()]
        events.sort(key=lambda event: float(event["t"]))
        _READ[path] = (offset + len(whole), events)
        return list(events)


def forget(path: Path) -> None:
    """The file is about to be made again."""
    with _LOCK:
        _READ.pop(path, None)
