"""The trainer process: one child that lives across jobs and owns the GPU.

Lines of JSON go in and out over two pipes (`utils.events`). The child has its own session, so a
terminal's Ctrl-C does not reach it. It ends when its pipe closes, so it never outlives the front
desk, even one that was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from consumer.life.stop_signal import StopSignal
from consumer.trainer import trainer_log
from consumer.trainer.run_watch import STOP_PATIENCE_SECONDS, RunWatch
from jobs.kinds import Run, TrainerOptions
from utils.confined import LEAST_ABI, Confinement, hide_own_memory, landlock_version
from utils.errors import REPORTABLE, StopReason, TrainingFailed, WorkerCrashed
from utils.events import (
    EVENTS,
    BaseModelReady,
    Event,
    Failed,
    Finished,
    Stop,
    decode,
    encode,
)
from utils.logger import Redactor, get_logger
from utils.metrics import Metrics

log = get_logger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
_CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")
_POLL_SECONDS = 0.2
REVIVE_SECONDS = 60.0


class TrainerProcess:
    """Starts the child, sends it runs, relays its events, and explains its death in a sentence.

    Args:
        options: The child's options for its whole life.
        environment: The child's whole environment.
        stall_seconds: A run that trains and makes no step for this long is ended.
        command: Starts the child, or any program that speaks `utils.events` over the two pipes.
        metrics: Count the restarts.
        secrets: Masked in the child's log.
        confinement: Limits the child's access to files, processes and ports.
    """

    def __init__(
        self,
        options: TrainerOptions,
        environment: Mapping[str, str],
        *,
        stall_seconds: float,
        command: Sequence[str] = (sys.executable, "-m", "training"),
        metrics: Metrics | None = None,
        secrets: Iterable[str] = (),
        confinement: Confinement = Confinement(),
    ) -> None:
        self._metrics = metrics or Metrics()
        self._started = self._closed = False
        self._revived_at = float("-inf")
        self._options = options
        self._environment = dict(environment)
        self._stall_seconds = stall_seconds
        self._command = tuple(confinement.command(command))
        self._redactor = Redactor(secrets)
        self._child: _Child | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the running child, or None."""
        child = self._child
        return child.process.pid if child and child.process.poll() is None else None

    @property
    def base_model_ready(self) -> bool:
        """Whether the running child has the base model in memory."""
        child = self._child
        return child is not None and child.base_model_ready and self.pid is not None

    def start(self) -> None:
        """Start a child if none runs; it loads the base model while the worker waits for a job."""
        with self._lock:
            if self.pid is None and not self._closed:
                self._discard()
                self._hide_secrets()
                self._child = _Child(
                    self._command, self._options, self._environment, self._redactor
                )
                log.info("trainer_started", pid=self._child.process.pid)
                if self._started:
                    self._metrics.trainer_restarts.inc()
                self._started = True

    def _hide_secrets(self) -> None:
        hide_own_memory()
        if not self._started and landlock_version() < LEAST_ABI:
            reason = "this kernel does not offer Landlock, so that the trainer can read .env"
            log.warning("trainer_not_confined", reason=reason)

    def revive(self) -> None:
        """Replace a child that died while idle, so the next job does not wait for the base model.

        A child that dies at every start is replaced once a minute at most.
        """
        child, now = self._child, time.monotonic()
        if child is None or self.pid or self._closed:
            return
        if now - self._revived_at > REVIVE_SECONDS:
            self._revived_at = now
            log.warning("trainer_died_idle", reason=child.cause_of_death())
            self.start()

    def close(self) -> None:
        """End the child: close its pipe, and kill it if it does not end."""
        with self._lock:
            self._closed = True
            self._discard()

    def run(
        self,
        run: Run,
        on_event: Callable[[Event], None],
        stop: StopSignal,
        *,
        max_seconds: float,
        patience: Callable[[], float] = lambda: STOP_PATIENCE_SECONDS,
    ) -> Finished:
        """Train.

        Args:
            run: The run.
            on_event: Receives every event, in order, in this thread.
            stop: Obeyed within one optimizer step.
            max_seconds: After this time the run is stopped for `TIME_LIMIT`.
            patience: Returns the seconds that a stop may still take; a shutdown leaves few.

        Returns:
            The child's `Finished`; its `stopped` is None if training is complete.

        Raises:
            JobError, MachineError: The child reports it.
            WorkerCrashed: The child died or hung; the next run gets a new one.
            Stopped, Cancelled, TimeLimit: The child died or hung after a stop was requested.
        """
        self.start()
        child = self._child
        assert child is not None
        child.send(encode(run))
        stop.subscribe(lambda reason: child.send(encode(Stop(reason, run.task_id, run.claim))))
        watch = RunWatch(
            stop, stall_seconds=self._stall_seconds, max_seconds=max_seconds, patience=patience
        )
        for event in child.events(watch):
            if event.task_id != run.task_id:
                continue  # a late event of a run that was ended
            watch.saw(event)
            on_event(event)
            if isinstance(event, Finished):
                return event
            if isinstance(event, Failed):
                if not event.trainer_usable:
                    self._replace(child)
                raise REPORTABLE.get(event.error, TrainingFailed)(event.message)
        if watch.verdict:
            child.kill()  # it hangs: waiting would use up the rest of a shutdown's grace period
        if stop.reason is StopReason.SHUTDOWN:
            self.close()
        reason = watch.verdict or child.cause_of_death()
        if error := stop.error():
            log.warning("trainer_lost_while_stopping", reason=reason)
        if stop.reason is not StopReason.SHUTDOWN:
            self._replace(child)
        raise error or WorkerCrashed(reason)

    def _replace(self, child: _Child) -> None:
        with self._lock:
            if self._child is child:
                self._discard()
        self.start()

    def _discard(self) -> None:
        if self._child:
            self._child.close()
            self._child = None


class _Child:
    """One operating-system process and its two pipes.

    Its events are read as they come, also between runs: `BaseModelReady` comes then.

    Attributes:
        base_model_ready: Whether the base model is in memory, by the last event.
    """

    def __init__(
        self,
        command: Sequence[str],
        options: TrainerOptions,
        environment: Mapping[str, str],
        redactor: Redactor,
    ) -> None:
        self._out_of_memory_before = _out_of_memory_kills()
        runs_read, self._runs = os.pipe()
        events_read, events_write = os.pipe()
        try:
            self.process = subprocess.Popen(  # pylint: disable=consider-using-with
                [
                    *command,
                    *("--runs-fd", str(runs_read), "--events-fd", str(events_write)),
                    json.dumps(dataclasses.asdict(options)),
                ],
                cwd=_ROOT,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                # A log for people may have any line in it.
                stderr=subprocess.PIPE if options.log_format == "json" else None,
                pass_fds=(runs_read, events_write),
                start_new_session=True,
            )
        finally:
            os.close(runs_read)
            os.close(events_write)
        stderr = self.process.stderr
        self._log = trainer_log.follow(stderr, redactor) if stderr else None
        self._send_lock = threading.Lock()
        self._closed = False
        self.base_model_ready = False
        self._heard: queue.SimpleQueue[Event | ValueError | None] = queue.SimpleQueue()
        self._reader = threading.Thread(
            target=self._read, args=(events_read,), name="trainer-events", daemon=True
        )
        self._reader.start()

    def send(self, line: bytes) -> None:
        """Write one line to the child. The reader of its events notices that it has ended."""
        with self._send_lock:
            if self._closed:
                return
            view = memoryview(line)
            with contextlib.suppress(BrokenPipeError):
                while view:
                    view = view[os.write(self._runs, view) :]

    def events(self, watch: RunWatch) -> Iterator[Event]:
        """Events until the child's pipe ends or the watch has a verdict."""
        while watch.judge() is None:
            try:
                heard = self._heard.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if heard is None:
                return
            if isinstance(heard, ValueError):
                watch.condemn(f"the trainer sent a line that is not an event: {heard}")
                return
            yield heard

    def _read(self, pipe: int) -> None:
        """Read events until the child's pipe ends."""
        with os.fdopen(pipe, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # it died while writing
                try:
                    said = decode(line, (*EVENTS, BaseModelReady))
                except ValueError as error:
                    said = error
                if isinstance(said, BaseModelReady):
                    self.base_model_ready = said.ready
                else:
                    self._heard.put(said)
        self.base_model_ready = False
        self._heard.put(None)

    def cause_of_death(self) -> str:
        """A sentence about the end of the process."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the trainer closed its pipe but did not end"
        if code == -signal.SIGKILL:
            if _out_of_memory_kills() > self._out_of_memory_before:
                return (
                    "the trainer was killed because the machine ran out of memory "
                    "(RAM, not the GPU's): give the container more memory, or lower the batch size"
                )
            return (
                "the trainer was killed (SIGKILL): most often the system's out-of-memory killer, "
                "so look at the machine's memory"
            )
        if code < 0:
            return f"the trainer crashed ({signal.Signals(-code).name})"
        return f"the trainer ended by itself with exit code {code}; see its last log lines"

    def kill(self) -> None:
        """Kill the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the pipe, which ends a healthy child, and kill one that does not end."""
        with self._send_lock:
            if not self._closed:
                self._closed = True
                os.close(self._runs)
        try:
            self.process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        if self._log:
            self._log.join(timeout=1)
        self._reader.join(timeout=1)


def _out_of_memory_kills() -> int:
    """Processes of this container that the kernel killed for lack of memory (cgroup v2), else 0."""
    try:
        lines = _CGROUP_EVENTS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
