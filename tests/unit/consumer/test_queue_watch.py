"""How long one waits in the queue: bounds from what a worker can see, and nothing else."""

from __future__ import annotations

import datetime

import pytest

from consumer.queue_watch import QueueWatch, age_of
from consumer.settlement import Queue
from utils.metrics import Metrics


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ago(seconds: float) -> str:
    """A time as a backend writes it."""
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
    return then.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@pytest.fixture(name="clock")
def _clock() -> Clock:
    return Clock()


@pytest.fixture(name="watch")
def _watch(clock: Clock) -> QueueWatch:
    return QueueWatch(Metrics(), clock=clock)


def test_an_empty_queue_has_no_wait(watch: QueueWatch) -> None:
    assert watch.oldest_seconds is None
    watch.looked(Queue.TRAINING, 0, 1)
    assert watch.length == 0
    assert watch.oldest_seconds == 0.0


def test_what_waits_came_after_the_queue_was_last_seen_empty(
    watch: QueueWatch, clock: Clock
) -> None:
    watch.looked(Queue.TRAINING, 0, 1)
    clock.now += 40
    watch.looked(Queue.TRAINING, 3, 1)
    clock.now += 10
    assert watch.oldest_seconds == 50


def test_what_waits_was_made_after_what_was_taken(watch: QueueWatch, clock: Clock) -> None:
    watch.looked(Queue.TRAINING, 5, 1)
    assert watch.oldest_seconds is None, "it may have waited for days"
    watch.took(ago(300))
    assert watch.oldest_seconds == pytest.approx(300, abs=2)
    watch.took(ago(200))
    clock.now += 7
    assert watch.oldest_seconds == pytest.approx(207, abs=2)


def test_the_other_queues_say_nothing_of_the_wait(watch: QueueWatch) -> None:
    watch.looked(Queue.DEAD, 0, 0)
    assert (watch.length, watch.oldest_seconds) == (None, None)


def test_without_a_connection_nothing_is_known(watch: QueueWatch) -> None:
    watch.looked(Queue.TRAINING, 0, 1)
    watch.lost_sight()
    assert (watch.length, watch.oldest_seconds) == (None, None)


def test_a_place_is_told_once_a_job_s_time_is_known(watch: QueueWatch) -> None:
    watch.looked(Queue.TRAINING, 4, 2)
    assert watch.place_at_the_end(10) is None
    watch.finished(100)
    watch.finished(200)
    # Two workers for the four before it, 150 seconds each.
    assert watch.place_at_the_end(10) == (5, 310.0)


@pytest.mark.parametrize(
    "claimed",
    [None, "", "yesterday", "2026", ago(40 * 86400), ago(-3600), "9999-12-31T23:59:59"],
    ids=["none", "empty", "words", "a year", "too long ago", "to come", "never"],
)
def test_a_time_that_cannot_be_true_is_not_believed(claimed: str | None) -> None:
    assert age_of(claimed) is None


def test_a_time_without_a_zone_is_utc_and_a_clock_may_be_a_little_fast() -> None:
    naive = datetime.datetime.now(datetime.UTC).replace(tzinfo=None).isoformat()
    assert age_of(naive) == pytest.approx(0, abs=5)
    assert age_of(ago(-20)) == 0
