"""The worker as operators start it: `python main.py worker`, configured only by its environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from config import setting_names

ROOT = Path(__file__).resolve().parent.parent
KEPT = frozenset({"HF_HOME", "HF_TOKEN", "CUDA_VISIBLE_DEVICES"})
"""The machine's settings of the model hub and the GPU also apply here."""
_LAUNCHER = """
import ctypes, os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Runs a command with the default SIGHUP, which a process under nohup would pass on as ignored.
Under Linux the command is stopped (PR_SET_PDEATHSIG) if this process is killed."""


class WorkerProcess:
    """A context manager; at the block's end a running worker gets SIGTERM, then SIGKILL.

    Args:
        settings: All of the worker's settings by name. Settings of this process's environment and
            of the project's `.env` do not reach it, except `KEPT`.
        folder: Folder in which the worker runs.
        log: File that receives the worker's output.
        code: Folder of the program; another release's folder runs two releases together.
        launcher: Command that starts the worker, such as `nohup`.
    """

    def __init__(
        self,
        settings: Mapping[str, str],
        *,
        folder: Path,
        log: Path,
        code: Path = ROOT,
        launcher: Sequence[str] = (),
    ) -> None:
        self.log, self.settings = log, settings
        self._command = (*launcher, sys.executable, str(code / "main.py"), "worker")
        self._folder = folder
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if name.upper() not in setting_names() or name in KEPT
        } | dict(settings)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> WorkerProcess:
        self._process = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if self._process else None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process, "the worker was never started"
        return self._process.pid

    def stop(self, seconds: float = 20.0) -> int:
        """Send SIGTERM and wait; after `seconds`, SIGKILL.

        Returns:
            The exit code; 0 after a regular end.
        """
        assert self._process, "the worker was never started"
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()

    def last_words(self, lines: int = 5) -> str:
        """The end of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _start(self) -> subprocess.Popen[bytes]:
        output: IO[bytes]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-ISc", _LAUNCHER, *self._command],
                cwd=self._folder,  # without a `.env` in it
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the demo, which then stops the worker
            )
