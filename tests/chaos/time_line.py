"""The time line of a run: what the suite did, for people."""

from __future__ import annotations

import threading
import time
from pathlib import Path


class TimeLine:
    """Printed when an invariant is broken.

    Args:
        path: The file that it is written to as well.
    """

    def __init__(self, path: Path) -> None:
        self.began = time.monotonic()
        self.lines: list[str] = []
        self._path = path
        self._lock = threading.Lock()

    def note(self, text: str) -> None:
        """Add a line."""
        with self._lock:
            self.lines.append(f"{time.monotonic() - self.began:8.2f} s  {text}")
            self._path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
