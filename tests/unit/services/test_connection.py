"""The owner of a connection, turn by turn, on a broker that is a list."""

# pylint: disable=protected-access

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest
from structlog.testing import capture_logs

from services.broker import connection as broker_loop
from services.broker.connection import Lane
from services.broker.outbox import LONGEST_DELAY, MAX_STRIKES, Outbox
from services.broker.settlement import BODY_BYTES, Delivery, Publication, Queue, Settlement
from tests.unit.services.fake_broker import (  # noqa: F401  # pylint: disable=unused-import
    Clock,
    FakeLoop,
    clock_fixture,
    dead,
    hold,
    lane,
    lost,
    release,
    soon,
    subscribe,
    subscription_of,
)
from utils.errors import BrokerError, BrokerRefused, PublicationRefused, Refusal

pytestmark = pytest.mark.usefixtures("clock")


def refused(refusal: Refusal = Refusal.FORM) -> PublicationRefused:
    """The broker does not take it."""
    return PublicationRefused("it is too large", refusal)


# --- settling a delivery


def test_a_delivery_is_acknowledged_only_after_its_publications_are_confirmed() -> None:
    training = lane()
    loop = FakeLoop(training)
    hold(training, Settlement.ack(dead(b"1"), dead(b"2")))
    assert loop.turn() == ["publish 1", "publish 2", "ack 7"]
    assert training.in_hand is None


def test_a_delivery_whose_publication_is_refused_is_not_acknowledged(clock: Clock) -> None:
    training = lane()
    loop = FakeLoop(training)
    loop.broker.refuses = lambda publication: refused() if publication.body == b"1" else None
    hold(training, Settlement.ack(dead(b"1"), dead(b"2")))
    assert loop.turn() == ["publish 1", "publish 2"]
    assert training.in_hand is not None
    loop.broker.refuses = lambda publication: None
    clock.now += 1
    assert loop.turn() == ["publish 1", "ack 7"]


def test_a_settlement_is_published_once_however_often_the_loop_turns() -> None:
    training = lane()
    loop = FakeLoop(training)
    loop.broker.refuses = lambda publication: refused(Refusal.FULL)
    hold(training, Settlement.ack(dead()))
    loop.turn()
    loop.turn()
    assert len(loop._outbox._waiting) == 1


def test_a_delivery_is_returned_if_the_handler_decides_so() -> None:
    training = lane()
    loop = FakeLoop(training)
    hold(training, Settlement.requeue())
    assert loop.turn() == ["requeue 7"]


def test_a_delivery_whose_handler_works_is_not_settled() -> None:
    training = lane()
    loop = FakeLoop(training)
    hold(training)
    assert loop.turn() == []
    assert loop.busy


@pytest.mark.parametrize("gone", ["closed", "another"])
def test_a_tag_of_a_channel_that_is_gone_is_never_acknowledged(gone: str) -> None:
    training = lane()
    loop = FakeLoop(training)
    hold(training, Settlement.ack(dead()))
    if gone == "closed":
        subscription_of(training).close()
    else:
        subscribe(training)
    with capture_logs() as lines:
        assert loop.turn() == ["publish letter"]
    assert training.in_hand is None
    assert [line["event"] for line in lines] == ["acknowledgement_dropped"]


def test_a_settlement_is_published_without_a_channel_too() -> None:
    training = lane()
    loop = FakeLoop(training)
    hold(training, Settlement.ack(dead()))
    training.disconnected()
    assert loop.turn() == ["publish letter"]
    assert training.in_hand is None


def test_each_lane_settles_while_another_has_a_job_in_hand() -> None:
    training, endings = lane(), lane(Queue.ENDINGS)
    loop = FakeLoop(training, endings)
    hold(training)
    hold(endings, Settlement.ack(), tag=9)
    assert loop.turn() == ["ack 9"]
    assert loop.busy and endings.in_hand is None


# --- subscribing


def test_a_lane_without_a_consumer_subscribes_again_after_a_moment(clock: Clock) -> None:
    training = lane()
    loop = FakeLoop(training)
    training.disconnected()
    assert loop.turn() == ["subscribe training"]
    loop.broker.subscriptions[-1].is_consuming = False
    clock.now += broker_loop.RESUBSCRIBE_SECONDS - 0.01
    assert loop.turn() == []
    assert not loop.consuming
    clock.now += 0.01
    assert loop.turn() == ["subscribe training"]


def test_a_broker_that_cancels_each_consumer_is_asked_at_most_once_a_second_or_so() -> None:
    assert 0.5 <= broker_loop.RESUBSCRIBE_SECONDS < 2


def test_the_channel_of_a_cancelled_consumer_is_closed_before_the_next_is_made(
    clock: Clock,
) -> None:
    training = lane()
    loop = FakeLoop(training)
    training.disconnected()
    for _ in range(3):
        loop.turn()
        loop.broker.subscriptions[-1].is_consuming = False
        clock.now += broker_loop.RESUBSCRIBE_SECONDS
    loop.turn()
    assert [one.is_open for one in loop.broker.subscriptions] == [False, False, False, True]


def test_a_lane_with_a_job_in_hand_does_not_subscribe_again() -> None:
    training = lane()
    loop = FakeLoop(training)
    hand = hold(training)
    training.disconnected()
    assert loop.turn() == []
    hand.settlement = Settlement.ack()
    assert loop.turn() == []
    assert loop.turn() == ["subscribe training"]


def test_a_lane_that_consumes_does_not_subscribe_again() -> None:
    loop = FakeLoop(lane())
    assert loop.turn() == []
    assert loop.consuming


def test_consuming_means_the_first_lane() -> None:
    training, endings = lane(), lane(Queue.ENDINGS)
    loop = FakeLoop(training, endings)
    hold(training)
    training.disconnected()
    loop.turn()
    assert not loop.consuming


def test_a_stop_cancels_every_consumer_and_subscribes_to_nothing() -> None:
    training, endings = lane(), lane(Queue.ENDINGS)
    loop = FakeLoop(training, endings)
    loop.stop.set()
    assert loop.turn() == ["unsubscribe training", "unsubscribe endings"]
    training.disconnected()
    assert loop.turn() == []


def test_a_spent_lane_is_cancelled_before_its_last_message_is_acknowledged() -> None:
    training = lane(limit=1)
    loop = FakeLoop(training)
    training._left = 0
    hold(training, Settlement.ack())
    assert loop.turn() == ["unsubscribe training", "ack 7"]
    assert loop.turn() == []


def test_the_queues_are_looked_at_every_few_seconds(clock: Clock) -> None:
    loop = FakeLoop(lane())
    looks = []
    for _ in range(int(4 * broker_loop.LOOK_SECONDS)):
        loop.turn()
        looks += [act for act in loop.broker.acts if act == "look training"]
        clock.now += 0.5
    assert len(looks) == 2


# --- a lane of several queues

LLM = Queue.of_kind("llm")
TOY = Queue.of_kind("toy")


class Jobs:
    """A lane of three queues on a loop that has just connected, whose jobs the test ends."""

    def __init__(self, **waiting: int) -> None:
        self.decide: Callable[[Settlement], None] = lambda settlement: None
        self.lane = Lane((Queue.TRAINING, LLM, TOY), self._start)
        self.loop = FakeLoop(self.lane)
        self.broker = self.loop.broker
        self.broker.waiting = {
            Queue.TRAINING: waiting.get("training", 0),
            LLM: waiting.get("llm", 0),
            TOY: waiting.get("toy", 0),
        }

    def _start(self, _: Delivery, decide: Callable[[Settlement], None]) -> None:
        self.decide = decide

    def deliver(self) -> None:
        """The broker delivers a message of the queue that is consumed."""
        consumer = self.broker.subscriptions[-1]
        assert consumer.is_consuming
        self.broker.waiting[consumer.queue] -= 1
        consumer.deliver(Delivery(b"order", queue=consumer.queue))

    def served(self, jobs: int) -> list[str]:
        """Serve so many jobs; returns their queues."""
        queues = []
        for _ in range(jobs):
            while not self.lane.is_consuming() or self.lane.in_hand:
                self.loop.turn()
            queues.append(str(self.broker.subscriptions[-1].queue))
            self.deliver()
            self.decide(Settlement.ack())
            self.loop.turn()
        return queues


def test_a_lane_consumes_one_queue_at_a_time() -> None:
    jobs = Jobs()
    assert jobs.loop.turn() == ["subscribe training"]
    jobs.loop.turn()
    jobs.loop.turn()
    assert len(jobs.broker.subscriptions) == 1


def test_queues_with_waiting_messages_are_served_in_turn() -> None:
    assert Jobs(training=9, llm=9, toy=9).served(7) == [
        *("training", "llm", "toy"),
        *("training", "llm", "toy", "training"),
    ]


def test_an_empty_queue_takes_no_turn() -> None:
    assert Jobs(training=9, toy=2).served(5) == [
        *("training", "toy", "training", "toy", "training")
    ]


def test_the_consumer_is_cancelled_before_the_acknowledgement_lets_the_broker_send_more() -> None:
    jobs = Jobs(training=2, llm=1)
    jobs.loop.turn()
    jobs.deliver()
    assert jobs.loop.turn() == [], "a worker with a job stays a consumer of its queue"
    jobs.decide(Settlement.ack(dead()))
    assert jobs.loop.turn() == ["publish letter", "unsubscribe training", "ack 7"]
    assert jobs.loop.turn() == ["subscribe llm"]


def test_a_lane_of_one_queue_keeps_its_consumer_from_job_to_job() -> None:
    training = lane()
    loop = FakeLoop(training)
    hold(training, Settlement.ack())
    assert loop.turn() == ["ack 7"]
    assert loop.turn() == []


def test_an_idle_lane_moves_to_a_queue_with_messages_at_the_next_look(clock: Clock) -> None:
    jobs = Jobs()
    jobs.loop.turn()
    jobs.broker.waiting[TOY] = 1
    assert jobs.loop.turn() == []
    clock.now += broker_loop.LOOK_SECONDS
    jobs.loop.turn()
    assert jobs.loop.turn() == ["unsubscribe training", "subscribe toy"]
    assert jobs.loop.turn() == [], "it has arrived"
    clock.now += broker_loop.LOOK_SECONDS
    jobs.broker.waiting[TOY] = 0
    jobs.loop.turn()
    assert jobs.loop.turn() == [], "it rests where it is"


def test_a_message_that_arrives_while_an_idle_lane_moves_is_handled(clock: Clock) -> None:
    jobs = Jobs()
    jobs.loop.turn()
    jobs.broker.waiting[LLM] = 1
    jobs.broker.subscriptions[0].on_its_way = Delivery(b"on its way")
    clock.now += broker_loop.LOOK_SECONDS
    jobs.loop.turn()
    assert jobs.loop.turn() == ["unsubscribe training"]
    assert jobs.lane.in_hand and jobs.lane.in_hand.delivery.body == b"on its way"
    assert jobs.loop.turn() == [], "nothing else is taken while it is in hand"
    jobs.decide(Settlement.ack())
    assert jobs.loop.turn() == ["ack 7"]
    assert jobs.loop.turn() == ["subscribe llm"]


def test_a_queue_that_another_worker_emptied_meanwhile_is_not_moved_to(clock: Clock) -> None:
    jobs = Jobs()
    jobs.loop.turn()
    jobs.broker.waiting[LLM] = 1
    clock.now += broker_loop.LOOK_SECONDS
    jobs.loop.turn()
    jobs.broker.waiting[LLM] = 0
    assert jobs.loop.turn() == ["unsubscribe training", "subscribe training"]


def test_one_training_message_ends_a_worker_of_several_queues_that_may_take_one() -> None:
    jobs = Jobs(training=1, llm=1)
    jobs.lane._left = 1
    jobs.loop.turn()
    jobs.deliver()
    assert jobs.loop.turn() == ["unsubscribe training"]
    jobs.decide(Settlement.ack())
    assert jobs.loop.turn() == ["ack 7"]
    assert jobs.loop.turn() == []
    assert jobs.loop._has_done_its_part(60)


def test_a_stop_in_mid_job_settles_the_job_and_subscribes_to_no_other_queue() -> None:
    jobs = Jobs(training=1, llm=1)
    jobs.loop.turn()
    jobs.deliver()
    jobs.loop.stop.set()
    assert jobs.loop.turn() == ["unsubscribe training"]
    jobs.decide(Settlement.requeue())
    assert jobs.loop.turn() == ["requeue 7"]
    assert jobs.loop._is_over()


def test_a_stop_takes_no_message_that_is_on_its_way() -> None:
    jobs = Jobs()
    jobs.loop.turn()
    jobs.broker.subscriptions[0].on_its_way = Delivery(b"on its way")
    jobs.loop.stop.set()
    jobs.loop.turn()
    assert jobs.lane.in_hand is None


# --- publications that the broker does not accept


def test_a_refused_publication_does_not_block_the_others_and_is_retried_later(
    clock: Clock,
) -> None:
    loop = FakeLoop(lane())
    loop.broker.refuses = lambda publication: refused() if publication.body == b"bad" else None
    bad, good = loop.publish(dead(b"bad")), loop.publish(dead(b"good"))
    assert loop.turn() == ["publish bad", "publish good"]
    assert good.done() and not bad.done()
    assert loop.turn() == []
    clock.now += 0.5
    later = loop.publish(dead(b"later"))
    assert loop.turn() == ["publish later", "publish bad"]
    assert later.done()


def test_a_publication_that_closes_the_connection_does_not_block_the_others_on_the_next_one(
    clock: Clock,
) -> None:
    loop = FakeLoop(lane())
    loop.broker.survives = False
    loop.broker.refuses = lambda publication: refused() if publication.body == b"bad" else None
    loop.publish(dead(b"bad"))
    good = loop.publish(dead(b"good"))
    with pytest.raises(PublicationRefused):
        loop.turn()
    assert loop.broker.acts == ["publish bad"]
    clock.now += 60
    with pytest.raises(PublicationRefused):
        loop.turn()
    assert loop.broker.acts == ["publish good", "publish bad"]
    assert good.done()


def test_a_repeatedly_refused_publication_becomes_a_dead_letter_and_then_a_cut_one(
    clock: Clock,
) -> None:
    loop = FakeLoop(lane())
    tried: list[Publication] = []

    def refuses(publication: Publication) -> PublicationRefused | None:
        tried.append(publication)
        return None if BODY_BYTES in publication.headers else refused()

    loop.broker.refuses = refuses
    large = Publication(Queue.TRAINING, b"x" * 9000, "task", {"x-put-offs": 1}, 5.0)
    promise = loop.publish(large)
    with capture_logs() as lines:
        while not promise.done():
            loop.turn()
            clock.now += LONGEST_DELAY
    assert tried[:MAX_STRIKES] == [large] * MAX_STRIKES
    letters = tried[MAX_STRIKES : 2 * MAX_STRIKES]
    assert {(each.queue, each.body, each.delay_seconds) for each in letters} == {
        (Queue.DEAD, b"x" * 9000, None)
    }
    assert letters[0].headers["x-error-code"] == "PUBLICATION_REFUSED"
    assert "it is too large" in str(letters[0].headers["x-error-message"])
    assert len(tried) == 2 * MAX_STRIKES + 1
    assert tried[-1].headers[BODY_BYTES] == 9000 and len(tried[-1].body) < 9000
    shortened = [line for line in lines if line["event"] == "publication_shortened"]
    assert [(line["task_id"], line["cut"]) for line in shortened] == [
        ("task", False),
        ("task", True),
    ]
    assert {line["log_level"] for line in shortened} == {"error"}


def test_a_publication_that_is_refused_in_its_shortest_form_is_reported_and_still_retried(
    clock: Clock,
) -> None:
    loop = FakeLoop(lane())
    loop.broker.refuses = lambda publication: (
        refused() if publication.message_id == "task" else None
    )
    promise = loop.publish(dead(b"x" * 9000))
    with capture_logs() as lines:
        for _ in range(2 * MAX_STRIKES + 2):
            loop.turn()
            clock.now += LONGEST_DELAY
    other = loop.publish(Publication(Queue.DEAD, b"other", "other"))
    assert loop.turn()[0] == "publish other"
    assert other.done() and not promise.done()
    stuck = [line for line in lines if line["event"] == "publication_stuck"]
    assert {(line["log_level"], line["task_id"]) for line in stuck} == {("error", "task")}
    assert len(stuck) == 3
    assert loop.observer.metrics.publications_stuck._value.get() == 4
    waits = [line["retry_in"] for line in lines if line["event"] == "publication_refused"]
    assert waits[-1] == LONGEST_DELAY


def test_a_message_that_no_queue_accepts_becomes_a_complete_dead_letter(clock: Clock) -> None:
    loop = FakeLoop(lane())
    loop.broker.refuses = lambda publication: (
        refused(Refusal.ROUTE) if publication.queue is Queue.TRAINING else None
    )
    promise = loop.publish(Publication(Queue.TRAINING, b"order", "task"))
    while not promise.done():
        loop.turn()
        clock.now += LONGEST_DELAY
    assert loop.broker.published[0].queue is Queue.DEAD
    assert loop.broker.published[0].body == b"order"


@pytest.mark.parametrize("refusal", [Refusal.FULL, Refusal.UNANSWERED])
def test_a_publication_does_not_change_while_the_broker_is_at_fault(
    clock: Clock, refusal: Refusal
) -> None:
    loop = FakeLoop(lane())
    loop.broker.refuses = lambda publication: refused(refusal)
    order = Publication(Queue.TRAINING, b"order", "task")
    loop.publish(order)
    for _ in range(20):
        loop.turn()
        assert "probe" not in loop.broker.acts
        clock.now += LONGEST_DELAY
    loop.broker.refuses = lambda publication: None
    loop.turn()
    assert loop.broker.published == [order]
    assert loop.observer.metrics.publications_refused.labels(refusal)._value.get() == 20


def test_connections_that_are_lost_over_one_publication_only_are_its_fault(clock: Clock) -> None:
    """The broker takes a probe before it, each time."""
    loop = FakeLoop(lane())
    loop.broker.survives = False
    order = Publication(Queue.TRAINING, b"order", "task")
    loop.broker.refuses = lambda publication: (
        refused(Refusal.LOST) if publication == order else None
    )
    promise = loop.publish(order)
    acts = []
    for _ in range(1 + MAX_STRIKES):
        with pytest.raises(PublicationRefused):
            loop.turn()
        acts += loop.broker.acts
        clock.now += LONGEST_DELAY
    assert acts == ["publish order"] + ["probe", "publish order"] * MAX_STRIKES
    loop.turn()
    assert promise.done()
    assert (
        loop.broker.published[0].queue is Queue.DEAD and loop.broker.published[0].body == b"order"
    )


def test_an_outage_is_not_blamed_on_a_publication(clock: Clock) -> None:
    """If the connection is lost without the publication, the publication is cleared."""
    loop = FakeLoop(lane())
    loop.broker.survives = False
    order = Publication(Queue.TRAINING, b"order", "task")
    loop.broker.refuses = lambda publication: refused(Refusal.LOST)
    loop.publish(order)
    for round_ in range(30):
        with pytest.raises(BrokerError) as caught:
            loop.turn()
        if not isinstance(caught.value, PublicationRefused):
            loop._outbox.acquit()
        clock.now += LONGEST_DELAY
        loop.broker.fails = lambda act, is_down=round_ % 3 == 0: (  # type: ignore[misc]
            lost() if act == "probe" and is_down else None
        )
    loop.broker.refuses, loop.broker.fails = lambda publication: None, lambda act: None
    loop.turn()
    assert loop.broker.published == [order]


def test_the_loop_itself_clears_publications_when_the_connection_fails_without_them(
    clock: Clock,
) -> None:
    loop = FakeLoop(lane())
    loop.publish(dead(b"1"))
    (parcel,) = loop._outbox.due()
    parcel.is_suspect, parcel.strikes, parcel.due = True, 2, float("inf")
    seen: list[int] = []

    def fails(act: str) -> BaseException | None:
        if act != "connect":
            return None
        seen.append(parcel.strikes)
        loop._abandoned.set()
        return lost()

    loop.broker.fails = fails
    loop._serve()
    assert seen == [2] and parcel.strikes == 0
    loop._abandoned.clear()
    parcel.strikes, parcel.due = 1, 0.0

    def refuses(_: Publication) -> BaseException:
        loop._abandoned.set()
        return refused(Refusal.LOST)

    loop.broker.survives, loop.broker.fails, loop.broker.refuses = False, lambda act: None, refuses
    loop._serve()
    assert parcel.strikes == 2
    assert clock.slept == 0


def test_a_refused_publication_is_logged_with_its_task_and_its_delay() -> None:
    loop = FakeLoop(lane())
    loop.broker.refuses = lambda publication: refused(Refusal.FORM)
    loop.publish(dead())
    with capture_logs() as lines:
        loop.turn()
    assert lines == [
        {
            "event": "publication_refused",
            "log_level": "warning",
            "queue": "dead",
            "task_id": "task",
            "refusal": "form",
            "error": "it is too large",
            "retry_in": 0.5,
        }
    ]


def test_a_refusal_of_the_worker_ends_the_turn_and_does_not_block_the_others() -> None:
    loop = FakeLoop(lane())
    loop.broker.refuses = lambda publication: (
        BrokerRefused("no permission") if publication.body == b"bad" else None
    )
    loop.publish(dead(b"bad"))
    with pytest.raises(BrokerRefused):
        loop.turn()
    good = loop.publish(dead(b"good"))
    loop.turn()
    assert good.done()


# --- coming back


def serve(loop: FakeLoop, clock: Clock, connections: int) -> list[float]:
    """Serve until so many connections were tried; answers the pauses before each."""
    pauses: list[float] = []
    last = [clock.monotonic()]

    def tried() -> None:
        pauses.append(round(clock.monotonic() - last[0], 3))
        last[0] = clock.monotonic()
        if len(pauses) == connections:
            loop._abandoned.set()

    former = loop.broker.fails

    def fails(act: str) -> BaseException | None:
        if act == "connect":
            tried()
        return former(act)

    loop.broker.fails = fails
    loop._serve()
    return pauses


def test_the_pause_between_two_attempts_doubles(clock: Clock) -> None:
    loop = FakeLoop(lane())
    loop.broker.fails = lambda act: lost() if act == "connect" else None
    with capture_logs() as lines:
        pauses = serve(loop, clock, 8)
    assert pauses == pytest.approx([0, 0.5, 1, 2, 4, 8, 16, 30], abs=0.06)
    assert [line["retry_in"] for line in lines][:4] == [0.5, 1.0, 2.0, 4.0]
    assert clock.slept > 60


@pytest.mark.parametrize(("lived", "pause"), [(0.0, 4.0), (5.1, 0.5)])
def test_a_connection_that_lived_for_a_while_makes_the_pause_short_again(
    clock: Clock, lived: float, pause: float
) -> None:
    loop = FakeLoop(lane())
    loop.broker.fails = lambda act: lost() if act in ("connect", "events") else None
    if not lived:
        assert serve(loop, clock, 5)[-1] == pytest.approx(pause, abs=0.06)
        return

    def fails(act: str) -> BaseException | None:
        if act == "connect":
            return lost() if loop.broker.acts.count("connect") < 4 else None
        if act == "events":
            clock.now += lived
            return lost()
        return None

    loop.broker.fails = fails
    assert serve(loop, clock, 5)[-1] == pytest.approx(lived + pause, abs=0.06)


def test_connections_after_the_first_are_counted_as_such(clock: Clock) -> None:
    loop = FakeLoop(lane())
    metrics = loop.observer.metrics
    shown: list[tuple[str, float]] = []

    def fails(act: str) -> BaseException | None:
        if act in ("connect", "events"):
            shown.append((act, metrics.broker_connected._value.get()))
        return lost() if act == "events" else None

    loop.broker.fails = fails
    serve(loop, clock, 4)
    assert metrics.broker_reconnects._value.get() == 3
    assert set(shown) == {("connect", 0.0), ("events", 1.0)}
    assert clock.slept > 0


def test_a_refusal_of_the_worker_ends_it_at_once_unless_a_job_is_in_hand(clock: Clock) -> None:
    training = lane()
    loop = FakeLoop(training)
    loop.broker.fails = lambda act: BrokerRefused("login refused") if act == "connect" else None
    hand = hold(training)
    assert len(serve(loop, clock, 3)) == 3
    loop._abandoned.clear()
    hand.settlement = Settlement.ack()
    with pytest.raises(BrokerRefused):
        loop._serve()
    assert clock.slept > 0


def test_a_settlement_that_needs_no_broker_is_done_without_a_connection(
    clock: Clock,
) -> None:
    training = lane()
    loop = FakeLoop(training)
    hand = hold(training, Settlement.ack())
    training.disconnected()
    loop._pause(1.0)
    assert training.in_hand is None and hand.is_settled()
    assert clock.slept == pytest.approx(1.0, abs=0.051)


def test_a_pause_ends_when_nothing_is_left_to_wait_for(clock: Clock) -> None:
    loop = FakeLoop(lane())
    loop.stop.set()
    loop._pause(30.0)
    assert clock.slept == 0


# --- the end


def test_the_owner_stays_until_its_deliveries_are_settled() -> None:
    training = lane()
    loop = FakeLoop(training)
    assert not loop._is_over()
    loop.stop.set()
    assert loop._is_over()
    hold(training)
    assert not loop._is_over()
    release(training)
    loop.publish(dead())
    assert not loop._is_over()
    loop._abandoned.set()
    assert loop._is_over()


def test_turned_within_reports_the_time_since_the_owners_last_turn(clock: Clock) -> None:
    loop = FakeLoop(lane())
    loop.turn()
    clock.now += 5
    assert not loop.turned_within(5.0)
    assert loop.turned_within(5.1)
    loop.turn()
    assert loop.turned_within(0.1)


def test_the_owner_counts_as_turning_while_it_tries_to_connect(clock: Clock) -> None:
    loop = FakeLoop(lane())
    clock.now += 100
    loop.broker.fails = lambda act: lost() if act == "connect" else None
    serve(loop, clock, 2)
    assert loop.turned_within(1.0)


def test_publications_in_a_shared_outbox_are_published() -> None:
    outbox = Outbox()
    loop = FakeLoop(lane(), outbox=outbox)
    promise = outbox.put(dead())
    loop.turn()
    assert promise.done()


def test_a_publication_wakes_the_owner() -> None:
    loop = FakeLoop(lane())
    loop.publish(dead())
    loop.turn()
    assert not loop.broker.woken.is_set()
    loop.publish(dead())
    assert loop.broker.woken.is_set()


# --- one message, then the end


def test_once_ends_when_its_message_is_settled_and_no_lane_has_anything_in_hand() -> None:
    training, endings = lane(limit=1), lane(Queue.ENDINGS)
    loop = FakeLoop(training, endings)
    training._left = 0
    assert loop._has_done_its_part(60)
    hold(training)
    assert not loop._has_done_its_part(60)
    release(training)
    hold(endings)
    assert not loop._has_done_its_part(60), "an ending is being delivered"
    release(endings)
    promise = loop.publish(dead())
    assert not loop._has_done_its_part(60)
    loop.turn()
    assert promise.done() and loop._has_done_its_part(60)


def test_once_ends_after_a_time_in_which_it_could_have_had_a_message(clock: Clock) -> None:
    training, endings = lane(limit=1), lane(Queue.ENDINGS)
    loop = FakeLoop(training, endings)
    loop.turn()
    clock.now += 59
    assert not loop._has_done_its_part(60)
    clock.now += 1
    assert loop._has_done_its_part(60)


@pytest.mark.parametrize("holds_up", ["away", "ending", "outbox"])
def test_once_counts_no_time_in_which_it_could_not_have_had_a_message(
    clock: Clock, holds_up: str
) -> None:
    training, endings = lane(limit=1), lane(Queue.ENDINGS)
    loop = FakeLoop(training, endings)
    loop.turn()
    match holds_up:
        case "away":
            loop.consuming = False
        case "ending":
            hold(endings)
        case _:
            loop.publish(dead())
    clock.now += 100
    assert not loop._has_done_its_part(60)
    release(endings)
    loop.turn()
    clock.now += 59
    assert not loop._has_done_its_part(60)
    clock.now += 1
    assert loop._has_done_its_part(60)


# --- running, by the real clock


class Running:
    """A loop that runs in a thread."""

    def __init__(self, loop: FakeLoop) -> None:
        self.loop = loop
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:  # pylint: disable=broad-exception-caught
            self.errors.append(error)

    def end(self, seconds: float = 5.0) -> None:
        """Stop it, and wait for its end."""
        self.loop.stop.set()
        self.thread.join(seconds)
        assert not self.thread.is_alive()


@pytest.fixture(name="real_time")
def _real_time(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    assert clock
    monkeypatch.setattr(broker_loop, "time", time)
    monkeypatch.setattr("services.broker.outbox.time", time)
    monkeypatch.setattr(broker_loop, "STOP_CHECK_SECONDS", 0.005)


@pytest.mark.usefixtures("real_time")
def test_a_stop_waits_for_the_handler_publishes_answers_and_then_disconnects() -> None:
    go = threading.Event()

    def handle(_: Delivery) -> Settlement:
        assert go.wait(5)
        return Settlement.ack(dead())

    def start(delivery: Delivery, decide: Callable[[Settlement], None]) -> None:
        threading.Thread(target=lambda: decide(handle(delivery))).start()

    loop = FakeLoop(Lane((Queue.TRAINING,), start), stop_seconds=60.0)
    running = Running(loop)
    soon(lambda: loop.consuming)
    loop.broker.on_next_turn(lambda: loop.broker.subscriptions[0].deliver(Delivery(b"order")))
    soon(lambda: loop.busy)
    loop.stop.set()
    soon(lambda: "unsubscribe training" in loop.broker.acts)
    running.thread.join(0.1)
    assert running.thread.is_alive()
    go.set()
    running.end()
    acts = [act for act in loop.broker.acts if not act.startswith("look")]
    assert acts == [
        "connect",
        "subscribe training",
        "unsubscribe training",
        "publish letter",
        "ack 7",
        "disconnect",
    ]
    assert not running.errors
    with pytest.raises(CancelledError):
        loop.publish(dead()).result(0)


@pytest.mark.usefixtures("real_time")
def test_a_handler_that_does_not_return_delays_the_stop_no_longer_than_the_limit() -> None:
    training = lane()
    loop = FakeLoop(training, stop_seconds=0.3)
    hold(training)
    promise = loop.publish(dead())
    loop.broker.refuses = lambda publication: refused(Refusal.FULL)
    running = Running(loop)
    soon(lambda: loop.connected)
    began = time.monotonic()
    with capture_logs() as lines:
        running.end()
    assert 0.25 < time.monotonic() - began < 2
    assert "stopped_with_unsettled_work" in [line["event"] for line in lines]
    soon(promise.cancelled)
    soon(lambda: loop.broker.acts[-1] == "disconnect")


@pytest.mark.usefixtures("real_time")
def test_a_stop_is_quick_and_silent_with_nothing_to_settle_and_no_connection() -> None:
    loop = FakeLoop(lane(), stop_seconds=30.0)
    hangs = threading.Event()

    def fails(act: str) -> BaseException | None:
        if act != "connect":
            return None
        hangs.wait(5)
        return lost()

    loop.broker.fails = fails
    running = Running(loop)
    soon(lambda: "connect" in loop.broker.acts)
    with capture_logs() as lines:
        running.end(1.0)
    hangs.set()
    assert lines == []


@pytest.mark.usefixtures("real_time")
def test_the_owners_error_is_raised_to_the_caller_after_it_has_disconnected() -> None:
    loop = FakeLoop(lane())
    promise = loop.publish(Publication(Queue.DEAD, b"x", "t", {}, 5.0))
    loop.broker.fails = lambda act: BrokerRefused("login refused") if act == "events" else None
    running = Running(loop)
    running.thread.join(5)
    assert [type(error) for error in running.errors] == [BrokerRefused]
    assert loop.broker.acts[-1] == "disconnect"
    assert promise.cancelled()


@pytest.mark.usefixtures("real_time")
def test_once_stops_the_worker_by_itself() -> None:
    loop = FakeLoop(lane(limit=1), idle_seconds=0.05)
    running = Running(loop)
    running.thread.join(5)
    assert loop.stop.is_set() and not running.errors


@pytest.mark.usefixtures("real_time")
@pytest.mark.parametrize("idle_seconds", [None, 60.0])
def test_a_worker_that_may_still_have_a_message_stays(idle_seconds: float | None) -> None:
    running = Running(FakeLoop(lane(limit=1), idle_seconds=idle_seconds))
    running.thread.join(0.15)
    assert running.thread.is_alive()
    running.end()
