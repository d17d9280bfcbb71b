"""A worker that serves several training queues holds one message over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from local.rabbitmq_node import RabbitMqNode
from services.broker import connection
from services.broker.client import Subscription
from services.broker.settlement import Delivery, Publication, Queue, Settlement
from tests.integration.consumer.broker import SOON, Client, Handler, Start, until

LLM, TOY = Queue.of_kind("llm"), Queue.of_kind("toy")
ALL = (Queue.TRAINING, LLM, TOY)

Declare = Callable[[], None]


@pytest.fixture(name="declare", params=["classic", "quorum"])
def _declare(client: Client, queue: str, request: pytest.FixtureRequest) -> Declare:
    """Declares the queues, as classic or quorum queues, before a worker is there."""

    def declare() -> None:
        arguments = {"x-queue-type": "quorum"} if request.param == "quorum" else None
        with client.channel() as channel:
            for each in ALL:
                channel.queue_declare(queue + each.suffix, durable=True, arguments=arguments)

    return declare


def test_a_long_job_leaves_the_messages_of_the_other_queues_for_other_workers(
    start: Start, client: Client, queue: str, declare: Declare
) -> None:
    declare()
    long_job, other = Handler(), Handler()
    long_job.go.clear()
    start(long_job, queues=ALL)
    client.publish(queue, b"long")
    until(lambda: long_job.running)
    for each in ALL:
        client.publish(queue + each.suffix, b"next")
    assert [client.waiting(queue + each.suffix) for each in ALL] == [1, 1, 1]
    start(other, queues=ALL)
    until(lambda: other.returned == 3)
    assert not any(delivery.redelivered for delivery in other.deliveries)
    assert long_job.bodies == [b"long"]
    long_job.go.set()


def test_queues_with_waiting_messages_take_turns(
    start: Start, client: Client, queue: str, declare: Declare
) -> None:
    declare()
    client.publish(queue, *[b"style"] * 4)
    client.publish(f"{queue}.llm", *[b"llm"] * 4)
    client.publish(f"{queue}.toy", b"toy")
    handler = Handler()
    start(handler, queues=ALL)
    until(lambda: handler.returned == 9)
    assert [str(delivery.queue) for delivery in handler.deliveries] == [
        *("training", "llm", "toy"),
        *("training", "llm", "training", "llm", "training", "llm"),
    ]
    assert handler.most_running == 1
    assert not any(delivery.redelivered for delivery in handler.deliveries)


def test_an_idle_worker_serves_a_message_of_any_queue_within_seconds(
    start: Start, client: Client, queue: str, declare: Declare
) -> None:
    declare()
    handler = Handler()
    start(handler, queues=ALL)
    for each in (TOY, Queue.TRAINING, LLM, LLM):
        handler.deliveries.clear()
        client.publish(queue + each.suffix, b"job")
        until(lambda: handler.deliveries, 3 * connection.LOOK_SECONDS)


def test_a_message_that_arrives_during_the_cancellation_of_the_consumer_is_a_first_delivery(
    start: Start,
    client: Client,
    queue: str,
    declare: Declare,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rejected and delivered again, an order without an id might pass for one that was claimed."""
    declare()
    cancel = Subscription.cancel

    def with_a_message_on_its_way(subscription: Subscription) -> None:
        if subscription.queue == Queue.TRAINING and not client_published:
            client_published.append(True)
            client.publish(queue, b"on its way")
            time.sleep(0.3)  # the broker has delivered it, and this worker has not read it
        cancel(subscription)

    client_published: list[bool] = []
    monkeypatch.setattr(Subscription, "cancel", with_a_message_on_its_way)
    handler = Handler()
    start(handler, queues=ALL)
    client.publish(f"{queue}.llm", b"llm")
    until(lambda: handler.returned == 2)
    assert handler.bodies == [b"on its way", b"llm"]
    assert [delivery.redelivered for delivery in handler.deliveries] == [False, False]
    assert client.unsettled(queue) == 0


@pytest.mark.parametrize("source", ALL, ids=str)
def test_a_delayed_message_returns_to_its_queue_also_if_its_handler_broke(
    start: Start, client: Client, queue: str, source: Queue
) -> None:
    def settle(delivery: Delivery) -> Settlement:
        if delivery.crashes:
            return Settlement.ack()
        if delivery.put_offs:
            raise ZeroDivisionError
        return Settlement.delayed(
            delivery.body,
            seconds=0.5,
            message_id="t",
            headers={"x-put-offs": 1},
            queue=delivery.queue,
        )

    handler = Handler(settle)
    start(handler, queues=ALL)
    client.publish(queue + source.suffix, b"x")
    until(lambda: handler.returned == 3, 30)
    assert {delivery.queue for delivery in handler.deliveries} == {source}
    assert client.waiting(f"{queue}{source.suffix}.delay.500") == 0


def test_a_message_moves_to_a_queue_that_this_worker_does_not_serve(
    start: Start, client: Client, queue: str
) -> None:
    handler = Handler(lambda delivery: Settlement.moved(delivery, TOY))
    start(handler, queues=(Queue.TRAINING, LLM))
    client.publish(queue, b"order", message_id="t", headers={"x-min-level": 1, "theirs": "not"})
    properties, body = until(lambda: _get(client, f"{queue}.toy"))
    assert (body, properties.message_id, properties.headers) == (b"order", "t", {"x-min-level": 1})
    assert client.waiting(queue) == 0


def _get(client: Client, queue: str) -> object:
    with client.channel() as channel:
        channel.queue_declare(queue, durable=True)
    return client.get(queue)


def test_a_deleted_queue_is_declared_again_while_the_worker_waits_at_another_one(
    start: Start, client: Client, queue: str, rabbitmq: RabbitMqNode
) -> None:
    handler = Handler()
    start(handler, queues=ALL)
    with client.channel() as channel:
        channel.queue_delete(f"{queue}.llm")
    until(lambda: f"{queue}.llm" in _names(rabbitmq))
    client.publish(f"{queue}.llm", b"x")
    until(lambda: handler.returned)


def _names(rabbitmq: RabbitMqNode) -> list[str]:
    return rabbitmq.ctl("list_queues", "--no-table-headers", "name").splitlines()


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_missing_queues_are_made_with_the_type_of_the_backends_queue(
    start: Start, client: Client, queue: str, rabbitmq: RabbitMqNode, queue_type: str
) -> None:
    arguments = {"x-queue-type": "quorum"} if queue_type == "quorum" else None
    with client.channel() as channel:
        channel.queue_declare(queue, durable=True, arguments=arguments)
    start(Handler(), queues=ALL)
    listed = rabbitmq.ctl("list_queues", "--no-table-headers", "name", "type").splitlines()
    types = dict(line.split("\t") for line in listed if line.startswith(queue))
    assert {name.removeprefix(queue) for name in types} == {
        *("", ".llm", ".toy", ".endings", ".dead"),
        *(".delay.500", ".llm.delay.500", ".toy.delay.500"),
    }
    assert set(types.values()) == {queue_type}


def test_a_stop_in_mid_job_returns_the_job_and_takes_nothing_of_any_queue(
    start: Start, client: Client, queue: str, declare: Declare
) -> None:
    declare()
    handler = Handler(lambda delivery: Settlement.requeue())
    handler.go.clear()
    worker = start(handler, queues=ALL)
    client.publish(queue, b"job")
    until(lambda: handler.running)
    for each in ALL:
        client.publish(queue + each.suffix, b"next")
    worker.stop.set()
    until(lambda: not worker.consumer.consuming)
    handler.go.set()
    worker.end()
    assert handler.bodies == [b"job"]
    assert [client.waiting(queue + each.suffix) for each in ALL] == [2, 1, 1]


def test_once_takes_one_message_of_all_queues(
    start: Start, client: Client, queue: str, declare: Declare
) -> None:
    declare()
    for each in ALL:
        client.publish(queue + each.suffix, b"job")
    handler = Handler()
    worker = start(handler, queues=ALL, once_idle=60.0)
    worker.thread.join(SOON)
    worker.end()
    assert [str(delivery.queue) for delivery in handler.deliveries] == ["training"]
    with client.channel() as channel:
        for each in (LLM, TOY):
            method, _, _ = channel.basic_get(queue + each.suffix, auto_ack=True)
            assert not method.redelivered


def test_a_worker_that_reconnects_in_mid_job_takes_nothing_until_the_job_ends(
    start: Start, client: Client, queue: str, declare: Declare, rabbitmq: RabbitMqNode
) -> None:
    declare()
    handler = Handler()
    handler.go.clear()
    worker = start(handler, queues=ALL)
    client.publish(queue, b"job", delivery_mode=2)
    until(lambda: handler.running)
    client.publish(f"{queue}.llm", b"llm", delivery_mode=2)
    rabbitmq.ctl("close_all_connections", "test")
    until(lambda: not worker.consumer.connected)
    until(lambda: worker.consumer.connected)
    worker.consumer.publish(Publication(Queue.DEAD, b"x", "t")).result(SOON)
    assert handler.bodies == [b"job"]
    handler.go.set()
    until(lambda: handler.returned == 3)
    assert sorted(handler.bodies) == [b"job", b"job", b"llm"]
    assert handler.most_running == 1
