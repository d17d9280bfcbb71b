"""Three workers, each started again when it ends, as a platform does with its pods."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from config import setting_names
from tests.chaos import journal
from tests.chaos.crash_points import Order
from tests.chaos.timing import IDLE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
RESTART_SECONDS = 0.2
_PROGRAMS = {"worker": "tests.chaos.worker", "api": "tests.chaos.with_api.server"}


@dataclasses.dataclass(frozen=True, slots=True)
class Exit:
    """How a worker process ended; `wanted` are the codes that it may have ended with."""

    who: str
    code: int
    wanted: tuple[int, ...]
    log: Path

    @property
    def last_error(self) -> str:
        """The last error in its log, or else its last line."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if '"level": "error"' in line or "critical" in line]
        return (errors or lines or ["its log is empty"])[-1][:500]


class Diary:
    """The journal's entries about one worker process.

    Args:
        path: The journal.
        who: The process.
    """

    def __init__(self, path: Path, who: str) -> None:
        self._notes = [note for note in journal.read(path) if note["who"] == who]

    def child(self) -> int | None:
        """Process id of its trainer process, while that lives."""
        pids = [note["pid"] for note in self._notes if note["kind"] == "child"]
        if not pids or not Path(f"/proc/{pids[-1]}").exists():
            return None
        return int(pids[-1])

    def is_training(self) -> bool:
        """Whether its trainer process is in the middle of a run."""
        return self._last("run", "epoch", "run_over", "ended") == "epoch"

    def is_idle(self) -> bool:
        """Whether it has begun its work and has no message in hand."""
        return self.child() is not None and not self.is_busy()

    def is_busy(self) -> bool:
        """Whether it has a message in hand."""
        return self._last("handling", "handled") == "handling"

    def claims(self) -> int:
        """How often it has claimed a job."""
        return sum(note["kind"] == "claimed" for note in self._notes)

    def task(self) -> str | None:
        """The task that it has claimed last."""
        tasks = [note["task"] for note in self._notes if note["kind"] == "claimed"]
        return str(tasks[-1]) if tasks else None

    def _last(self, *kinds: str) -> str:
        found = [str(note["kind"]) for note in self._notes if note["kind"] in kinds]
        return found[-1] if found else ""


def claims_of(path: Path, slot: int) -> int:
    """How often the processes of a slot have claimed a job, by the journal."""
    own = f"worker-{slot}-"
    return sum(
        note["kind"] == "claimed" and note["who"].startswith(own) for note in journal.read(path)
    )


class Slot:
    """The place of one worker: its processes, one after the other.

    Args:
        number: Its number, from 0.
        folder: The run's folder.
        settings: The environment of each of its processes.
        extra: More arguments for them.
        once: Each takes one message and ends, as a pod does that is started for a message.
        role: `worker` or `api`.

    Attributes:
        held: While it is set, no further process is started.
        tree: The code's folder of its next process: this code, or that of an older release.
    """

    def __init__(
        self,
        number: int,
        folder: Path,
        settings: Mapping[str, str],
        extra: tuple[str, ...],
        *,
        once: bool = False,
        role: str = "worker",
    ) -> None:
        self.number = number
        self._role = role
        label = str(number) if role == "worker" else f"{role}-{number}"
        self._label = label
        self.tree = ROOT
        self._once = once
        self._is_old = False
        self.starts = 0
        self.exits: list[Exit] = []
        self._folder = folder
        self._order_path = folder / f"crash-{label}.json"
        self._disk_full_path = folder / f"disk-full-{label}"
        self._mid_write_path = folder / f"disk-full-{label}-mid-write"
        self._clock_path = folder / f"clock-{label}"
        self._extra = extra
        self._environment = {
            name: value for name, value in os.environ.items() if name.upper() not in setting_names()
        } | dict(settings)
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted: tuple[int, ...] = ()
        self._closing = threading.Event()
        self.held = threading.Event()
        self._thread = threading.Thread(target=self._keep_running, name=f"slot-{label}")

    @property
    def who(self) -> str:
        """Name of the present process."""
        return f"{self._role}-{self.number}-{self.starts}{'-old' if self._is_old else ''}"

    @property
    def log(self) -> Path:
        """The journal of the present process."""
        return self._folder / f"{self.who}.log"

    @property
    def pid(self) -> int:
        """Process id of the present, or the last, process."""
        assert self._process is not None
        return self._process.pid

    @property
    def diary(self) -> Diary:
        """The journal's entries about its present process."""
        return Diary(self._folder / "journal.jsonl", self.who)

    def is_busy(self) -> bool:
        """Whether its present process has a message in hand."""
        return self.diary.is_busy()

    def is_training(self) -> bool:
        """Whether its present process has a trainer in the middle of a run."""
        return self.diary.is_training()

    def is_stopped(self) -> bool:
        """Whether its process has been stopped by a signal."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return False
        return stat.rpartition(")")[2].split()[0] == "T"

    def start(self) -> None:
        """Start its first process."""
        self._launch()
        self._thread.start()

    def order(self, order: Order) -> None:
        """Order it to die at a named point."""
        if order.act == "kill":
            self.may_end_with(-signal.SIGKILL)
        order.give(self._order_path)

    def has_no_order(self) -> bool:
        """Whether it has died at its named point, or has no such order."""
        return not self._order_path.exists()

    def withdraw_order(self) -> None:
        """Acts that have not happened yet will not happen."""
        self._order_path.unlink(missing_ok=True)

    def disk_full(self, full: bool, *, mid_write: bool = False) -> None:
        """Make its disk full, or free it again.

        Args:
            full: Whether it is.
            mid_write: Half of a file can still be written.
        """
        path = self._mid_write_path if mid_write else self._disk_full_path
        if full:
            self.may_end_with(4)  # a machine that cannot train reports it and ends
            path.touch()
        else:
            path.unlink(missing_ok=True)

    def set_clock(self, offset: float) -> None:
        """Set the error of its wall clock in seconds; 0 is right."""
        if offset:
            self._clock_path.write_text(str(offset), encoding="ascii")
        else:
            self._clock_path.unlink(missing_ok=True)

    def signal(self, number: int, *, with_child: bool = False) -> None:
        """Send a signal to the worker, and to its child if that is asked for."""
        if number == signal.SIGKILL:
            self.may_end_with(-signal.SIGKILL)
        if with_child and (child := self.diary.child()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)

    def stop_child(self) -> None:
        """Stop only the trainer process."""
        if child := self.diary.child():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGSTOP)

    def may_end_with(self, *codes: int) -> None:
        """The next act may end the present process with one of these."""
        self._wanted += codes

    def preempt(self, seconds: float) -> bool:
        """Send SIGTERM, and SIGKILL after this time. Returns whether it ended by itself."""
        self.may_end_with(0)
        if "worker_starting" not in self.log.read_text(encoding="utf-8"):
            self.may_end_with(-signal.SIGTERM)  # Python itself is still starting
        process = self._process
        assert process is not None
        self.signal(signal.SIGTERM)
        try:
            process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            self.may_end_with(-signal.SIGKILL)
            process.kill()
            return False

    def close(self, seconds: float) -> int:
        """End it for good with SIGTERM.

        Returns its exit code; that of SIGKILL after the time limit.
        """
        self._closing.set()
        self.preempt(seconds)
        self._thread.join()
        assert self._process is not None
        return self._process.wait()

    def bury(self) -> None:
        """A trainer process that was stopped when its worker was killed cannot see its pipe end."""
        for note in journal.read(self._folder / "journal.jsonl"):
            if note["kind"] != "child":
                continue
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"--runs-fd" in Path(f"/proc/{note['pid']}/cmdline").read_bytes():
                    os.kill(note["pid"], signal.SIGKILL)

    def vitals(self) -> dict[str, int]:
        """Open files, threads, and memory (KiB) of the present process."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return {
            "files": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": int(fields["Threads"]),
            "memory": int(fields["VmRSS"].split()[0]),
        }

    def _launch(self) -> None:
        self.starts += 1
        self._is_old = self.tree != ROOT
        once = self._once and not self._is_old
        full = self._disk_full_path.exists() or self._mid_write_path.exists()
        self._wanted = (
            *((-signal.SIGKILL,) if self._order_path.exists() else ()),
            *((4,) if full else ()),
            *((0,) if once else ()),
        )
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(  # pylint: disable=consider-using-with
                [
                    *(sys.executable, "-m", _PROGRAMS[self._role], "--folder", str(self._folder)),
                    *("--slot", self._label, "--who", self.who, *self._extra),
                    *(("--once", str(IDLE_SECONDS)) if once else ()),
                ],
                cwd=self._folder,  # without a `.env` in it
                env=self._environment | {"PYTHONPATH": str(self.tree)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _keep_running(self) -> None:
        while True:
            assert self._process is not None
            code = self._process.wait()
            self.exits.append(Exit(self.who, code, self._wanted, self.log))
            while not self._closing.wait(RESTART_SECONDS):
                if not self.held.is_set():
                    break
            if self._closing.is_set():
                return
            self._launch()


class Fleet:
    """All slots; a context manager."""

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots

    def __enter__(self) -> Self:
        for slot in self.slots:
            slot.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for slot in self.slots:
            slot.signal(signal.SIGCONT, with_child=True)
        for slot in self.slots:
            slot.close(0.0)
            slot.bury()

    def stop(self, seconds: float) -> dict[str, int]:
        """End all at once with SIGTERM. Returns exit codes by name."""
        codes: dict[str, int] = {}

        def close(slot: Slot) -> None:
            codes[slot.who] = slot.close(seconds)

        threads = [threading.Thread(target=close, args=(slot,)) for slot in self.slots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return codes


def wait_for(condition: Any, seconds: float, *, every: float = 0.1) -> bool:
    """Whether the condition became true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(every)
    return bool(condition())
