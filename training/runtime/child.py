"""The loop of the trainer process: it takes runs, passes each to a runner, and reports its end."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import IO, Any, Protocol

from jobs.kinds import Run, TrainerOptions, load
from training.runtime.followers import Followers, PeerFailed, TeamBroken, with_meeting_place
from training.runtime.inbox import Inbox
from utils.errors import (
    REPORTABLE,
    DiskFull,
    GpuOutOfMemory,
    MachineError,
    Stopped,
    StopReason,
    TrainingFailed,
    TrainingServerError,
)
from utils.events import (
    BaseModelReady,
    CheckpointSaved,
    Event,
    Failed,
    Finished,
    encode,
    from_dict,
)
from utils.gpu_monitor import GpuMonitor

log = logging.getLogger(__name__)


class Runner(Protocol):
    """Does the runs of one kind, on a base model that stays loaded between them.

    Attributes:
        run_type: The dataclass of its runs (see `jobs.kinds.KindRun`).
        has_base: Whether its runs use a base model. The process has the memory for one base model.
        is_usable: False when the process must be replaced before the next run.
        on_gpu: Whether the base model is loaded and on a GPU.
        shares_runs: Whether several processes can do one run together (see
            `training.runtime.team`). Otherwise process 0 does its runs alone.
    """

    run_type: type[Any]
    has_base: bool
    shares_runs: bool
    is_usable: bool

    @property
    def on_gpu(self) -> bool:
        """Whether the base model is loaded and on a GPU."""

    def load(self, tell: Callable[[Event | BaseModelReady], None]) -> None:
        """Load the base model, unless it is loaded."""

    def release(self, tell: Callable[[Event | BaseModelReady], None]) -> None:
        """Free the memory of the base model."""

    def run(
        self,
        run: Any,
        tell: Callable[[Event | BaseModelReady], None],
        should_stop: Callable[[], StopReason | None],
    ) -> Finished:
        """Do one run. Errors of the device are raised as errors of `utils.errors`."""


FOLLOWER_LOST = 4
"""Exit code of process 0 after another process of the trainer is lost."""


def _unbound(**_: Any) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


class Child:
    """Serves runs, one after the other.

    Args:
        options: The options of the process.
        inbox: Delivers runs and stops.
        events: Receives the events.
        bound: Binds names to every log line until its block ends. (Not imported here: a machine
            that only trains has no such logger.)
    """

    def __init__(
        self,
        options: TrainerOptions,
        inbox: Inbox,
        events: IO[bytes],
        *,
        bound: Callable[..., AbstractContextManager[None]] = _unbound,
    ) -> None:
        self._bound = bound
        self._inbox, self._events = inbox, events
        self._monitor = GpuMonitor()
        self._telling = threading.Lock()
        self._options = options = with_meeting_place(options)
        self._followers: Followers | None = None
        self._sharing, self._whole = False, True
        self._runner: Runner = load(options.runner)(options)
        self._runners = {options.runner: self._runner}
        self._warm = self._runner

    def serve(self) -> None:
        """Load the base model, then do runs until the process ends with its pipe."""
        if self._leads(self._warm):
            self._started_followers()
        if not self._warm.has_base or not self._inbox.has_run():
            try:
                self._warm.load(self._tell)
            except TrainingServerError as error:
                # There is no run to fail yet. The next run tries again and reports the error.
                log.error("base_model_not_loaded", extra=_reason(error))
        while True:
            run = self._inbox.take()
            with self._bound(task_id=run.task_id, **run.log_fields):
                log.info("run_taken", extra={"claim": run.claim})
                ending = self._do(run)
            self._inbox.lay_down()
            self._write(ending)
            if not self._whole:  # the processes cannot meet again
                os._exit(FOLLOWER_LOST)

    def _do(self, run: Run) -> Finished | Failed:
        """Do one run, which always has an ending."""
        ending, error = self._ended(run)
        if self._sharing and self._followers:
            self._sharing = False
            of_another = isinstance(error, (PeerFailed, TeamBroken))
            ending, self._whole = self._followers.settle(ending, of_another=of_another)
        return ending

    def _ended(self, run: Run) -> tuple[Finished | Failed, Exception | None]:
        """Do this process's part of a run; returns its ending and its error."""
        began = time.monotonic()
        try:
            runner = self._runner_of(run)
            order = from_dict(runner.run_type, run.order)
            if self._leads(runner):
                self._sharing = True
                self._started_followers().begin(run)
            return runner.run(order, self._tell, self._inbox.stop_reason), None
        except Stopped as stop:
            seconds = time.monotonic() - began
            return Finished(run.task_id, "", (), 0, seconds, stopped=stop.reason), None
        except TrainingServerError as error:
            log.info("run_not_possible", extra=_reason(error))
            return failed(run, error, usable=self._runner.is_usable), error
        except Exception as error:  # pylint: disable=broad-exception-caught  # reported by name
            log.error("run_failed", exc_info=error)
            return failed(run, error, usable=self._runner.is_usable), error

    def _leads(self, runner: Runner) -> bool:
        """Whether this process has followers for the runs of a runner."""
        return self._options.processes > 1 and not self._options.rank and runner.shares_runs

    def _started_followers(self) -> Followers:
        if self._followers is None:
            self._followers = Followers(self._options, self._give_up)
        return self._followers

    def _give_up(self, loss: Failed) -> None:
        """End this process after another one is lost. The desk starts a new trainer."""
        log.error("process_lost", extra={"reason": loss.message})
        if loss.task_id:
            self._write(loss)
        os._exit(FOLLOWER_LOST)

    def _runner_of(self, run: Run) -> Runner:
        """The runner of this kind. Only a runner with a base model replaces the warm one."""
        if run.runner not in self._runners:
            self._runners[run.runner] = load(run.runner)(self._options)
        self._runner = self._runners[run.runner]
        if self._runner.has_base and self._runner is not self._warm:
            self._warm.release(self._tell)
            self._warm = self._runner
        return self._runner

    def _tell(self, event: Event | BaseModelReady) -> None:
        """Send an event. Only process 0 sends more than endings."""
        if self._options.rank:
            return
        self._write(event)
        # The worker logs its GPUs every minute. Without a GPU it has logged that.
        if isinstance(event, CheckpointSaved) and self._runner.on_gpu:
            self._monitor.log_now()

    def _write(self, event: Event | BaseModelReady) -> None:
        """Write one event. If nothing reads the pipe any more, the process ends."""
        line = memoryview(encode(event))
        with self._telling:
            try:
                while line:
                    line = line[self._events.write(line) :]
            except OSError:
                os._exit(0)


def _reason(error: TrainingServerError) -> dict[str, str]:
    """The log fields of an error of this server: its sentence, and its cause."""
    cause = error.__cause__
    return {"reason": str(error)} | ({"cause": repr(cause)[:500]} if cause else {})


def failed(run: Run, error: BaseException, *, usable: bool = True) -> Failed:
    """The event for an error: a reportable name, and a sentence without paths of this disk.

    Args:
        run: The run that failed.
        error: The error that ended it.
        usable: Whether the runner can do another run.
    """
    known = _known(error)
    name = next(
        (cls.__name__ for cls in type(known).__mro__ if REPORTABLE.get(cls.__name__) is cls),
        TrainingFailed.__name__,
    )
    # A broken CUDA context lasts as long as its process.
    usable = usable and (not isinstance(known, MachineError) or isinstance(known, DiskFull))
    return Failed(run.task_id, name, _without_paths(str(known)), trainer_usable=usable)


def _known(error: BaseException) -> TrainingServerError:
    if isinstance(error, TrainingServerError):
        return error
    if isinstance(error, MemoryError):
        return GpuOutOfMemory("There is not enough memory on this machine for the job.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull("The worker's disk is full.")
    first_line = (str(error).splitlines() or [""])[0]
    return TrainingFailed(
        f"Training ended with an unexpected error ({type(error).__name__}: {first_line[:200]})."
    )


def _without_paths(message: str) -> str:
    """The message with only the last part of every absolute path; addresses stay."""
    return re.sub(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+([^\s/'\"]*)", r"\1", message)
