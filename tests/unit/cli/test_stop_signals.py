"""The signals that stop the worker and a local training."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from cli.program import on_stop_signals
on_stop_signals(lambda: print("stopping", flush=True))
print("ready", flush=True)
time.sleep(30)
"""
WITH_DEFAULTS = """
import os, signal, sys
for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def started(*launcher: str) -> subprocess.Popen[str]:
    """The program, once it waits for signals."""
    process = subprocess.Popen(  # pylint: disable=consider-using-with  # the fixture ends it
        [sys.executable, "-ISc", WITH_DEFAULTS, *launcher, sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).resolve().parents[3],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert said(process) == "ready"
    return process


def said(process: subprocess.Popen[str]) -> str:
    """The next line that the process prints."""
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.fixture(name="program")
def _program() -> Iterator[subprocess.Popen[str]]:
    with started() as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_stop_signal_requests_a_stop_and_leaves_time_for_it(
    program: subprocess.Popen[str], number: signal.Signals
) -> None:
    program.send_signal(number)
    assert said(program) == "stopping"
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_request_ends_the_process_at_once(
    program: subprocess.Popen[str], number: signal.Signals
) -> None:
    program.send_signal(signal.SIGHUP)
    assert said(program) == "stopping"
    program.send_signal(number)
    assert program.wait(5) == 128 + number


def test_a_closing_terminal_that_sends_its_signal_twice_does_not_cut_the_stop_short(
    program: subprocess.Popen[str],
) -> None:
    program.send_signal(signal.SIGHUP)
    assert said(program) == "stopping"
    program.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.2)


def test_a_hang_up_that_was_ignored_at_the_start_stays_ignored() -> None:
    with started("nohup") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert said(process) == "stopping"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.kill()
