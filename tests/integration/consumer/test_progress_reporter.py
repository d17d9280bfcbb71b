"""Progress at intervals, and the end of the reporter."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator

import pytest

from consumer.life.progress_reporter import ProgressReporter
from consumer.life.stop_signal import StopSignal
from jobs.message import parse
from sandbox.backend import Answer, Backend
from tests.integration.consumer.broker import until
from tests.integration.services.webhook_setup import service
from tests.unit.jobs.message_samples import SETTINGS, flat, style_kind
from utils.errors import LeaseLost, Stopped, StopReason, TrainingFailed
from utils.events import Progress, Stage


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as running:
        yield running


def at(epoch: int) -> dict[str, int]:
    """The facts of a style that has reached an epoch of ten."""
    return {"epoch": epoch, "total_epochs": 10}


def reporter(backend: Backend, stop: StopSignal, interval: float = 0.1) -> ProgressReporter:
    job = parse(json.dumps(flat()).encode(), message_id="t", kinds=SETTINGS.kinds())
    counter = itertools.count(1)
    return ProgressReporter(
        style_kind(),
        job,
        service(backend.url),
        next_sequence=lambda: next(counter),
        stop=stop,
        interval_seconds=interval,
    )


def test_the_newest_state_is_reported_at_intervals_and_the_start_of_training_at_once(
    backend: Backend,
) -> None:
    with reporter(backend, StopSignal(), interval=1.0) as reports:
        began = time.monotonic()
        reports.saw(Progress("t", Stage.TRAINING, 0, 100, facts=at(0)))
        reports.saw(Progress("t", Stage.TRAINING, 10, 100, per_second=9.0, facts=at(1)))
        until(lambda: backend.progress("t"))
        assert time.monotonic() - began < 0.9
        reports.saw(Progress("t", Stage.TRAINING, 20, 100, per_second=10.0, facts=at(2)))
        until(lambda: len(backend.progress("t")) == 2)
    told = [each.body["progress"] for each in backend.progress("t")]
    assert told[1]["current_epoch"] == 2 and told[1]["estimated_seconds"] == 8
    assert [each.body["sequence"] for each in backend.progress("t")] == [1, 2]


def test_a_410_cancels_the_job(backend: Backend) -> None:
    backend.answer = lambda request: Answer(410)
    stop = StopSignal()
    with reporter(backend, stop):
        until(lambda: stop.reason is StopReason.CANCELLED)


@pytest.mark.parametrize("error", [Stopped(StopReason.SHUTDOWN), LeaseLost()])
def test_a_backend_that_hangs_does_not_delay_a_shutdown(backend: Backend, error: Stopped) -> None:
    """Every second of the grace period is for saving and returning the job."""
    backend.answer = lambda request: Answer(delay=1.5)
    began = time.monotonic()
    with pytest.raises(Stopped), reporter(backend, StopSignal()):
        time.sleep(0.4)  # the report is being sent, and hangs
        raise error
    assert time.monotonic() - began < 1.2


def test_before_an_ending_the_current_report_is_waited_for(backend: Backend) -> None:
    backend.answer = lambda request: Answer(delay=1.0)
    with pytest.raises(TrainingFailed), reporter(backend, StopSignal()):
        time.sleep(0.4)
        raise TrainingFailed()
    count = len(backend.progress("t"))
    time.sleep(0.5)
    assert len(backend.progress("t")) == count == 1
