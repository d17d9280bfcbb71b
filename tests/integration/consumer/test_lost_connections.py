"""Lost connections, channels, consumers and queues stop no job and lose no message."""

from __future__ import annotations

import time

from structlog.testing import capture_logs

from local.rabbitmq_node import RabbitMqNode
from services.broker.settlement import Delivery, Publication, Queue, Settlement
from tests.integration.consumer.broker import SOON, Client, Handler, Start, until


def test_a_job_longer_than_the_heartbeat_and_the_delivery_ack_time_out_is_not_handled_twice_at_once(
    start: Start, client: Client, queue: str
) -> None:
    """The work takes 8 s with a heartbeat of 2 s.

    The broker takes its message back after 5 s by closing the channel.
    """

    def settle(delivery: Delivery) -> Settlement:
        if delivery.body == b"long" and not delivery.redelivered:
            time.sleep(8)
        return Settlement.ack(Publication(Queue.DEAD, b"ending of " + delivery.body, "t"))

    handler = Handler(settle)
    with capture_logs() as lines:
        worker = start(handler, rabbitmq_heartbeat_seconds=2)
        client.publish(queue, b"long")
        until(lambda: handler.running)
        until(lambda: not worker.consumer.consuming, 9)
        assert handler.running
        assert worker.consumer.connected
        until(lambda: handler.returned == 2, 15)
        client.publish(queue, b"next")
        until(lambda: handler.returned == 3)
    assert handler.most_running == 1
    assert handler.bodies == [b"long", b"long", b"next"]
    events = [line["event"] for line in lines]
    assert events.count("broker_connected") == 1, "the connection itself must survive"
    assert events.count("acknowledgement_dropped") == 1
    until(lambda: client.waiting(f"{queue}.dead") == 3)
    worker.end()
    assert client.waiting(queue) == 0


def test_a_restarted_broker_stops_no_job_and_the_next_message_waits_for_its_end(
    start: Start, client: Client, queue: str, rabbitmq: RabbitMqNode
) -> None:
    handler = Handler(
        lambda delivery: Settlement.ack(Publication(Queue.DEAD, b"ending of " + delivery.body, "t"))
    )
    handler.go.clear()
    worker = start(handler)
    client.publish(queue, b"1", b"2", delivery_mode=2)
    until(lambda: handler.running)
    rabbitmq.kill()
    until(lambda: not worker.consumer.connected)
    promise = worker.consumer.publish(Publication(Queue.DEAD, b"from another thread", "s"))
    rabbitmq.start()
    until(lambda: worker.consumer.connected)
    promise.result(SOON)
    assert not worker.consumer.consuming
    assert worker.consumer.busy
    assert handler.bodies == [b"1"]
    handler.go.set()
    until(lambda: handler.returned == 3)
    assert handler.bodies == [
        b"1",
        b"1",
        b"2",
    ], "the first came back; its record makes that harmless"
    assert handler.most_running == 1
    until(lambda: client.waiting(f"{queue}.dead") == 4)
    worker.end()
    assert client.waiting(queue) == 0


def test_a_job_that_ends_while_the_broker_is_away_is_settled_afterwards(
    start: Start, client: Client, queue: str, rabbitmq: RabbitMqNode
) -> None:
    handler = Handler(
        lambda delivery: (
            Settlement.ack(Publication(Queue.DEAD, b"ending", "t"))
            if not delivery.redelivered
            else Settlement.ack()
        )
    )
    handler.go.clear()
    worker = start(handler)
    client.publish(queue, b"1", delivery_mode=2)
    until(lambda: handler.running)
    rabbitmq.kill()
    until(lambda: not worker.consumer.connected)
    handler.go.set()
    until(lambda: handler.returned)
    rabbitmq.start()
    until(lambda: handler.returned == 2)
    assert client.get(f"{queue}.dead") is not None


def test_a_connection_that_an_operator_closes_is_opened_again(
    start: Start, client: Client, queue: str, rabbitmq: RabbitMqNode
) -> None:
    handler = Handler()
    worker = start(handler)
    for _ in range(2):
        rabbitmq.ctl("close_all_connections", "test")
        until(lambda: not worker.consumer.consuming)
        until(lambda: worker.consumer.consuming)
    client.publish(queue, b"x")
    until(lambda: handler.returned)


def test_a_deleted_queue_is_declared_and_consumed_again(
    start: Start, client: Client, queue: str
) -> None:
    handler = Handler()
    worker = start(handler)
    with client.channel() as channel:
        channel.queue_delete(queue)
    until(lambda: not worker.consumer.consuming)
    until(lambda: worker.consumer.consuming)
    client.publish(queue, b"x")
    until(lambda: handler.returned)


def test_a_queue_deleted_in_mid_job_is_consumed_again_after_the_job(
    start: Start, client: Client, queue: str
) -> None:
    handler = Handler()
    handler.go.clear()
    worker = start(handler)
    client.publish(queue, b"1")
    until(lambda: handler.running)
    with client.channel() as channel:
        channel.queue_delete(queue)
        until(lambda: not worker.consumer.consuming)
        channel.queue_declare(queue, durable=True)
    client.publish(queue, b"2")
    time.sleep(1.5)
    assert handler.bodies == [b"1"]
    handler.go.set()
    until(lambda: handler.returned == 2)


def test_a_publication_whose_queue_was_deleted_still_succeeds(
    start: Start, client: Client, queue: str
) -> None:
    worker = start(Handler())
    with client.channel() as channel:
        channel.queue_delete(f"{queue}.dead")
        channel.queue_delete(f"{queue}.delay.500")
    dead = worker.consumer.publish(Publication(Queue.DEAD, b"x", "t"))
    late = worker.consumer.publish(Publication(Queue.DEAD, b"y", "t", {}, 0.2))
    dead.result(SOON)
    late.result(SOON)
    until(lambda: client.waiting(f"{queue}.dead") == 2)


def test_a_publication_that_the_broker_does_not_accept_blocks_nothing_else(
    start: Start, client: Client, queue: str
) -> None:
    """The training queue is full and rejects.

    The message is acknowledged only when there is room again.
    """
    with client.channel() as channel:
        arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
        channel.queue_declare(queue, durable=True, arguments=arguments)
    handler = Handler(lambda delivery: Settlement.ack(Publication(Queue.TRAINING, b"copy", "t")))
    handler.go.clear()
    worker = start(handler)
    client.publish(queue, b"1")
    until(lambda: handler.running)
    client.publish(queue, b"2")
    handler.go.set()
    until(lambda: handler.returned)
    worker.consumer.publish(Publication(Queue.DEAD, b"x", "t")).result(SOON)
    assert worker.consumer.busy
    assert handler.bodies == [b"1"]
    handler.go.clear()
    assert client.get(queue) is not None
    until(lambda: handler.bodies == [b"1", b"copy"])
    handler.go.set()
    worker.stop.set()
