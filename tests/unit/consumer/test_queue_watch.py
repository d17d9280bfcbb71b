"""The waiting time in the queue: bounds from the facts that a worker can see."""

from __future__ import annotations

import datetime
import math

import pytest

from consumer.pages.queue_watch import QueueWatch, age_of
from services.broker.settlement import Queue
from utils.metrics import PREFIX, Metrics


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


@pytest.fixture(name="metrics")
def _metrics() -> Metrics:
    return Metrics()


@pytest.fixture(name="watch")
def _watch(metrics: Metrics, clock: Clock) -> QueueWatch:
    return QueueWatch(metrics, clock=clock)


def shown(metrics: Metrics, name: str) -> dict[str, float]:
    """A metric as a scraper reads it: its values, by queue or by "" if it has no label."""
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"{PREFIX}_{name}"
    }


def age_shown(metrics: Metrics) -> float:
    """The age of the oldest message, as a scraper reads it."""
    return shown(metrics, "queue_oldest_message_age_seconds")[""]


def test_an_empty_queue_has_no_wait(watch: QueueWatch) -> None:
    assert watch.oldest_seconds is None
    watch.looked(Queue.TRAINING, 0, 1)
    assert watch.length == 0
    assert watch.oldest_seconds == 0.0


def test_waiting_messages_came_after_the_queue_was_last_seen_empty(
    watch: QueueWatch, clock: Clock
) -> None:
    watch.looked(Queue.TRAINING, 0, 1)
    clock.now += 40
    watch.looked(Queue.TRAINING, 3, 1)
    clock.now += 10
    assert watch.oldest_seconds == 50


def test_waiting_messages_are_younger_than_the_one_that_was_taken(
    watch: QueueWatch, clock: Clock
) -> None:
    watch.looked(Queue.TRAINING, 5, 1)
    assert watch.oldest_seconds is None, "it may have waited for days"
    watch.took(ago(300))
    assert watch.oldest_seconds == pytest.approx(300, abs=2)
    watch.took(ago(200))
    clock.now += 7
    assert watch.oldest_seconds == pytest.approx(207, abs=2)


def test_other_queues_do_not_change_the_wait(watch: QueueWatch) -> None:
    watch.looked(Queue.DEAD, 0, 0)
    assert (watch.length, watch.oldest_seconds) == (None, None)


def test_without_a_connection_nothing_is_known(watch: QueueWatch) -> None:
    watch.looked(Queue.TRAINING, 0, 1)
    watch.lost_sight()
    assert (watch.length, watch.oldest_seconds) == (None, None)


def test_a_place_is_reported_once_the_time_of_a_job_is_known(watch: QueueWatch) -> None:
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
def test_an_impossible_time_is_ignored(claimed: str | None) -> None:
    assert age_of(claimed) is None


def test_a_time_without_a_zone_is_utc_and_a_clock_may_be_a_little_fast() -> None:
    naive = datetime.datetime.now(datetime.UTC).replace(tzinfo=None).isoformat()
    assert age_of(naive) == pytest.approx(0, abs=5)
    assert age_of(ago(-20)) == 0


# ---- as a scraper reads it -----------------------------------------------------------------------


def test_the_age_of_the_oldest_message_has_no_value_while_nothing_is_known(
    watch: QueueWatch, metrics: Metrics
) -> None:
    assert math.isnan(age_shown(metrics))
    watch.looked(Queue.TRAINING, 5, 1)
    assert math.isnan(age_shown(metrics)), "the messages may have waited for days"


def test_the_age_of_the_oldest_message_is_shown_at_each_scrape(
    watch: QueueWatch, metrics: Metrics, clock: Clock
) -> None:
    watch.looked(Queue.TRAINING, 0, 1)
    assert age_shown(metrics) == 0
    clock.now += 40
    watch.looked(Queue.TRAINING, 1, 1)
    assert age_shown(metrics) == 40
    clock.now += 15
    watch.looked(Queue.DEAD, 1, 0)
    assert age_shown(metrics) == 55
    watch.looked(Queue.TRAINING, 0, 1)
    assert age_shown(metrics) == 0


def test_a_message_that_is_taken_shows_its_wait_and_bounds_the_age_of_the_rest(
    watch: QueueWatch, metrics: Metrics
) -> None:
    watch.looked(Queue.TRAINING, 5, 1)
    watch.took(ago(300))
    assert age_shown(metrics) == pytest.approx(300, abs=2)
    assert shown(metrics, "job_wait_seconds_count") == {"": 1}
    assert shown(metrics, "job_wait_seconds_sum")[""] == pytest.approx(300, abs=2)
    watch.took("yesterday")
    assert shown(metrics, "job_wait_seconds_count") == {"": 1}, "a time that cannot be read"


def test_after_a_lost_connection_lengths_and_age_are_unknown(
    watch: QueueWatch, metrics: Metrics, clock: Clock
) -> None:
    watch.looked(Queue.TRAINING, 0, 2)
    clock.now += 5
    watch.looked(Queue.TRAINING, 4, 2)
    watch.looked(Queue.DEAD, 1, 0)
    assert shown(metrics, "queue_messages") == {"training": 4, "dead": 1}
    assert shown(metrics, "queue_consumers") == {"training": 2, "dead": 0}
    watch.lost_sight()
    assert not shown(metrics, "queue_messages") and not shown(metrics, "queue_consumers")
    assert math.isnan(age_shown(metrics))


def test_the_place_in_line_counts_on_one_worker_if_none_is_seen_and_on_the_newest_jobs(
    watch: QueueWatch,
) -> None:
    watch.looked(Queue.TRAINING, 2, 0)
    watch.finished(1000)
    for _ in range(20):
        watch.finished(100)
    assert watch.place_at_the_end(5) == (3, 205.0)


# ---- several training queues ---------------------------------------------------------------------

LLM = Queue.of_kind("llm")


def test_lengths_are_shown_by_queue_and_summed_over_the_training_queues(
    watch: QueueWatch, metrics: Metrics
) -> None:
    watch.looked(Queue.TRAINING, 2, 1)
    watch.looked(LLM, 3, 1)
    watch.looked(Queue.ENDINGS, 7, 1)
    assert shown(metrics, "queue_messages") == {"training": 2, "llm": 3, "endings": 7}
    assert watch.length == 5


def test_the_oldest_message_of_all_queues_is_shown(
    watch: QueueWatch, metrics: Metrics, clock: Clock
) -> None:
    watch.looked(LLM, 0, 1)
    clock.now += 100
    watch.looked(LLM, 1, 1)
    watch.looked(Queue.TRAINING, 0, 1)
    assert age_shown(metrics) == 100
    watch.took(ago(30), LLM)
    assert age_shown(metrics) == pytest.approx(30, abs=2)


def test_a_queue_may_hold_messages_until_it_was_seen_empty(watch: QueueWatch) -> None:
    watch.looked(Queue.TRAINING, 0, 1)
    assert not watch.may_hold_messages()
    assert watch.may_hold_messages(LLM), "nobody has looked at it"
    watch.looked(LLM, 1, 1)
    assert watch.may_hold_messages(LLM)
    watch.looked(LLM, 0, 1)
    assert not watch.may_hold_messages(LLM)


def test_each_other_queue_counts_at_most_as_many_messages_as_the_own_one(
    watch: QueueWatch,
) -> None:
    watch.looked(Queue.TRAINING, 100, 1)
    watch.looked(LLM, 2, 1)
    watch.finished(100)
    assert watch.place_at_the_end(5, LLM) == (3, 205.0)
    assert watch.place_at_the_end(5) == (101, 5105.0)
    assert watch.place_at_the_end(5, Queue.of_kind("toy")) is None
