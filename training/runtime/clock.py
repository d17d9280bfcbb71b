"""Measures a run's rate of steps, and the time of its next progress report."""

from __future__ import annotations

import time

PROGRESS_SECONDS = 0.25
COLD_STEPS = 2
"""The number of first steps that are many times slower: they load and tune kernels, and make the
optimizer's state."""
MEASURED_STEPS = 3
"""Further steps that are needed for a usable estimate."""


class Clock:
    """Measures the rate of steps, and when progress is due.

    Time without training must be left out of both rates (`leave_out`).
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._left_out = 0.0
        self._first: float | None = None  # end of the first step, a warm-up that does not count
        self._warm: float | None = None  # end of the cold steps
        self._left_out_since_warm = 0.0
        self._steps = 0
        self._told = float("-inf")

    def tick(self) -> None:
        """Count a completed step."""
        self._steps += 1
        if self._first is None:
            self._first = time.monotonic()
            self._left_out = 0.0
        if self._steps == COLD_STEPS:
            self._warm = time.monotonic()
            self._left_out_since_warm = 0.0

    def leave_out(self, seconds: float) -> None:
        """Exclude a time without training."""
        self._left_out += seconds
        self._left_out_since_warm += seconds

    def due(self) -> bool:
        """Whether progress is due. A positive answer restarts the interval."""
        now = time.monotonic()
        if now - self._told < PROGRESS_SECONDS:
            return False
        self._told = now
        return True

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began

    @property
    def steps_per_second(self) -> float | None:
        """Steps per second of all steps after the first; of the first while it is the only one."""
        if self._first is None:
            return None
        if self._steps == 1:
            return 1.0 / max(self._first - self._began, 1e-9)
        elapsed = time.monotonic() - self._first - self._left_out
        return (self._steps - 1) / max(elapsed, 1e-9)

    @property
    def warm_steps_per_second(self) -> float | None:
        """Steps per second after the slow first ones.

        None until there are enough for an estimate.
        """
        if self._warm is None or self._steps < COLD_STEPS + MEASURED_STEPS:
            return None
        elapsed = time.monotonic() - self._warm - self._left_out_since_warm
        return (self._steps - COLD_STEPS) / max(elapsed, 1e-9)
