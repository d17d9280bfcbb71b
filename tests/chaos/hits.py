"""Counts the hits of each kind of fault; a fault that was ordered may hit nothing."""

from __future__ import annotations

import collections
import threading


class Hits:
    """A counter that any thread may raise."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def struck(self, kind: str, times: int = 1) -> None:
        """A fault of this kind struck something."""
        with self._lock:
            self._counts[kind] += times

    def of(self, kind: str) -> int:
        """How often it did."""
        with self._lock:
            return self._counts[kind]

    def counts(self) -> collections.Counter[str]:
        """All of them so far."""
        with self._lock:
            return collections.Counter(self._counts)
