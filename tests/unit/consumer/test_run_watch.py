"""Reasons to end a run: no step, no event, no reaction to a stop, or too much time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from consumer.life.stop_signal import StopSignal
from consumer.trainer import run_watch
from consumer.trainer.run_watch import STOP_PATIENCE_SECONDS, RunWatch
from utils.errors import StopReason
from utils.events import CheckpointSaved, Progress, Stage

STALL = 10.0
SILENCE = 120.0
LIMIT = 1000.0


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
    monkeypatch.setattr(run_watch, "time", time)
    return time


@pytest.fixture(name="stop")
def _stop() -> StopSignal:
    return StopSignal()


@pytest.fixture(name="watch")
def _watch(time: Time, stop: StopSignal) -> RunWatch:
    del time
    return make(stop)


def make(
    stop: StopSignal, patience: Callable[[], float] = lambda: STOP_PATIENCE_SECONDS
) -> RunWatch:
    """A watch over a run that begins now."""
    return RunWatch(stop, stall_seconds=STALL, max_seconds=LIMIT, patience=patience)


def progress(step: int, stage: Stage = Stage.TRAINING) -> Progress:
    """A run at this step."""
    return Progress("task-1", stage, step, 100)


def test_steps_keep_a_run_alive_and_their_absence_ends_it(watch: RunWatch, time: Time) -> None:
    for step in range(5):
        watch.saw(progress(step))
        time.now += STALL
        assert watch.judge() is None
    time.now += 0.1
    assert "made no step for 10 seconds" in str(watch.judge())


def test_reporting_the_same_step_again_is_no_progress(watch: RunWatch, time: Time) -> None:
    watch.saw(progress(1))
    watch.saw(progress(2))
    for _ in range(4):
        time.now += STALL / 2
        watch.saw(progress(2))
        watch.saw(CheckpointSaved("task-1", "epoch-0001", 1, 2, "/x", 0.1))
    assert "made no step" in str(watch.judge())


def test_the_first_step_may_take_as_long_as_compiling_does(watch: RunWatch, time: Time) -> None:
    watch.saw(progress(0))
    time.now += SILENCE
    assert watch.judge() is None
    time.now += 0.1
    assert "sent no event for 120 seconds" in str(watch.judge())


def test_the_clock_of_steps_stops_between_training_phases(watch: RunWatch, time: Time) -> None:
    watch.saw(progress(1))
    watch.saw(progress(2))
    watch.saw(progress(2, Stage.EXPORTING))
    time.now += 5 * STALL
    assert watch.judge() is None
    watch.saw(progress(3))  # training that starts over
    time.now += 5 * STALL
    assert watch.judge() is None


def test_a_run_that_takes_too_long_is_asked_to_stop_and_is_not_killed(
    watch: RunWatch, time: Time, stop: StopSignal
) -> None:
    time.now += LIMIT
    watch.saw(progress(1))
    assert watch.judge() is None and stop.reason is None
    time.now += 0.1
    assert watch.judge() is None and stop.reason is StopReason.TIME_LIMIT


def test_a_stop_has_a_time_to_be_obeyed(watch: RunWatch, time: Time, stop: StopSignal) -> None:
    stop.request(StopReason.CANCELLED)
    assert watch.judge() is None
    time.now += STOP_PATIENCE_SECONDS
    assert watch.judge() is None
    time.now += 0.1
    assert "had not obeyed a stop" in str(watch.judge())


def test_a_stop_s_time_counts_from_the_stop_and_not_from_the_run(
    watch: RunWatch, time: Time, stop: StopSignal
) -> None:
    for _ in range(100):
        time.now += STALL / 2
        watch.saw(progress(0, Stage.PREPARING))
        assert watch.judge() is None
    stop.request(StopReason.SHUTDOWN)
    assert watch.judge() is None
    time.now += STOP_PATIENCE_SECONDS / 2
    assert watch.judge() is None


def test_a_shutdown_without_time_left_waits_for_nothing(time: Time, stop: StopSignal) -> None:
    del time
    left = [5.0]
    watch = make(stop, patience=lambda: left[0])
    stop.request(StopReason.SHUTDOWN)
    assert watch.judge() is None
    left[0] = 0.0
    assert "had not obeyed a stop" in str(watch.judge())


def test_the_time_for_a_stop_does_not_matter_without_a_stop(time: Time, stop: StopSignal) -> None:
    del time
    assert make(stop, patience=lambda: 0.0).judge() is None
