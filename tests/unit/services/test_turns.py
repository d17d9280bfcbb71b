"""The turn of a style, fast: publishers of one style take turns, and wait without a hot loop."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from services.records import turns as turns_module
from services.records.turns import Turns
from tests.memory_s3 import MemoryS3
from utils.errors import LeaseLost

KEY = "jobs/style_7.turn"


class Clock:
    """In place of the module `time`; a test chooses what happens meanwhile."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self.monotonic = time.monotonic

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.meanwhile()


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns_module, "time", clock)
    return clock


@pytest.fixture(name="s3")
def _s3() -> MemoryS3:
    return MemoryS3()


def turns(s3: MemoryS3, owner: str = "one") -> Turns:
    return Turns(s3, "state", owner=owner, lease_seconds=60.0)


def fine() -> None:
    """The job is still this worker's."""


def test_a_free_turn_is_taken_at_once_and_given_back(s3: MemoryS3, clock: Clock) -> None:
    with turns(s3).take(KEY, "job-1", fine) as turn:
        assert turn.record.task_id == "job-1" and not turn.record.hold.released
    assert not clock.slept
    left = turns(s3).read(KEY)
    assert left is not None and left.hold.released
    with turns(s3, "two").take(KEY, "job-2", fine) as turn:
        assert (turn.record.hold.claim, turn.record.task_id) == (2, "job-2")
    assert not clock.slept


def test_another_publisher_is_waited_for_with_a_pause_between_two_looks(
    s3: MemoryS3, clock: Clock
) -> None:
    checks: list[int] = []
    publishing = turns(s3).take(KEY, "job-1", fine)
    with publishing:

        def meanwhile() -> None:
            if len(clock.slept) == 5:
                publishing.__exit__(None, None, None)  # pylint: disable=unnecessary-dunder-call

        clock.meanwhile = meanwhile
        before = s3.count("GET")
        with turns(s3, "two").take(KEY, "job-2", lambda: checks.append(1)) as turn:
            assert turn.record.task_id == "job-2"
    assert len(clock.slept) == 5 and all(0.2 <= pause <= 1 for pause in clock.slept)
    assert len(checks) == 6, "its own job is checked before each look"
    assert s3.count("GET") - before <= 7


def test_a_publisher_whose_job_is_lost_waits_no_longer(s3: MemoryS3, clock: Clock) -> None:
    def lost() -> None:
        if clock.slept:
            raise LeaseLost

    with turns(s3).take(KEY, "job-1", fine):
        with pytest.raises(LeaseLost), turns(s3, "two").take(KEY, "job-2", lost):
            raise AssertionError("it has the turn")
    assert len(clock.slept) == 1


def test_of_two_publishers_that_ask_at_once_one_waits(s3: MemoryS3, clock: Clock) -> None:
    slow = MemoryS3(s3.objects)

    def faster(method: str, _bucket: str, _key: str) -> None:
        if method == "PUT" and not clock.slept:
            slow.before = lambda *_: None
            with turns(s3, "two").take(KEY, "job-2", fine):
                pass

    slow.before = faster
    with turns(slow).take(KEY, "job-1", fine) as turn:
        assert (turn.record.task_id, turn.record.hold.claim) == ("job-1", 2)
    assert len(clock.slept) == 1
