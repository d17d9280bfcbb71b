"""What really happened, told by everybody who did it: one file, one line of JSON an event.

Times are `time.monotonic()`, which all processes of a machine share.
"""

from __future__ import annotations

import json
import os
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


def read(path: Path) -> list[dict[str, Any]]:
    """All events so far, by time."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda event: float(event["t"]))
