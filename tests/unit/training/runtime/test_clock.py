"""The rate of steps: what an estimate may be built on, and what a run did as a whole."""

from __future__ import annotations

import pytest

from training.runtime import clock as clock_module
from training.runtime.clock import COLD_STEPS, MEASURED_STEPS, Clock


class Time:
    """Moves by hand."""

    def __init__(self) -> None:
        self.now = 500.0

    def monotonic(self) -> float:
        """As of the module `time`."""
        return self.now


@pytest.fixture(name="time")
def _time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(clock_module, "time", time)
    return time


def steps(clock: Clock, time: Time, *seconds: float) -> None:
    """Steps that take so long."""
    for each in seconds:
        time.now += each
        clock.tick()


def test_a_cold_first_step_gives_no_estimate(time: Time) -> None:
    clock = Clock()
    steps(clock, time, 40.0)
    assert clock.warm_steps_per_second is None
    assert clock.steps_per_second == pytest.approx(1 / 40)  # of the run so far, in its report


def test_the_estimate_begins_after_a_few_steps_and_cold_ones_never_count(time: Time) -> None:
    clock = Clock()
    steps(clock, time, *[30.0] * COLD_STEPS)
    for _ in range(MEASURED_STEPS - 1):
        steps(clock, time, 0.5)
        assert clock.warm_steps_per_second is None
    steps(clock, time, 0.5)
    assert clock.warm_steps_per_second == pytest.approx(2.0)


def test_time_that_was_no_training_counts_in_neither_rate(time: Time) -> None:
    clock = Clock()
    steps(clock, time, *[1.0] * 4)
    time.now += 100
    clock.leave_out(100)
    steps(clock, time, *[1.0] * 4)
    assert clock.warm_steps_per_second == pytest.approx(1.0)
    assert clock.steps_per_second == pytest.approx(1.0)
