"""Reports of progress, fast: their content, their times, and their end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from consumer.life.progress_reporter import ProgressReporter, queued
from consumer.life.stop_signal import StopSignal
from services.webhooks.webhook_service import ProgressAnswer, WebhookService
from tests.unit.jobs.message_samples import envelope, read, style_kind
from utils.errors import LeaseLost, Stopped, StopReason, TrainingFailed
from utils.events import Progress, Stage

JOB = read(envelope(parameters={"epochs": 10}))
LONG = 60.0
HANG_SECONDS = 10.0


class Backend:
    """Stands in for `WebhookService`: keeps the requests, and answers when the test allows it."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answer = ProgressAnswer.DONE
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.came = threading.Semaphore(0)

    def origin_for(self, requested: str | None) -> str:
        """As of the real one."""
        return requested or "https://api.stylelicense.com"

    def send_progress(self, origin: str, body: dict[str, Any]) -> ProgressAnswer:
        """As of the real one."""
        del origin
        self.bodies.append(body)
        self.came.release()
        self.may_answer.wait(HANG_SECONDS)
        return self.answer

    def wait(self) -> dict[str, Any]:
        """The next report."""
        assert self.came.acquire(timeout=10)  # pylint: disable=consider-using-with
        return cast(dict[str, Any], self.bodies[-1]["progress"])


@pytest.fixture(name="backend")
def _backend() -> Iterator[Backend]:
    backend = Backend()
    yield backend
    backend.may_answer.set()


def reporter(
    backend: Backend, stop: StopSignal | None = None, interval: float = LONG
) -> ProgressReporter:
    """Reports a job to the backend."""
    counter = itertools.count(1)
    return ProgressReporter(
        style_kind(),
        JOB,
        cast(WebhookService, backend),
        next_sequence=lambda: next(counter),
        stop=stop or StopSignal(),
        interval_seconds=interval,
    )


def training(step: int, rate: float | None = None) -> Progress:
    """A run at this step of 100."""
    return Progress(
        "t-1",
        Stage.TRAINING,
        step,
        100,
        per_second=rate,
        facts={"epoch": step // 10, "total_epochs": 10},
    )


def test_the_start_of_training_is_reported_at_once_and_the_next_step_is_not(
    backend: Backend,
) -> None:
    with reporter(backend) as reports:
        reports.saw(Progress("t-1", Stage.PREPARING, 0, 0, facts={"epoch": 0, "total_epochs": 10}))
        assert not backend.bodies
        reports.saw(training(0))
        assert backend.wait()["stage"] == "training"
        reports.saw(training(1, 2.0))
        time.sleep(0.05)
        assert len(backend.bodies) == 1


def test_only_the_newest_state_is_sent_and_none_waits_behind_another(backend: Backend) -> None:
    backend.may_answer.clear()
    with reporter(backend, interval=0.01) as reports:
        reports.saw(training(0))
        backend.wait()
        for step in range(1, 50):
            reports.saw(training(step, 2.0))
        backend.may_answer.set()
        assert backend.wait()["current_epoch"] == 4
    assert [body["sequence"] for body in backend.bodies] == list(range(1, len(backend.bodies) + 1))


def test_every_number_of_a_report_is_an_integer(backend: Backend) -> None:
    with reporter(backend) as reports:
        reports.saw(training(33, 0.7))
        progress = backend.wait()
    assert {name: type(value) for name, value in progress.items() if name != "stage"} == {
        "current_epoch": int,
        "total_epochs": int,
        "progress_percent": int,
        "estimated_seconds": int,
    }
    assert progress["estimated_seconds"] == 96 and progress["progress_percent"] == 33


def test_there_is_no_estimate_before_there_is_a_rate(backend: Backend) -> None:
    with reporter(backend) as reports:
        reports.saw(training(1))
        assert backend.wait()["estimated_seconds"] == 0


def test_training_that_starts_over_is_estimated_by_the_rate_before_until_it_has_its_own(
    backend: Backend,
) -> None:
    with reporter(backend, interval=0.01) as reports:
        seen: Callable[[], int] = lambda: cast(int, backend.wait()["estimated_seconds"])
        reports.saw(training(50, 10.0))
        until(lambda: seen() == 5)
        reports.saw(training(20))
        until(lambda: seen() == 8)
        reports.saw(training(20, 1.0))
        until(lambda: seen() == 80)


def test_a_backend_that_no_longer_wants_the_job_cancels_it(backend: Backend) -> None:
    backend.answer = ProgressAnswer.CANCEL
    stop = StopSignal()
    with reporter(backend, stop) as reports:
        reports.saw(training(0))
        assert stop.wait(10)
    assert stop.reason is StopReason.CANCELLED


def test_a_backend_can_pause_the_job(backend: Backend) -> None:
    backend.answer = ProgressAnswer.PAUSE
    stop = StopSignal()
    with reporter(backend, stop) as reports:
        reports.saw(training(0))
        assert stop.wait(10)
    assert stop.reason is StopReason.PAUSED


@pytest.mark.parametrize(
    "answer",
    [one for one in ProgressAnswer if one not in (ProgressAnswer.CANCEL, ProgressAnswer.PAUSE)],
)
def test_no_other_answer_stops_the_job(backend: Backend, answer: ProgressAnswer) -> None:
    backend.answer = answer
    stop = StopSignal()
    with reporter(backend, stop, interval=0.01) as reports:
        reports.saw(training(0))
        for _ in range(30):
            backend.wait()
    assert stop.reason is None


def test_an_ending_waits_for_the_report_in_hand_and_none_follows_it(backend: Backend) -> None:
    backend.may_answer.clear()
    closed = threading.Event()

    def end() -> None:
        with pytest.raises(TrainingFailed), reporter(backend, interval=0.01) as reports:
            reports.saw(training(0))
            backend.wait()
            raise TrainingFailed()
        closed.set()

    ending = threading.Thread(target=end)
    ending.start()
    assert not closed.wait(0.1)
    backend.may_answer.set()
    assert closed.wait(10)
    ending.join()
    sent = len(backend.bodies)
    time.sleep(0.05)
    assert len(backend.bodies) == sent


@pytest.mark.parametrize("error", [Stopped(StopReason.SHUTDOWN), LeaseLost()])
def test_without_a_following_ending_a_report_that_hangs_is_not_waited_for(
    backend: Backend, error: Stopped
) -> None:
    backend.may_answer.clear()
    with pytest.raises(Stopped), reporter(backend) as reports:
        reports.saw(training(0))
        backend.wait()
        began = time.monotonic()
        raise error
    assert time.monotonic() - began < HANG_SECONDS / 2


def test_a_job_that_waits_for_another_attempt_reports_its_place_and_time() -> None:
    report = queued(style_kind(), JOB, training(20, 2.0), 3, 12.6, sequence=7)
    assert report["sequence"] == 7 and report["style_id"] == 10
    assert report["progress"] == {
        "current_epoch": 2,
        "total_epochs": 10,
        "progress_percent": 20,
        "estimated_seconds": 13,
        "stage": "queued",
        "queue_position": 3,
    }


def test_a_waiting_job_that_was_not_trained_yet_reports_no_progress() -> None:
    progress = queued(style_kind(), JOB, None, 1, 0.0, sequence=1)["progress"]
    assert (progress["current_epoch"], progress["total_epochs"]) == (0, 10)


def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    for _ in range(1000):
        if condition():
            return
    pytest.fail("it did not come true")
