"""The further processes of a trainer: process 0 starts them, sends them its runs, and watches them.

A follower is the same program as process 0. Its runs come from process 0 over a pipe as those of
process 0 come from the desk, and it ends at once when process 0 does. It sends only the endings of
its runs. No stop comes over its pipe: the processes agree on stops (`training.runtime.team`).

Process 0 is the launcher, and not `torchrun` or `accelerate launch`: they start their processes
without the desk's pipes, turn a signal into exit code 1, and leave the processes behind when they
are killed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from jobs.kinds import Run, TrainerOptions
from utils.errors import TrainingFailed, WorkerCrashed
from utils.events import Failed, Finished, decode, encode

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
ENDING_SECONDS = 30.0
"""The processes of one run end it within this time of each other."""
_DEATH_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1

PEER_FAILED = "Another process of the training has failed."

Ending = Finished | Failed


class PeerFailed(TrainingFailed):
    """Another process of the team has failed; it reports the reason."""


class TeamBroken(WorkerCrashed):
    """Another process of the team does not answer."""


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def with_meeting_place(options: TrainerOptions) -> TrainerOptions:
    """The options of process 0, with a new folder in which the processes find each other.

    It is below `TMPDIR`, which goes with the work folder.
    """
    if options.processes == 1 or options.meeting:
        return options
    return dataclasses.replace(options, meeting=tempfile.mkdtemp(prefix="trainer-processes-"))


class Followers:
    """The further processes of a trainer.

    Args:
        options: The options of process 0.
        give_up: Called in a thread if a process has died or failed, and process 0 does not end the
            run or has none: with the failure. Its task id is empty if there is no run.
    """

    def __init__(self, options: TrainerOptions, give_up: Callable[[Failed], None]) -> None:
        self._give_up = give_up
        self._changed = threading.Condition()
        self._run: Run | None = None
        self._settling = self._given_up = False
        self._each = [
            _Follower(dataclasses.replace(options, rank=rank, log_level="ERROR"), self._changed)
            for rank in range(1, options.processes)
        ]
        log.info("followers_started", extra={"pids": [each.process.pid for each in self._each]})
        threading.Thread(target=self._watch, name="followers", daemon=True).start()

    def begin(self, run: Run) -> None:
        """Send a run to all followers."""
        with self._changed:
            self._run = run
            for each in self._each:
                each.ending = None
        for each in self._each:
            each.send(encode(run))

    def settle(self, ending: Ending, *, of_another: bool) -> tuple[Ending, bool]:
        """Wait until the followers have ended the run, too.

        Args:
            ending: The ending of process 0.
            of_another: Whether it is the consequence of another process's failure.

        Returns:
            The ending of the run, and whether all processes can do another one.
        """
        with self._changed:
            # If the watch has given up, the process ends now.
            self._changed.wait_for(lambda: not self._given_up)
            self._run, self._settling = None, True  # from now on only this thread reports a death
            self._changed.notify_all()
            self._changed.wait_for(self._settled, timeout=ENDING_SECONDS)
            trouble = self._trouble(ending.task_id)
            whole = all(each.usable for each in self._each)
            self._settling = not whole  # then process 0 reports the ending and ends
        if not isinstance(ending, Failed):
            return ending, whole
        ending = (trouble if of_another else None) or ending
        return dataclasses.replace(ending, trainer_usable=ending.trainer_usable and whole), whole

    def _settled(self) -> bool:
        return self._lost() is not None or all(each.ending for each in self._each)

    def _lost(self) -> _Follower | None:
        return next((each for each in self._each if each.dead), None)

    def _trouble(self, task_id: str) -> Failed | None:
        """The death of a process, or a failure that is no consequence of another one."""
        if lost := self._lost():
            return Failed(task_id, _CRASHED, lost.cause_of_death(), trainer_usable=False)
        failures = [each.ending for each in self._each if isinstance(each.ending, Failed)]
        own = (f for f in failures if f.message != PEER_FAILED and f.error != _CRASHED)
        return next(own, None)

    def _in_trouble(self) -> bool:
        if self._settling:
            return False
        return self._lost() is not None or bool(self._run and self._trouble(""))

    def _watch(self) -> None:
        """Give up if a follower has died or failed, and process 0 does not end its run by itself.

        Process 0 may wait for that follower.
        """
        with self._changed:
            while not self._given_up:
                self._changed.wait_for(self._in_trouble)
                run = self._run
                if run and self._changed.wait_for(
                    lambda run=run: self._run is not run,  # type: ignore[misc]
                    timeout=_DEATH_SECONDS,
                ):
                    if self._lost():
                        return  # `settle` reports it
                    continue
                self._given_up = True
            trouble = self._trouble(run.task_id if run else "")
        assert trouble is not None
        self._give_up(dataclasses.replace(trouble, trainer_usable=False))


_CRASHED = WorkerCrashed.__name__


class _Follower:
    """One further process, and its two pipes.

    Attributes:
        ending: Its ending of the present run.
        dead: Whether its pipe has ended.
    """

    def __init__(self, options: TrainerOptions, changed: threading.Condition) -> None:
        self.rank, self._size = options.rank, options.processes
        self._changed = changed
        self.ending: Ending | None = None
        self.dead = False
        runs_read, self._runs = os.pipe()
        events_read, events_write = os.pipe()
        self.process = subprocess.Popen(  # pylint: disable=consider-using-with
            [
                *(sys.executable, "-m", "training"),
                *("--runs-fd", str(runs_read), "--events-fd", str(events_write)),
                json.dumps(dataclasses.asdict(options)),
            ],
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            pass_fds=(runs_read, events_write),
        )
        os.close(runs_read)
        os.close(events_write)
        threading.Thread(
            target=self._read, args=(events_read,), name=f"follower-{self.rank}", daemon=True
        ).start()

    @property
    def usable(self) -> bool:
        """Whether it has ended its run and can do another one."""
        ending = self.ending
        if self.dead or ending is None:
            return False
        return not isinstance(ending, Failed) or ending.trainer_usable

    def send(self, line: bytes) -> None:
        """Write one line to it. The reader of its events notices that it has ended."""
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._runs, view) :]
        except BrokenPipeError:
            pass

    def cause_of_death(self) -> str:
        """A sentence about the end of the process."""
        who = f"process {self.rank} (of 0 to {self._size - 1}) of the trainer"
        try:
            code = self.process.wait(timeout=_DEATH_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{who} closed its pipe but did not end"
        if code == -signal.SIGKILL:
            return (
                f"{who} was killed (SIGKILL): most often the system's out-of-memory killer, so "
                "look at the machine's memory, or lower TRAINER_PROCESSES"
            )
        if code < 0:
            return f"{who} crashed ({signal.Signals(-code).name})"
        return f"{who} ended by itself with exit code {code}; see its last log lines"

    def _read(self, pipe: int) -> None:
        with os.fdopen(pipe, "rb") as lines:
            for line in lines:
                try:
                    ending = decode(line, (Finished, Failed))
                except ValueError:
                    break
                with self._changed:
                    self.ending = ending
                    self._changed.notify_all()
        with self._changed:
            self.dead = True
            self._changed.notify_all()
