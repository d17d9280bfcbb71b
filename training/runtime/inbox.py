"""The messages of the front desk to the trainer process: runs, and stops that name a run."""

from __future__ import annotations

import collections
import logging
import os
import threading
from typing import IO

from jobs.kinds import Run
from utils.errors import StopReason
from utils.events import Stop, decode

log = logging.getLogger(__name__)

DESK_GONE = 0
DESK_SENT_NONSENSE = 3


class Inbox:
    """Reads the pipe in a separate thread, so that a stop or the end is seen during training.

    A stop names its run. If that run neither runs nor waits, the stop came too late and is dropped:
    it never ends another run.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._changed = threading.Condition()
        self._waiting: collections.deque[_Pending] = collections.deque()
        self._in_hand: _Pending | None = None

    def start(self) -> None:
        """Begin to read. When the pipe ends, the process ends at once."""
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def take(self) -> Run:
        """Wait for the next run and make it the current one."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            self._in_hand = self._waiting.popleft()
            return self._in_hand.run

    def has_run(self) -> bool:
        """Whether a run waits to be taken."""
        with self._changed:
            return bool(self._waiting)

    def stop_reason(self) -> StopReason | None:
        """The reason to stop the current run, or None."""
        in_hand = self._in_hand
        return in_hand.stop if in_hand else None

    def lay_down(self) -> None:
        """End the current run; later stops do not count. Call this before its end is reported."""
        with self._changed:
            self._in_hand = None

    def deliver(self, fact: Run | Stop) -> None:
        """Store a message from the pipe."""
        with self._changed:
            if isinstance(fact, Run):
                self._waiting.append(_Pending(fact))
                self._changed.notify()
            elif meant := self._meant_by(fact):
                meant.stop = fact.reason
            else:
                log.info("stop_without_run", extra={"reason": fact.reason})

    def _meant_by(self, stop: Stop) -> _Pending | None:
        known = (*([self._in_hand] if self._in_hand else ()), *self._waiting)
        named = (stop.task_id, stop.claim)
        return next((each for each in known if (each.run.task_id, each.run.claim) == named), None)

    def _read(self) -> None:
        # No clean-up at the end: a training thread cannot be interrupted, and its result has no
        # reader any more.
        try:
            for line in self._pipe:
                self.deliver(decode(line, (Run, Stop)))
        except ValueError as error:
            log.critical("pipe_broken", extra={"reason": str(error)})
            os._exit(DESK_SENT_NONSENSE)
        except OSError as error:
            log.critical("pipe_broken", extra={"reason": str(error)})
        os._exit(DESK_GONE)


class _Pending:
    """A run and the stop that came for it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stop: StopReason | None = None
