"""A connection in use, fast: what is declared, published and consumed on a fake of pika's."""

# The names are pika's own; the client needs private ones.
# pylint: disable=missing-class-docstring,protected-access

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import pika
import pytest
from pika import exceptions

from services.broker import client
from services.broker.client import NO_ROUTE, Link, Subscription, connect, refusal_of
from services.broker.settlement import Action, Delivery, Publication, Queue
from tests.unit.jobs.message_samples import make_settings
from utils.errors import BrokerError, BrokerRefused, PublicationRefused, Refusal

LLM = Queue.of_kind("llm")
SETTINGS = make_settings(rabbitmq_host="one,two", rabbitmq_user="worker").broker
NAME = SETTINGS.training_queue


class Channel:
    """A channel that notes its acts on its connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.is_open = True
        self._impl = self
        self._consumers: dict[str, Callable[..., None]] = {}
        self._consumer_infos: dict[str, None] = {}
        self._cancelled: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False

    def queue_declare(self, name: str, *, passive: bool = False, **how: Any) -> Any:
        kind = "look" if passive else "declare"
        self._act(f"{kind} {name.removeprefix(NAME)}")
        self._connection.arguments[name] = how.get("arguments")
        return self._connection.found

    def confirm_delivery(self) -> None:
        self._act("confirm")

    def basic_publish(
        self,
        exchange: str,
        name: str,
        body: bytes,
        properties: pika.BasicProperties,
        *,
        mandatory: bool,
    ) -> None:
        assert exchange == "" and mandatory
        self._act(f"publish {name.removeprefix(NAME)}")
        self._connection.sent.append((body, properties))

    def basic_qos(self, *, prefetch_count: int) -> None:
        self._act(f"prefetch {prefetch_count}")

    def basic_consume(self, name: str, on_message: Callable[..., None]) -> None:
        self._act(f"consume {name.removeprefix(NAME)}")
        self._consumers["tag"] = on_message
        self._consumer_infos["tag"] = None

    @property
    def consumer_tags(self) -> list[str]:
        return list(self._consumer_infos)

    def basic_cancel(self, tag: str, callback: object) -> None:
        assert callback
        self._act(f"cancel {tag}")
        self._cancelled.add(tag)
        self._connection.cancelling = [self]

    def basic_ack(self, tag: int) -> None:
        self._act(f"ack {tag}")

    def basic_reject(self, tag: int, *, requeue: bool) -> None:
        self._act(f"return {tag}" if requeue else f"drop {tag}")

    def close(self) -> None:
        self._act("close")
        self.is_open = False

    def _act(self, act: str) -> None:
        self._connection.acts.append(act)
        if error := self._connection.fails(act):
            self.is_open = False
            raise error


class Connection:
    """Stands in for pika's blocking connection.

    Attributes:
        acts: The requests to the broker, in order.
        fails: The error of an act; None for none.
    """

    def __init__(self) -> None:
        self.acts: list[str] = []
        self.sent: list[tuple[bytes, pika.BasicProperties]] = []
        self.arguments: dict[str, Any] = {}
        self.channels: list[Channel] = []
        self.fails: Callable[[str], Exception | None] = lambda act: None
        self.is_open = True
        self.is_closed = False
        self._impl = self
        self.ioloop = self
        self.method = self
        self.message_count, self.consumer_count = 3, 2
        self.cancelling: list[Channel] = []
        self.turns: list[float] = []
        self.on_turn: Callable[[], None] = lambda: None
        self.woken = 0

    @property
    def found(self) -> Connection:
        """The answer to a declaration."""
        return self

    def channel(self) -> Channel:
        self.channels.append(Channel(self))
        return self.channels[-1]

    def add_on_connection_blocked_callback(self, _: object) -> None: ...

    add_on_connection_unblocked_callback = add_on_connection_blocked_callback

    def process_data_events(self, *, time_limit: float) -> None:
        """The broker acknowledges a cancellation in the third turn after it."""
        self.turns.append(time_limit)
        self.on_turn()
        assert len(self.turns) < 50, "a hot loop"
        if len(self.turns) >= 3:
            for channel in self.cancelling:
                channel._consumers.clear()

    def close(self) -> None:
        self.acts.append("disconnect")
        self.is_open = False

    def add_callback_threadsafe(self, callback: Callable[[], None]) -> None:
        if not self.is_open:
            raise exceptions.ConnectionWrongStateError
        callback()
        self.woken += 1

    def call_later(self, *_: object) -> int:
        return 1

    def remove_timeout(self, _: object) -> None: ...


def closed(code: int, text: str = "") -> Exception:
    """The broker closes the channel."""
    return exceptions.ChannelClosedByBroker(code, text)


@pytest.fixture(name="broker")
def _broker(monkeypatch: pytest.MonkeyPatch) -> Connection:
    broker = Connection()
    monkeypatch.setattr(pika, "BlockingConnection", lambda *_, **__: broker)
    return broker


@pytest.fixture(name="link")
def _link(broker: Connection) -> Link:
    link = Link(SETTINGS, training_queues=(Queue.TRAINING, LLM), delays=(10.0, 60.0))
    assert cast(Any, link.connection) is broker
    return link


def test_the_hosts_are_tried_with_the_login_of_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[pika.ConnectionParameters] = []
    broker = Connection()

    def made(parameters: list[pika.ConnectionParameters], **_: Any) -> Connection:
        tried.extend(parameters)
        return broker

    monkeypatch.setattr(pika, "BlockingConnection", made)
    assert cast(Any, connect(SETTINGS)) is broker
    assert {one.host for one in tried} == {"one", "two"}
    assert {cast(Any, one.credentials).username for one in tried} == {"worker"}


def test_all_queues_and_the_delay_queues_of_the_training_queues_are_declared_at_the_start(
    broker: Connection, link: Link
) -> None:
    broker.fails = lambda act: closed(406, "none") if act == "declare " else None
    link.declare()
    # The backend's queues are looked at, and a refused declaration shows the type of the first.
    begin = ["look ", "declare ", "look .llm", "declare .endings", "declare .dead"]
    delays = [f"declare {name}.delay.{ms}" for name in ("", ".llm") for ms in (10000, 60000)]
    assert broker.acts == begin + delays
    assert broker.arguments[f"{NAME}.delay.10000"]["x-dead-letter-routing-key"] == NAME
    assert broker.arguments[f"{NAME}.llm.delay.60000"]["x-message-ttl"] == 60000


def test_a_message_is_published_persistent_and_confirmed_under_its_tasks_id(
    broker: Connection, link: Link
) -> None:
    link.publish(Publication(Queue.DEAD, b"letter", "task-1", {"x-attempts": 3}))
    link.publish(Publication(Queue.DEAD, b"letter", "task-2"))
    assert broker.acts == ["declare .dead", "confirm", "publish .dead", "publish .dead"]
    body, properties = broker.sent[0]
    assert (body, properties.message_id, properties.delivery_mode) == (b"letter", "task-1", 2)
    assert properties.headers == {"x-attempts": 3}


def test_the_queue_behind_a_delay_is_declared_before_each_delayed_message(
    broker: Connection, link: Link
) -> None:
    for _ in range(2):
        link.publish(Publication(Queue.ENDINGS, b"x", "task-1", delay_seconds=60.0))
    sent = ["declare .endings", "publish .endings.delay.60000"]
    assert broker.acts == [sent[0], "declare .endings.delay.60000", "confirm", sent[1], *sent]


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (exceptions.UnroutableError([]), Refusal.ROUTE),
        (exceptions.NackError([]), Refusal.FULL),
        (client.AnswerOverdue("no answer"), Refusal.UNANSWERED),
        (closed(406, "message too large"), Refusal.FORM),
        (closed(404, "no queue"), Refusal.LOST),
        (exceptions.ConnectionClosedByBroker(501, "frame error"), Refusal.FORM),
        (exceptions.StreamLostError("reset"), Refusal.LOST),
        (exceptions.ShortStringTooLong("name"), Refusal.FORM),
    ],
)
def test_a_refused_message_has_its_reason_and_its_queue_is_declared_again(
    broker: Connection, link: Link, error: Exception, refusal: Refusal
) -> None:
    broker.fails = lambda act: error if act.startswith("publish") else None
    with pytest.raises(PublicationRefused) as caught:
        link.publish(Publication(Queue.DEAD, b"letter"))
    assert caught.value.refusal is refusal
    broker.fails = lambda act: None
    broker.acts.clear()
    link.publish(Publication(Queue.DEAD, b"letter"))
    assert broker.acts[0] == "declare .dead" and broker.acts[-1] == "publish .dead"


def test_a_refusal_of_the_user_is_no_refusal_of_the_message(broker: Connection, link: Link) -> None:
    refused = closed(403, "ACCESS_REFUSED - write access refused for user 'worker'")
    broker.fails = lambda act: refused if act.startswith("publish") else None
    with pytest.raises(BrokerRefused, match="'worker' lacks a permission"):
        link.publish(Publication(Queue.DEAD, b"letter"))


@pytest.mark.parametrize(
    ("error", "works"),
    [(exceptions.UnroutableError([]), True), (None, True), (exceptions.NackError([]), False)],
)
def test_a_broker_takes_messages_if_it_answers_one_that_no_queue_takes(
    broker: Connection, link: Link, error: Exception | None, works: bool
) -> None:
    broker.fails = lambda act: error if act == "publish .nowhere" else None
    if works:
        link.probe()
    else:
        with pytest.raises(BrokerError, match="accepts no message from publishers"):
            link.probe()
    assert "publish .nowhere" in broker.acts


def test_a_queue_is_looked_for_again_before_it_is_consumed_one_message_at_a_time(
    broker: Connection, link: Link
) -> None:
    arrived: list[tuple[Delivery, int]] = []
    link.publish(Publication(LLM, b"x"))
    broker.acts.clear()
    subscription = link.subscribe(LLM, lambda _, delivery, tag: arrived.append((delivery, tag)))
    assert broker.acts == ["look .llm", "prefetch 1", "consume .llm"]
    assert subscription.queue is LLM and subscription.is_consuming
    method = pika.spec.Basic.Deliver(delivery_tag=5, redelivered=True)
    properties = pika.BasicProperties(message_id="task-1", headers={"a": 1})
    broker.channels[-1]._consumers["tag"](None, method, properties, b"order")
    expected = Delivery(b"order", "task-1", redelivered=True, headers={"a": 1}, queue=LLM)
    assert arrived == [(expected, 5)]
    broker.channels[-1]._consumer_infos.clear()
    assert not subscription.is_consuming, "the broker has cancelled it"


def test_a_look_reports_the_lengths_and_declares_a_training_queue_that_is_gone(
    broker: Connection, link: Link
) -> None:
    assert link.look(Queue.DEAD) == link.look(Queue.DEAD) == (3, 2)
    assert len(broker.channels) == 1, "looks share a channel"
    broker.fails = lambda act: closed(404, "no queue") if act.startswith("look") else None
    broker.acts.clear()
    assert link.look(Queue.DEAD) is None
    assert link.look(LLM) is None
    assert broker.acts == ["look .dead", "look .llm", "look .llm", "declare .llm"]


def test_only_refusals_that_are_expected_are_returned(broker: Connection) -> None:
    def look(code: int, *expected: int) -> object:
        broker.fails = lambda act: closed(code, "why")
        return refusal_of(cast(Any, broker), lambda one: one.queue_declare("x"), expected)

    assert look(404, 404) == (404, "why")
    with pytest.raises(exceptions.ChannelClosedByBroker):
        look(403, 404)
    broker.fails = lambda act: exceptions.UnroutableError([])
    answer = refusal_of(cast(Any, broker), lambda one: one.queue_declare("x"))
    assert answer is not None and answer[0] == NO_ROUTE
    broker.fails = lambda act: None
    assert refusal_of(cast(Any, broker), lambda one: one.queue_declare("x")) is None


def consume(link: Link, arrived: list[int]) -> Subscription:
    """A consumer of the training queue that notes the tags of its messages."""
    return link.subscribe(Queue.TRAINING, lambda _one, _delivery, tag: arrived.append(tag))


def test_a_delivery_is_acknowledged_or_returned_and_never_dropped(
    broker: Connection, link: Link
) -> None:
    subscription = consume(link, [])
    broker.acts.clear()
    subscription.answer(5, Action.ACK)
    subscription.answer(6, Action.REQUEUE)
    assert broker.acts == ["ack 5", "return 6"]
    broker.fails = lambda act: exceptions.ChannelWrongStateError()
    with pytest.raises(BrokerError, match="settling a delivery"):
        subscription.answer(7, Action.ACK)


def test_a_message_on_its_way_while_a_consumer_is_cancelled_arrives(
    broker: Connection, link: Link
) -> None:
    arrived: list[int] = []
    subscription = consume(link, arrived)
    channel = broker.channels[-1]
    broker.acts.clear()

    def deliver() -> None:
        if len(broker.turns) == 2:
            method = pika.spec.Basic.Deliver(delivery_tag=9)
            channel._consumers["tag"](None, method, pika.BasicProperties(), b"order")

    broker.on_turn = deliver
    subscription.cancel()
    assert arrived == [9]
    assert broker.acts == ["cancel tag"] and len(broker.turns) == 3
    assert not channel._cancelled, "pika rejects the messages of a tag in this set"
    assert not channel.consumer_tags and not subscription.is_consuming and subscription.is_open
    assert all(0 < seconds <= 0.1 for seconds in broker.turns)
    subscription.answer(9, Action.REQUEUE)
    assert broker.acts == ["cancel tag", "return 9"]


def test_a_cancellation_ends_with_its_channel(broker: Connection, link: Link) -> None:
    subscription = consume(link, [])
    channel = broker.channels[-1]
    broker.on_turn = lambda: setattr(channel, "is_open", False)
    subscription.cancel()
    assert len(broker.turns) == 1 and not subscription.is_open


def test_a_channel_is_closed_once(broker: Connection, link: Link) -> None:
    subscription = consume(link, [])
    broker.acts.clear()
    subscription.close()
    subscription.close()
    assert broker.acts == ["close"]


def test_a_wake_reaches_the_owner_until_the_connection_has_ended(
    broker: Connection, link: Link
) -> None:
    link.wake()
    assert broker.woken == 1
    link.process_events(0.25)
    assert broker.turns == [0.25]
    link.close()
    link.close()
    link.wake()
    assert (broker.acts, broker.woken, link.is_open) == (["disconnect"], 1, False)


def test_an_error_while_the_connection_is_closed_does_not_matter(
    broker: Connection, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise exceptions.StreamLostError("reset")

    monkeypatch.setattr(broker, "close", lost)
    link.close()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (exceptions.ProbableAuthenticationError("(403) ACCESS_REFUSED"), BrokerRefused, "login"),
        (exceptions.ProbableAuthenticationError("(320) closing"), BrokerError, "connecting"),
        (exceptions.ProbableAccessDeniedError("(530) not allowed"), BrokerRefused, "virtual host"),
        (exceptions.ProbableAccessDeniedError("(530) limit reached"), BrokerError, "connecting"),
        (exceptions.AuthenticationError("PLAIN"), BrokerRefused, "no login by password"),
        (exceptions.IncompatibleProtocolError("x"), BrokerError, "connecting"),
        (ConnectionRefusedError(111, "refused"), BrokerError, "could not be reached"),
        (AssertionError("pika"), BrokerError, "AMQP client failed"),
        (ValueError("Expected connected socket"), BrokerError, "could not be reached"),
    ],
)
def test_each_error_of_connecting_becomes_a_broker_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[BrokerError], text: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pika, "BlockingConnection", fails)
    with pytest.raises(BrokerError, match=text) as caught:
        connect(SETTINGS)
    assert caught.type is kind and SETTINGS.rabbitmq_pass.get_secret_value() not in text


def test_another_error_is_not_taken_for_the_brokers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(pika, "BlockingConnection", fails)
    with pytest.raises(ValueError, match="a bug"):
        connect(SETTINGS)
