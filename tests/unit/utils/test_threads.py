"""Calls at an interval, and one call per item in several threads."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable

import pytest

from utils.threads import Every, in_parallel

job: contextvars.ContextVar[str] = contextvars.ContextVar("job", default="none")


def soon(true: Callable[[], bool]) -> bool:
    """Whether something becomes true within seconds."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def test_results_keep_the_order_of_the_items() -> None:
    def slower_first(number: int) -> int:
        time.sleep(0.02 * (3 - number))
        return number * 10

    assert in_parallel(slower_first, range(4), at_once=4, name="t") == [0, 10, 20, 30]
    assert not in_parallel(slower_first, (), at_once=4, name="t")


def test_the_first_error_is_raised_and_nothing_new_begins() -> None:
    begun: list[int] = []

    def fails(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise ValueError("one")
        time.sleep(0.1)

    with pytest.raises(ValueError, match="one"):
        in_parallel(fails, range(50), at_once=2, name="t")
    assert len(begun) < 10


def test_threads_have_the_context_of_their_caller() -> None:
    seen: list[str] = []
    token = job.set("t-1")
    try:
        assert in_parallel(lambda _: job.get(), range(2), at_once=2, name="t") == ["t-1", "t-1"]
        with Every(60, lambda: seen.append(job.get()), name="t"):
            assert soon(lambda: bool(seen))
    finally:
        job.reset(token)
    assert seen == ["t-1"]


def test_calls_come_at_the_interval_until_the_block_ends() -> None:
    calls: list[float] = []
    with Every(0.01, lambda: calls.append(time.monotonic()), name="t"):
        assert soon(lambda: len(calls) >= 3)
    count = len(calls)
    time.sleep(0.05)
    assert len(calls) == count


def test_the_first_call_can_wait_for_the_interval_and_can_be_hurried() -> None:
    calls: list[int] = []
    with Every(60, lambda: calls.append(1), name="t", at_once=False) as every:
        time.sleep(0.05)
        assert not calls
        every.hurry()
        assert soon(lambda: bool(calls))
    assert calls == [1]


def test_an_error_is_logged_and_the_next_call_comes(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def fails_once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("gone")

    with Every(0.01, fails_once, name="watcher"):
        assert soon(lambda: len(calls) >= 3)
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert (record.msg, vars(record)["loop"]) == ("periodic_call_failed", "watcher")


def test_a_stop_waits_for_the_running_call_only_as_long_as_its_limit() -> None:
    begun, over = threading.Event(), threading.Event()

    def hangs() -> None:
        begun.set()
        over.wait(10)

    every = Every(60, hangs, name="t")
    every.start()
    assert begun.wait(10)
    began = time.monotonic()
    every.stop(join_seconds=0)
    assert time.monotonic() - began < 5
    over.set()
    every.stop()


def test_a_call_can_stop_its_own_thread() -> None:
    calls: list[int] = []

    def once() -> None:
        calls.append(1)
        every.stop()

    every = Every(0.01, once, name="t")
    every.start()
    assert soon(lambda: bool(calls))
    time.sleep(0.05)
    assert calls == [1]
