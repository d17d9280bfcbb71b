"""Judges whether a run of the trainer process still makes progress."""

from __future__ import annotations

import time
from collections.abc import Callable

from consumer.life.stop_signal import StopSignal
from utils.errors import StopReason
from utils.events import Event, Progress, Stage

# A child that does not obey a stop (a hung driver) is replaced after this time.
STOP_PATIENCE_SECONDS = 60.0
# Loading a base model may include its download. A child that is silent for this many times the
# stall's seconds hangs.
_LONGEST_SILENCE_IN_STALLS = 12


class RunWatch:
    """Watches one run and gives a reason to replace the child, if there is one.

    Args:
        stop: The run's stop signal; requested at the time limit.
        stall_seconds: A run that trains and makes no step for this long hangs.
        max_seconds: After this time the run is asked to stop for `TIME_LIMIT`.
        patience: Returns the seconds that a stop may still take.

    Attributes:
        verdict: The reason to replace the child; None while it may live.
    """

    def __init__(
        self,
        stop: StopSignal,
        *,
        stall_seconds: float,
        max_seconds: float,
        patience: Callable[[], float],
    ) -> None:
        self._stop = stop
        self._patience = patience
        self._stall_seconds = stall_seconds
        self._deadline = time.monotonic() + max_seconds
        self._stop_seen_at: float | None = None
        self._step: int | None = None
        self._step_at: float | None = None
        self._heard_at = time.monotonic()
        self.verdict: str | None = None

    def condemn(self, reason: str) -> None:
        """End the run for another reason."""
        self.verdict = reason

    def saw(self, event: Event) -> None:
        """Take an event. The stall clock runs only between training steps."""
        self._heard_at = time.monotonic()
        if not isinstance(event, Progress):
            return
        if event.stage is not Stage.TRAINING:
            self._step = self._step_at = None
        elif event.done != self._step:
            # The first report only names the step at which training starts: the first step may
            # take minutes.
            self._step_at = time.monotonic() if self._step is not None else None
            self._step = event.done

    def judge(self) -> str | None:
        """Return the verdict, if there is one; request a stop at the time limit."""
        now = time.monotonic()
        if now > self._deadline:
            self._stop.request(StopReason.TIME_LIMIT)
        if self._step_at is not None and now - self._step_at > self._stall_seconds:
            self.verdict = (
                f"the trainer made no step for {self._stall_seconds:.0f} seconds and was replaced "
                "(STALL_SECONDS); the GPU or its driver may hang"
            )
        if now - self._heard_at > (silence := self._stall_seconds * _LONGEST_SILENCE_IN_STALLS):
            self.verdict = (
                f"the trainer sent no event for {silence:.0f} seconds and was replaced "
                f"({_LONGEST_SILENCE_IN_STALLS} times STALL_SECONDS)"
            )
        if self._stop.reason:
            self._stop_seen_at = self._stop_seen_at or now
            waited = now - self._stop_seen_at
            if waited > STOP_PATIENCE_SECONDS or self._patience() <= 0:
                self.verdict = f"the trainer had not obeyed a stop after {waited:.0f} s"
        return self.verdict
