"""Child processes that end with this process, even if it is killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HOST = "127.0.0.1"
_LAUNCHER = """
import ctypes, os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Runs a command without blocked signals. Under Linux the command gets SIGTERM when the thread that
started it ends (PR_SET_PDEATHSIG)."""


def inherited() -> dict[str, str]:
    """The environment of this process, for a child."""
    return dict(os.environ)


def free_ports(count: int) -> list[int]:
    """Free ports below the range that outgoing connections take theirs from.

    A server finds its port free after a restart too.
    """
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(range(20000, 32000))
        if is_free(port):
            found = list(dict.fromkeys([*found, port]))
    return found


def is_free(port: int) -> bool:
    """Whether a server can listen on the port of the loopback address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


class ChildProcess:
    """One program as a child process with a log file. Start it from a thread that stays.

    Args:
        name: A name for people.
        command: The program and its arguments.
        environment: Its whole environment.
        folder: Its working folder.
        log: Receives its output, appended.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        log: Path,
    ) -> None:
        self.name = name
        self.log = log
        self._command = tuple(command)
        self._environment = dict(environment)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while the program runs, and before it was started."""
        return self._process.poll() if self._process else None

    @property
    def pid(self) -> int | None:
        """The process id; None before it was started."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the program."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(  # pylint: disable=consider-using-with
                [sys.executable, "-ISc", _LAUNCHER, *self._command],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process, which stops the child
            )

    def stop(self, seconds: float) -> int | None:
        """Send SIGTERM and wait; after `seconds`, SIGKILL. Returns the exit code."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        self.kill()
        return self._process.wait()

    def kill(self) -> None:
        """Send SIGKILL to the program and to the processes of its session."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def last_words(self, lines: int = 5) -> str:
        """The end of its log."""
        if not self.log.exists():
            return ""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])
