"""A publication that the broker does not accept or confirm blocks nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from local.rabbitmq_node import RabbitMqNode
from services.broker.client import Link
from services.broker.settlement import (
    BODY_BYTES,
    BODY_SHA256,
    Delivery,
    Publication,
    Queue,
    Settlement,
)
from tests.integration.consumer.answer_proxy import (
    CONFIRM,
    CONSUMING,
    DECLARED,
    AnswerProxy,
)
from tests.integration.consumer.broker import Client, Handler, Start, until

LONG = 40.0  # seconds; several connections are lost on the way


@pytest.fixture(name="proxy")
def _proxy(rabbitmq: RabbitMqNode) -> Iterator[AnswerProxy]:
    with AnswerProxy(rabbitmq.host, rabbitmq.port) as proxy:
        yield proxy


@pytest.fixture(name="small_messages")
def _small_messages(rabbitmq: RabbitMqNode) -> Iterator[int]:
    """The broker takes no larger messages than this."""
    size = 20_000
    rabbitmq.ctl("eval", f"application:set_env(rabbit, max_message_size, {size}).")
    yield size
    rabbitmq.ctl("eval", "application:set_env(rabbit, max_message_size, 134217728).")


def _with_an_ending(delivery: Delivery) -> Settlement:
    return Settlement.ack(Publication(Queue.DEAD, b"ending of " + delivery.body, "t"))


# --- answers that never arrive


def test_a_missing_confirm_ends_the_connection_and_the_publication_is_repeated(
    start: Start, client: Client, queue: str, proxy: AnswerProxy
) -> None:
    handler = Handler(_with_an_ending)
    with capture_logs() as lines:
        worker = start(handler, rabbitmq_port=proxy.port, answer_seconds=1.0)
        proxy.swallow = frozenset({CONFIRM})
        client.publish(queue, b"1")
        until(lambda: handler.returned)
        until(lambda: not worker.consumer.turned_within(0.8))
        until(lambda: proxy.swallowed >= 2)
        assert worker.consumer.busy, "nothing is acknowledged before the confirm"
        proxy.swallow = frozenset()
        until(lambda: not worker.consumer.busy)
    assert client.get(f"{queue}.dead") is not None
    refusals = [line["refusal"] for line in lines if line["event"] == "publication_refused"]
    assert set(refusals) == {"unanswered"}
    client.publish(queue, b"2")
    until(lambda: b"2" in handler.bodies)
    worker.end()
    assert client.unsettled(queue) == 0


@pytest.mark.parametrize("answer", [DECLARED, CONSUMING])
def test_any_other_missing_answer_ends_the_connection_too(
    start: Start, client: Client, queue: str, proxy: AnswerProxy, answer: tuple[int, int]
) -> None:
    handler = Handler()
    worker = start(handler, rabbitmq_port=proxy.port, answer_seconds=1.0)
    proxy.swallow = frozenset({answer})
    with client.channel() as channel:
        channel.queue_delete(queue)  # so that it is declared and subscribed to again
    until(lambda: proxy.swallowed >= 2)
    proxy.swallow = frozenset()
    until(lambda: worker.consumer.consuming)
    client.publish(queue, b"x")
    until(lambda: handler.returned)


# --- refusals of the broker


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"large": "y" * 140_000}, id="more than a frame"),
        pytest.param({"odd": "\ud800"}, id="what is no UTF-8"),
        pytest.param({"large": 2**70}, id="a number that AMQP cannot hold"),
        pytest.param({"n" * 300: 1}, id="a name that is too long"),
    ],
)
def test_headers_that_the_broker_refuses_block_no_other_job_and_the_body_is_kept(
    start: Start, client: Client, queue: str, headers: dict[str, str | int | bool]
) -> None:
    handler = Handler(_with_an_ending)
    worker = start(handler)
    bad = worker.consumer.publish(Publication(Queue.TRAINING, b"order", "bad", headers, 0.2))
    client.publish(queue, b"1", b"2", b"3")
    bad.result(LONG)
    until(lambda: client.waiting(f"{queue}.dead") == 4)
    found = [client.get(f"{queue}.dead") for _ in range(4)]
    letters = {body: properties for properties, body in filter(None, found)}
    assert set(letters) == {b"order", b"ending of 1", b"ending of 2", b"ending of 3"}
    order = letters[b"order"]
    assert order.message_id == order.headers["x-task-id"] == "bad"
    assert order.headers["x-error-code"] == "PUBLICATION_REFUSED"
    assert set(handler.bodies) == {b"1", b"2", b"3"}


def test_a_message_that_is_too_large_leaves_its_beginning_its_size_and_its_hash(
    start: Start, client: Client, queue: str, small_messages: int
) -> None:
    order = b"order " * small_messages
    handler = Handler(
        lambda delivery: (
            Settlement.delayed(order, seconds=0.2, message_id="large")
            if delivery.body == b"large"
            else _with_an_ending(delivery)
        )
    )
    worker = start(handler)
    other = worker.consumer.publish(Publication(Queue.TRAINING, order, "large"))
    client.publish(queue, b"1")
    until(lambda: client.waiting(f"{queue}.dead") == 1)
    assert not other.done()
    other.result(LONG)
    client.get(f"{queue}.dead")
    properties, body = until(lambda: client.get(f"{queue}.dead"))
    assert order.startswith(body) and 0 < len(body) < small_messages
    assert properties.headers[BODY_BYTES] == len(order)
    assert properties.headers[BODY_SHA256] == hashlib.sha256(order).hexdigest()
    assert properties.headers["x-task-id"] == "large"


def test_headers_of_a_publisher_that_nearly_fill_a_frame_block_no_other_job(
    start: Start, client: Client, queue: str
) -> None:
    def settle(delivery: Delivery) -> Settlement:
        if delivery.body == b"bad":
            raise ZeroDivisionError
        return _with_an_ending(delivery)

    handler = Handler(settle)
    with capture_logs() as lines:
        start(handler, retry_delays_seconds="30")
        client.publish(queue, b"bad", headers={"large": "y" * 130_900})
        client.publish(queue, b"1", b"2", b"3")
        until(lambda: client.waiting(f"{queue}.dead") == 3)
    assert client.waiting(f"{queue}.delay.30000") == 1
    assert not [line for line in lines if line["event"] in ("broker_lost", "publication_refused")]


def test_a_message_without_a_queue_becomes_a_dead_letter(
    start: Start, client: Client, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is deleted each time between its declaration and the publication."""
    publish_to = Link._publish_to  # pylint: disable=protected-access

    def after_the_queue_has_gone(link: Link, name: str, *how: Any) -> None:
        if name == f"{queue}.endings":
            with client.channel() as channel:
                channel.queue_delete(name)
        publish_to(link, name, *how)

    monkeypatch.setattr(Link, "_publish_to", after_the_queue_has_gone)
    worker = start(Handler())
    worker.consumer.publish(Publication(Queue.ENDINGS, b"ending", "t")).result(LONG)
    properties, body = until(lambda: client.get(f"{queue}.dead"))
    assert body == b"ending"
    assert properties.headers["x-error-code"] == "PUBLICATION_REFUSED"
