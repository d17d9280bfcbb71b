"""Endings, fast: when they are sent, when they return, and how refusals are handled."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import structlog.contextvars
from structlog.testing import capture_logs

from consumer.life.endings import parked, parking_delay
from jobs.addresses import S3Location
from jobs.record import DeliveryState, State
from services.broker.settlement import (
    MIN_LEVEL,
    OWN_COPY,
    PUT_OFF_REASON,
    PUT_OFFS,
    Action,
    Publication,
    Queue,
    Settlement,
)
from services.webhooks.webhook_service import EndingAnswer, EndingOutcome
from tests.memory_s3 import away, works
from tests.unit.consumer.job_world import (
    AWAY,
    FORBIDDEN,
    NOT_FOUND,
    REFUSED,
    ROUTER_404,
    STATE,
    World,
    delivery,
    order,
    parked_body,
    redelivery_of,
)

DELAYS = (60.0, 300.0, 1800.0, 7200.0)


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> World:
    return World(tmp_path / "one")


def only(settlement: Settlement) -> Publication:
    """The one publication of a settlement that acknowledges its delivery."""
    assert settlement.action is Action.ACK
    (publication,) = settlement.publish
    return publication


def answer(outcome: EndingOutcome, retry_after: float | None = None) -> EndingAnswer:
    return EndingAnswer(outcome, retry_after=retry_after, status=503)


@pytest.mark.parametrize(
    ("outcome", "retry_after", "tries", "seconds"),
    [
        (EndingOutcome.RETRY, None, 0, 60.0),
        (EndingOutcome.RETRY, None, 2, 1800.0),
        (EndingOutcome.RETRY, None, 99, 7200.0),
        (EndingOutcome.RETRY, 120.0, 0, 300.0),
        (EndingOutcome.RETRY, 60.0, 0, 60.0),
        (EndingOutcome.RETRY, 30.0, 1, 300.0),
        (EndingOutcome.RETRY, 99_999.0, 0, 7200.0),
        (EndingOutcome.RETRY_SLOWLY, None, 0, 300.0),
        (EndingOutcome.RETRY_SLOWLY, None, 3, 7200.0),
        (EndingOutcome.RETRY_A_FEW, None, 1, 300.0),
    ],
)
def test_a_parked_ending_waits_for_the_first_delay_that_the_backend_asks_for(
    outcome: EndingOutcome, retry_after: float | None, tries: int, seconds: float
) -> None:
    assert parking_delay(DELAYS, tries, answer(outcome, retry_after)) == seconds


def test_an_ending_that_the_backend_cannot_accept_waits_on_the_endings_queue(world: World) -> None:
    world.backend.answers = [dataclasses.replace(AWAY, retry_after=120.0)]
    waiting = only(world.pipeline.handle(delivery()))
    assert (waiting.queue, waiting.delay_seconds) == (Queue.ENDINGS, 300.0)
    record = world.record()
    assert (record.state, record.delivery) == (State.ENDED, DeliveryState.PENDING)
    assert (record.hold.released, record.hold.quiet_seconds) == (True, 300.0)
    assert world.endings.handle(redelivery_of(waiting)) == Settlement.ack()
    first, second = world.backend.endings
    assert first == second  # the same under the same id
    assert world.record().is_settled


def test_the_first_check_comes_after_the_lease_of_a_holder_that_was_killed_just_now(
    world: World,
) -> None:
    kept: list[Publication] = []
    world.trainer.does = lambda *_: kept.append(
        only(world.worker("two").pipeline.handle(delivery()))
    )
    world.pipeline.handle(delivery())
    assert kept[0].delay_seconds == world.settings.limits.lease_ttl_seconds == 120.0


def test_a_dead_letter_has_the_level_that_its_message_needs(world: World) -> None:
    world.backend.answers = [REFUSED]
    world.pipeline.handle(delivery(headers={MIN_LEVEL: 1}))
    bad = order("bad", parameters={"epochs": 0})
    refused = world.pipeline.handle(delivery(bad, headers={MIN_LEVEL: 1})).publish[0]
    (set_aside,) = world.broker.in_queue(Queue.DEAD)
    assert [one.headers[MIN_LEVEL] for one in (set_aside, refused)] == [1, 1]
    assert refused.given_up("too large").cut().headers[MIN_LEVEL] == 1


def test_a_refusal_that_was_put_off_is_reported_once_however_long_that_took(world: World) -> None:
    body = order(parameters={"epochs": 0})
    world.pipeline.handle(delivery(body))
    world.s3.pass_seconds(5000)
    world.pipeline.handle(delivery(body, headers={OWN_COPY: True}))
    assert len(world.backend.endings) == 1


def test_the_jobs_worker_tries_an_ending_for_a_minute_and_any_other_worker_once(
    world: World,
) -> None:
    world.backend.answers = [AWAY, AWAY]
    waiting = only(world.pipeline.handle(delivery()))
    world.endings.handle(redelivery_of(waiting))
    world.pipeline.handle(delivery(redelivered=True))
    assert world.backend.patience == [60.0, 0.0, 0.0]


def test_a_parked_ending_reads_as_the_first_release_writes_it() -> None:
    parking = parked("task-1", order(), tries=2, delay=60.0)
    assert set(parked_body(parking)) == {"task_id", "tries", "message"}
    assert parked_body(parked("task-1", order(), tries=0, delay=None, looks=3))["looks"] == 3


def test_each_check_of_a_live_job_is_counted(world: World) -> None:
    kept: list[Publication] = []

    def run(*_: Any) -> None:
        other = world.worker("two")
        first = only(other.pipeline.handle(delivery()))
        kept.extend([first, only(other.endings.handle(redelivery_of(first)))])

    world.trainer.does = run
    world.pipeline.handle(delivery())
    assert [parked_body(one)["looks"] for one in kept] == [1, 2]


def test_a_duplicate_that_finds_an_undelivered_ending_tries_it_once(world: World) -> None:
    world.backend.answers = [AWAY, NOT_FOUND]
    world.pipeline.handle(delivery())
    again = only(world.pipeline.handle(delivery(redelivered=True)))
    assert (parked_body(again)["tries"], again.delay_seconds) == (1, 60.0)


def test_a_job_that_was_given_back_long_ago_is_published_again_by_a_watched_message(
    world: World,
) -> None:
    kept: list[Publication] = []

    def stopped(*_: Any) -> None:
        kept.append(only(world.worker("two").pipeline.handle(delivery())))
        world.shutdown.request()

    world.trainer.does = stopped
    assert world.pipeline.handle(delivery()) == Settlement.requeue()
    world.s3.pass_seconds(30)
    copy = only(world.worker("three").endings.handle(redelivery_of(kept[0])))
    assert copy.queue is Queue.TRAINING


@pytest.mark.parametrize(
    "body",
    [
        order(type="another_kind"),
        b'{"image_urls": ["s3://stylelicense-media/a.jpg"]}',
        b"no json",
    ],
)
def test_a_message_without_a_valid_style_is_refused_without_a_webhook(
    world: World, body: bytes
) -> None:
    assert only(world.pipeline.handle(delivery(body))).queue is Queue.DEAD
    assert not world.backend.endings
    assert not world.s3.keys(STATE)


def test_a_refusal_that_another_worker_delivers_is_checked_again(world: World) -> None:
    body = order(parameters={"epochs": 0})
    kept: list[Publication] = []

    def meanwhile() -> None:
        world.backend.on_ending = lambda: None
        kept.extend(world.worker("two").pipeline.handle(delivery(body)).publish)

    world.backend.on_ending = meanwhile
    world.pipeline.handle(delivery(body))
    assert len(kept) == 2
    dead, waiting = kept[0], kept[1]
    assert (dead.queue, waiting.queue, waiting.delay_seconds) == (Queue.DEAD, Queue.ENDINGS, 60.0)
    assert parked_body(waiting)["tries"] == 0
    assert world.endings.handle(redelivery_of(waiting)) == Settlement.ack()
    assert len(world.backend.endings) == 1


def test_each_further_try_waits_longer_up_to_the_last_delay(world: World) -> None:
    world.backend.answers = [AWAY] * 7
    waiting = only(world.pipeline.handle(delivery()))
    delays = [waiting.delay_seconds]
    for _ in range(5):
        waiting = only(world.endings.handle(redelivery_of(waiting)))
        delays.append(waiting.delay_seconds)
    assert delays == [60.0, 300.0, 1800.0, 7200.0, 7200.0, 7200.0]


def test_a_backend_that_refuses_the_token_is_tried_more_slowly(world: World) -> None:
    world.backend.answers = [FORBIDDEN]
    assert only(world.pipeline.handle(delivery())).delay_seconds == 300.0


def test_a_404_of_the_backend_itself_is_set_aside_after_the_last_delay(world: World) -> None:
    world.backend.answers = [NOT_FOUND] * 5
    settlement = world.pipeline.handle(delivery())
    tries = 1
    while settlement.publish:
        assert world.record().delivery is DeliveryState.PENDING
        settlement = world.endings.handle(redelivery_of(only(settlement)))
        tries += 1
    assert tries == 5
    assert world.record().delivery is DeliveryState.SET_ASIDE
    assert [one.headers["x-error-code"] for one in world.broker.published] == ["WEBHOOK_REJECTED"]


def test_a_404_that_a_router_may_give_is_never_final(world: World) -> None:
    world.backend.answers = [ROUTER_404] * 20
    settlement = world.pipeline.handle(delivery())
    for _ in range(19):
        settlement = world.endings.handle(redelivery_of(only(settlement)))
    assert only(settlement).delay_seconds == 7200.0
    assert world.record().delivery is DeliveryState.PENDING
    assert not world.broker.in_queue(Queue.DEAD)


def test_a_404_at_the_first_try_is_not_final(world: World) -> None:
    world.backend.answers = [NOT_FOUND]
    assert only(world.pipeline.handle(delivery())).queue is Queue.ENDINGS
    assert world.record().delivery is DeliveryState.PENDING


def test_checks_of_a_live_job_do_not_count_as_tries_of_its_ending(world: World) -> None:
    kept: list[Publication] = []
    world.trainer.does = lambda *_: kept.append(
        only(world.worker("two").pipeline.handle(delivery()))
    )
    world.backend.answers = [NOT_FOUND]
    world.pipeline.handle(delivery())
    watched = parked_body(kept[0]) | {"looks": 9}
    world.backend.answers = [NOT_FOUND]
    again = only(world.endings.handle(delivery(json.dumps(watched).encode(), queue=Queue.ENDINGS)))
    assert parked_body(again)["tries"] == 1
    assert world.record().delivery is DeliveryState.PENDING


def test_an_ending_that_another_worker_delivers_is_not_acknowledged_but_kept(world: World) -> None:
    def dies_before_it_tells() -> None:
        raise KeyboardInterrupt

    world.backend.on_ending = dies_before_it_tells
    with pytest.raises(KeyboardInterrupt):
        world.pipeline.handle(delivery())

    other = world.worker("two")
    kept = only(other.pipeline.handle(delivery(redelivered=True)))
    assert (kept.queue, kept.delay_seconds) == (Queue.ENDINGS, 300.0)  # no less than the lease
    assert not other.backend.endings
    world.s3.pass_seconds(1000.0)
    assert other.endings.handle(redelivery_of(kept)) == Settlement.ack()
    assert len(other.backend.endings) == 1
    assert other.record().is_settled


def test_an_ending_that_is_being_delivered_is_checked_again(world: World) -> None:
    kept: list[Publication] = []

    def while_it_is_told() -> None:
        other = world.worker("two")
        parking = parked("task-1", order(), tries=2, delay=None)
        kept.append(only(other.endings.handle(redelivery_of(parking))))

    world.backend.on_ending = while_it_is_told
    world.pipeline.handle(delivery())
    assert parked_body(kept[0])["tries"] == 2
    assert world.worker("three").endings.handle(redelivery_of(kept[0])) == Settlement.ack()


def test_an_ending_is_released_when_its_lease_is_lost(world: World) -> None:
    world.backend.answers = [AWAY]
    waiting = only(world.pipeline.handle(delivery()))

    def taken_over() -> None:
        body = world.s3.objects[STATE, "jobs/task-1.json"].body
        # Another ETag: another process has written it.
        world.s3.change(STATE, "jobs/task-1.json", body=body + b" ")

    world.backend.on_ending = taken_over
    again = only(world.endings.handle(redelivery_of(waiting)))
    assert parked_body(again) == parked_body(waiting)


def test_a_duplicate_whose_ending_another_worker_takes_over_is_looked_at_again(
    world: World,
) -> None:
    world.backend.answers = [AWAY]
    world.pipeline.handle(delivery())

    def taken_over() -> None:
        body = world.s3.objects[STATE, "jobs/task-1.json"].body
        world.s3.change(STATE, "jobs/task-1.json", body=body + b" ")

    world.backend.on_ending = taken_over
    again = only(world.pipeline.handle(delivery(redelivered=True)))
    assert (again.queue, again.delay_seconds, parked_body(again)["tries"]) == (
        Queue.ENDINGS,
        60.0,
        0,
    )


def test_a_refusal_whose_record_another_worker_takes_over_comes_back_whole(world: World) -> None:
    def taken_over() -> None:
        (key,) = world.s3.keys(STATE, "jobs/invalid/")
        body = world.s3.objects[STATE, key].body
        world.s3.change(STATE, key, body=body + b" ")

    world.backend.on_ending = taken_over
    copy = only(world.pipeline.handle(delivery(order(parameters={"epochs": 0}))))
    assert (copy.queue, copy.headers[PUT_OFF_REASON]) == (Queue.TRAINING, "storage:1")


def test_a_parked_ending_of_a_job_without_a_record_is_done_with(world: World) -> None:
    parking = parked("nobody-knows", b"{}", tries=1, delay=None)
    assert world.endings.handle(redelivery_of(parking)) == Settlement.ack()


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"task_id": 1, "tries": "x"}', b"\xff"])
def test_a_message_that_no_worker_has_parked_goes_to_the_dead_queue(
    world: World, body: bytes
) -> None:
    dead = only(world.endings.handle(delivery(body, queue=Queue.ENDINGS)))
    assert (dead.queue, dead.headers["x-error-code"]) == (Queue.DEAD, "INVALID_MESSAGE")


def test_a_parked_ending_survives_an_outage_of_the_storage(world: World) -> None:
    world.backend.answers = [AWAY]
    waiting = only(world.pipeline.handle(delivery()))
    world.s3.before = away
    again = only(world.endings.handle(redelivery_of(waiting)))
    assert (again.queue, again.body, again.headers[PUT_OFFS]) == (Queue.ENDINGS, waiting.body, 1)
    world.s3.before = works
    assert world.endings.handle(redelivery_of(again)) == Settlement.ack()


def test_a_parked_ending_whose_record_is_damaged_is_given_up_after_five_checks(
    world: World,
) -> None:
    world.s3.write(S3Location(STATE, "jobs/task-1.json"), b"{")
    parking = parked("task-1", order(), tries=1, delay=None)
    message, looks = redelivery_of(parking), 0
    while (copy := only(world.endings.handle(message))).queue is Queue.ENDINGS:
        message = redelivery_of(copy)
        looks += 1
        assert looks < 10
    assert looks == 5
    assert copy.headers["x-task-id"] == "task-1"


def test_the_log_reports_an_ending_as_sent_only_if_it_was_accepted(world: World) -> None:
    world.backend.answers = [AWAY]
    with capture_logs() as lines:
        waiting = only(world.pipeline.handle(delivery()))
        world.endings.handle(redelivery_of(waiting))
    events = [line["event"] for line in lines if line["event"].startswith("ending_")]
    assert events == ["ending_not_accepted", "ending_sent"]


def test_the_log_lines_of_a_parked_ending_carry_the_style(world: World) -> None:
    world.backend.answers = [AWAY]
    waiting = only(world.pipeline.handle(delivery()))
    seen: list[dict[str, Any]] = []

    def look() -> None:
        seen.append(structlog.contextvars.get_contextvars())

    world.backend.on_ending = look
    world.endings.handle(redelivery_of(waiting))
    assert seen == [{"task_id": "task-1", "style_id": 10}]


# ---- messages that can never become a job -------------------------------------------------------


def test_a_refused_message_is_counted_by_its_code(world: World) -> None:
    world.pipeline.handle(delivery(order(parameters={"epochs": 0})))
    assert world.counted("messages_refused_total", code="INVALID_MESSAGE") == 1


def test_a_refused_message_is_reported_once_and_kept_in_the_dead_queue(world: World) -> None:
    body = order(parameters={"epochs": 0})
    dead = only(world.pipeline.handle(delivery(body)))
    assert (dead.queue, dead.body) == (Queue.DEAD, body)
    assert world.pipeline.handle(delivery(body, redelivered=True)).publish == (dead,)
    (ending,) = world.backend.endings
    assert (ending.kind, ending.body["error_code"]) == ("failed", "INVALID_MESSAGE")


def test_a_refusal_that_cannot_be_recorded_is_retried_as_a_whole(world: World) -> None:
    world.s3.before = away
    body = order(parameters={"epochs": 0})
    copy = only(world.pipeline.handle(delivery(body)))
    assert (copy.queue, copy.body, copy.headers) == (
        Queue.TRAINING,
        body,
        {PUT_OFFS: 1, PUT_OFF_REASON: "storage:1"},
    )
    assert not world.broker.published


def test_a_refusal_that_the_backend_cannot_accept_is_parked(world: World) -> None:
    world.backend.answers = [AWAY]
    dead, waiting = world.pipeline.handle(delivery(order(parameters={"epochs": 0}))).publish
    assert (dead.queue, waiting.queue) == (Queue.DEAD, Queue.ENDINGS)
    assert world.endings.handle(redelivery_of(waiting)) == Settlement.ack()
    assert len(world.backend.endings) == 2


def test_a_refusal_that_the_backend_refuses_is_set_aside(world: World) -> None:
    world.backend.answers = [REFUSED]
    world.pipeline.handle(delivery(order(parameters={"epochs": 0})))
    assert [one.headers["x-error-code"] for one in world.broker.published] == ["WEBHOOK_REJECTED"]
