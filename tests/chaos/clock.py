"""A wall clock that is set in one worker: time steps, as after a bad NTP answer.

`time.monotonic` does not change. Only Python's own reading of the wall clock is shifted, by
`time.time` and by the name `datetime` in the product's modules.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOMS = ("cli", "config", "consumer", "jobs", "services", "utils", "main")
_LOOK_SECONDS = 0.2
LONGEST_STEP = 200.0
"""Seconds: less than the five minutes that a backend allows a webhook's timestamp to differ."""


class Clock:
    """Reads the error of the wall clock.

    Args:
        path: The file with the error in seconds; without the file the clock is right.
        note: Called once for each step of the clock, after the time was read.
    """

    def __init__(self, path: Path, note: Callable[[float], None]) -> None:
        self._path, self._note = path, note
        self._offset = 0.0
        self._looked_at = float("-inf")

    def offset(self) -> float:
        """Seconds to be added to the true time."""
        now = time.monotonic()
        if now > self._looked_at + _LOOK_SECONDS:
            self._looked_at = now
            try:
                offset = float(self._path.read_text(encoding="ascii"))
            except (FileNotFoundError, ValueError):
                offset = 0.0
            if offset != self._offset:
                self._offset = offset
                if offset:
                    self._note(offset)
        return self._offset


def shift(clock: Clock) -> None:
    """Have this process read the time by `clock`, in all modules that are imported by now."""
    true_time = time.time

    class AnyDatetime(type):
        """Makes instances of the true class count as instances of this one."""

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, datetime.datetime)

    class Shifted(datetime.datetime, metaclass=AnyDatetime):
        """The stand-in for `datetime` in the product's modules."""

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            """The shifted time."""
            return datetime.datetime.fromtimestamp(time.time(), tz)

    class Module:
        """Stands in for the module `datetime` in modules that import the module itself."""

        datetime = Shifted

        def __getattr__(self, name: str) -> Any:
            return getattr(datetime, name)

    setattr(time, "time", lambda: true_time() + clock.offset())
    for name, module in tuple(sys.modules.items()):
        if name.split(".")[0] in _ROOMS:
            for attribute, value in tuple(vars(module).items()):
                if value is datetime.datetime:
                    setattr(module, attribute, Shifted)
                elif value is datetime:
                    setattr(module, attribute, Module())
