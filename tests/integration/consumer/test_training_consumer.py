"""The training consumer on a real RabbitMQ: deliveries, settlements, stopping."""

from __future__ import annotations

import socket
import struct
import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import pika
import pika.data
import pytest
from structlog.testing import capture_logs

from consumer.training_consumer import training_consumer
from local.rabbitmq_node import RabbitMqNode
from services.broker.settlement import Delivery, Publication, Queue, Settlement
from tests.integration.consumer.broker import SOON, Client, Handler, Start, make_settings, until

# --- without faults


def test_a_message_is_handled_once_and_acknowledged(
    start: Start, client: Client, queue: str
) -> None:
    handler = Handler()
    worker = start(handler)
    client.publish(queue, b"one", message_id="m-1", headers={"x": 5})
    until(lambda: handler.returned)
    worker.end()
    assert handler.deliveries == [Delivery(b"one", "m-1", False, {"x": 5}, Queue.TRAINING)]
    assert client.waiting(queue) == 0


def test_one_message_at_a_time_is_taken_in_their_order(
    start: Start, client: Client, queue: str
) -> None:
    handler = Handler()
    handler.go.clear()
    start(handler)
    client.publish(queue, b"1", b"2", b"3")
    until(lambda: handler.running)
    assert client.waiting(queue) == 2
    handler.go.set()
    until(lambda: handler.returned == 3)
    assert handler.bodies == [b"1", b"2", b"3"]
    assert handler.most_running == 1


def test_the_backends_queue_is_declared_durable_and_without_arguments(
    start: Start, client: Client, queue: str
) -> None:
    start(Handler())
    with client.channel() as channel:  # a declaration that differs is refused
        channel.queue_declare(queue, durable=True)


def test_an_existing_quorum_queue_is_used_as_it_is(
    start: Start, client: Client, queue: str
) -> None:
    arguments = {
        "x-queue-type": "quorum",
        "x-delivery-limit": 20,
        "x-max-length": 1000,
        "x-overflow": "reject-publish",
        "x-single-active-consumer": False,
    }
    with client.channel() as channel:
        channel.queue_declare(queue, durable=True, arguments=arguments)
    handler = Handler()
    start(handler)
    client.publish(queue, b"one")
    until(lambda: handler.returned)


def test_a_dead_letter_keeps_its_body_and_has_a_reason_and_the_next_message_is_handled(
    start: Start, client: Client, queue: str
) -> None:
    def settle(delivery: Delivery) -> Settlement:
        if delivery.body == b"good":
            return Settlement.ack()
        return Settlement.dead(
            delivery.body, code="INVALID_MESSAGE", message="style_id: missing 수\ud800", task_id="t"
        )

    handler = Handler(settle)
    start(handler)
    client.publish(queue, b"\xff bad", b"good")
    until(lambda: handler.returned == 2)
    properties, body = until(lambda: client.get(f"{queue}.dead"))
    assert body == b"\xff bad"
    assert properties.headers == {
        "x-error-code": "INVALID_MESSAGE",
        "x-error-message": "style_id: missing 수?",
        "x-task-id": "t",
        "x-attempts": 0,
    }
    assert (properties.message_id, properties.content_type) == ("t", "application/json")
    assert properties.delivery_mode == pika.DeliveryMode.Persistent.value


def test_a_delayed_message_returns_when_its_delay_is_over_and_not_before(
    start: Start, client: Client, queue: str
) -> None:
    arrived: list[float] = []

    def settle(delivery: Delivery) -> Settlement:
        arrived.append(time.monotonic())
        if len(arrived) > 1:
            return Settlement.ack()
        return Settlement.delayed(delivery.body, seconds=1.2, message_id="t", headers={"n": 1})

    handler = Handler(settle)
    start(handler)
    client.publish(queue, b"x")
    until(lambda: handler.returned == 2)
    assert 1.2 <= arrived[1] - arrived[0] < 3
    again = handler.deliveries[1]
    assert (again.body, again.message_id, again.headers["n"]) == (b"x", "t", 1)
    assert client.waiting(f"{queue}.delay.1200") == 0


def test_endings_are_handled_while_a_job_is_trained_and_come_back_after_their_own_delay(
    start: Start, client: Client, queue: str
) -> None:
    def settle(delivery: Delivery) -> Settlement:
        if len(endings.deliveries) > 1:
            return Settlement.ack()
        return Settlement.delayed(delivery.body, seconds=0.3, message_id="t", queue=Queue.ENDINGS)

    job, endings = Handler(), Handler(settle)
    job.go.clear()
    worker = start(job, endings)
    client.publish(queue, b"job")
    until(lambda: job.running)
    worker.consumer.publish(Publication(Queue.ENDINGS, b"{}", "t")).result(SOON)
    until(lambda: endings.returned == 2)
    assert {delivery.queue for delivery in endings.deliveries} == {Queue.ENDINGS}
    assert job.returned == 0
    job.go.set()
    until(lambda: job.returned)


def test_without_a_handler_for_endings_they_are_left_for_others(
    start: Start, client: Client, queue: str
) -> None:
    worker = start(Handler())
    worker.consumer.publish(Publication(Queue.ENDINGS, b"{}", "t")).result(SOON)
    assert client.waiting(f"{queue}.endings") == 1


def test_a_handler_that_breaks_loses_nothing_and_makes_no_hot_loop(
    start: Start, client: Client, queue: str
) -> None:
    def settle(delivery: Delivery) -> Settlement:
        if delivery.body == b"good":
            return Settlement.ack()
        raise ZeroDivisionError

    handler = Handler(settle)
    with capture_logs() as lines:
        start(handler, retry_delays_seconds="30")
        client.publish(queue, b"bad", headers={"tracestate": "kept", "theirs": "not"})
        client.publish(queue, b"good")
        until(lambda: handler.returned == 2)
    assert [line["event"] for line in lines].count("handler_crashed") == 1
    properties, body = until(lambda: client.get(f"{queue}.delay.30000"))
    assert (body, properties.message_id) == (b"bad", None)
    assert properties.headers == {"tracestate": "kept", "x-put-offs": 1, "x-crashes": 1}


def test_a_returned_message_goes_to_the_next_worker(
    start: Start, client: Client, queue: str
) -> None:
    handler = Handler(
        lambda delivery: Settlement.ack() if delivery.redelivered else Settlement.requeue()
    )
    start(handler)
    client.publish(queue, b"x")
    until(lambda: handler.returned == 2)
    assert [delivery.redelivered for delivery in handler.deliveries] == [False, True]


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"\x02\xff\xfeS\x00\x00\x00\x01x", id="a name that is no UTF-8"),
        pytest.param(b"\x01tT" + struct.pack(">Q", 2**62), id="a time that Python cannot hold"),
        pytest.param(
            b"\x01tA" + struct.pack(">I", 9) + b"T" + struct.pack(">Q", 2**62),
            id="such a time in a list",
        ),
    ],
)
def test_no_header_of_a_publisher_keeps_a_message_from_its_handler(
    start: Start, client: Client, queue: str, header: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not when its handler breaks and the message is put off."""
    encode = pika.data.encode_table

    def raw(pieces: list[bytes], table: dict[str, Any]) -> int:
        if "raw" not in table:
            return int(encode(pieces, table))
        pieces.append(struct.pack(">I", len(table["raw"])) + table["raw"])
        return len(pieces[-1])

    def settle(delivery: Delivery) -> Settlement:
        if delivery.body == b"good":
            return Settlement.ack()
        raise ZeroDivisionError

    handler = Handler(settle)
    start(handler, retry_delays_seconds="30")
    with monkeypatch.context() as patched:
        patched.setattr("pika.data.encode_table", raw)
        client.publish(queue, b"odd", headers={"raw": header + b"\x0dx-worker-copy" + b"t\x01"})
    client.publish(queue, b"good")
    until(lambda: handler.returned == 2)
    assert handler.bodies == [b"odd", b"good"]
    properties, body = until(lambda: client.get(f"{queue}.delay.30000"))
    assert body == b"odd"
    assert properties.headers == {"x-worker-copy": True, "x-put-offs": 1, "x-crashes": 1}


def test_a_message_whose_handler_breaks_each_time_ends_in_the_dead_queue_with_the_errors_name(
    start: Start, client: Client, queue: str
) -> None:
    def settle(_: Delivery) -> Settlement:
        raise ZeroDivisionError("a secret")

    handler = Handler(settle)
    worker = start(handler, retry_delays_seconds="0.1,0.2")
    client.publish(queue, b"bad", message_id="t-1")
    properties, body = until(lambda: client.get(f"{queue}.dead"))
    assert (body, handler.returned) == (b"bad", 6)
    assert properties.headers["x-error-code"] == "TRAINING_FAILED"
    assert properties.headers["x-task-id"] == "t-1"
    assert "ZeroDivisionError" in properties.headers["x-error-message"]
    assert "secret" not in properties.headers["x-error-message"]
    worker.end()
    assert client.unsettled(queue) == 0


def test_a_handler_that_ends_its_thread_loses_nothing(
    start: Start, client: Client, queue: str
) -> None:
    def settle(_: Delivery) -> Settlement:
        if len(handler.deliveries) == 1:
            raise SystemExit(1)
        return Settlement.ack()

    handler = Handler(settle)
    start(handler, retry_delays_seconds="0.1")
    client.publish(queue, b"order")
    until(lambda: handler.returned == 2)
    assert handler.bodies == [b"order", b"order"]


# --- types of queues


def _types(rabbitmq: RabbitMqNode, queue: str) -> dict[str, str]:
    """The type of each queue of a test, by what follows the queue's name."""
    listed = rabbitmq.ctl("list_queues", "--no-table-headers", "name", "type").splitlines()
    types = dict(line.split("\t") for line in listed)
    return {
        name.removeprefix(queue): each for name, each in types.items() if name.startswith(queue)
    }


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_new_queues_of_the_worker_have_the_training_queues_type_and_lead_back_to_it(
    start: Start, client: Client, queue: str, rabbitmq: RabbitMqNode, queue_type: str
) -> None:
    with client.channel() as channel:
        arguments = {"x-queue-type": "quorum"} if queue_type == "quorum" else None
        channel.queue_declare(queue, durable=True, arguments=arguments)

    def settle(delivery: Delivery) -> Settlement:
        if delivery.message_id == "again":
            return Settlement.ack(Publication(Queue.DEAD, b"letter", "t"))
        return Settlement.delayed(b"x", seconds=0.3, message_id="again", queue=delivery.queue)

    handler, endings = Handler(settle), Handler(settle)
    start(handler, endings)
    client.publish(queue, b"x")
    client.publish(f"{queue}.endings", b"x")
    until(lambda: client.waiting(f"{queue}.dead") == 2)
    types = _types(rabbitmq, queue)
    assert set(types) == {
        *("", ".dead", ".endings", ".delay.500"),
        *(".delay.300", ".endings.delay.300"),
    }
    assert set(types.values()) == {queue_type}


@pytest.mark.parametrize("training", [None, {"x-queue-type": "quorum"}])
@pytest.mark.parametrize("own", [{}, {"x-queue-type": "quorum"}])
def test_a_queue_of_the_worker_that_differs_only_in_its_type_is_used_as_it_is(
    start: Start,
    client: Client,
    queue: str,
    rabbitmq: RabbitMqNode,
    training: dict[str, str] | None,
    own: dict[str, str],
) -> None:
    delay = {
        "x-message-ttl": 500,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue,
    }
    with client.channel() as channel:
        channel.queue_declare(queue, durable=True, arguments=training)
        for name in ("dead", "endings"):
            channel.queue_declare(f"{queue}.{name}", durable=True, arguments=own)
        channel.queue_declare(f"{queue}.delay.500", durable=True, arguments=delay | own)
    handler = Handler(
        lambda delivery: (
            Settlement.ack(Publication(Queue.DEAD, b"letter", "t"))
            if delivery.message_id
            else Settlement.delayed(b"x", seconds=0.5, message_id="again")
        )
    )
    start(handler)
    client.publish(queue, b"x")
    until(lambda: client.waiting(f"{queue}.dead") == 1)
    types = _types(rabbitmq, queue)
    assert {types[name] for name in (".dead", ".endings", ".delay.500")} == {
        own.get("x-queue-type", "classic")
    }


@pytest.mark.timeout(120)
def test_messages_of_a_quorum_delay_queue_survive_a_killed_broker(
    start: Start, client: Client, queue: str, rabbitmq: RabbitMqNode
) -> None:
    """Their delay ends while the broker is down or comes back."""
    with client.channel() as channel:
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
    handler = Handler()
    worker = start(handler)
    worker.consumer.publish(Publication(Queue.TRAINING, b"first", "t", {}, 1.0)).result(SOON)
    # RabbitMQ writes the address of a quorum queue to disk up to three seconds after it has
    # confirmed the queue. If the node is killed before that, the queue is lost for good.
    until(lambda: handler.bodies == [b"first"])
    time.sleep(4)
    promises = [
        worker.consumer.publish(Publication(Queue.TRAINING, b"%d" % number, "t", {}, 1.0))
        for number in range(50)
    ]
    for promise in promises:
        promise.result(SOON)
    rabbitmq.kill()
    rabbitmq.start()
    until(lambda: len(set(handler.bodies)) == 51, 60)


# --- stopping


def test_a_stop_lets_the_job_return_its_message_and_takes_nothing_new(
    start: Start, client: Client, queue: str
) -> None:
    handler = Handler(lambda delivery: Settlement.requeue())
    handler.go.clear()
    worker = start(handler)
    client.publish(queue, b"1", b"2")
    until(lambda: handler.running)
    worker.stop.set()
    until(lambda: not worker.consumer.consuming)
    assert worker.thread.is_alive(), "the job in hand is waited for"
    handler.go.set()
    worker.end()
    assert handler.bodies == [b"1"]
    assert client.waiting(queue) == 2
    assert not worker.consumer.connected


def test_a_job_that_does_not_return_delays_the_stop_no_longer_than_the_limit(
    start: Start, client: Client, queue: str
) -> None:
    handler = Handler()
    handler.go.clear()
    worker = start(handler, stop_seconds=1.0)
    client.publish(queue, b"1")
    until(lambda: handler.running)
    began = time.monotonic()
    worker.end()
    assert 0.9 < time.monotonic() - began < 2.5
    until(lambda: client.waiting(queue) == 1)
    with pytest.raises(CancelledError):
        worker.consumer.publish(Publication(Queue.DEAD, b"x", "t")).result(1)
    handler.go.set()


def test_a_stop_is_quick_without_a_broker(rabbitmq: RabbitMqNode, queue: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        settings = make_settings(rabbitmq, queue, rabbitmq_port=silent.getsockname()[1])
        stop = threading.Event()
        threading.Timer(0.5, stop.set).start()
        began = time.monotonic()
        training_consumer(
            settings.broker,
            handle=Handler(),
            stop=stop,
            stop_seconds=5,
            retry_delays=(1.0,),
            ending_retry_delays=(1.0,),
        ).run()
        assert time.monotonic() - began < 2


# --- one message, then the end


def test_once_takes_one_message_and_leaves_the_next_untouched(
    start: Start, client: Client, queue: str
) -> None:
    """Not even as one that came back: `redelivered` has a meaning for messages without an id."""
    with client.channel() as channel:
        channel.queue_declare(queue, durable=True)
    client.publish(queue, b"one", b"two")
    handler = Handler()
    worker = start(handler, once_idle=60.0)
    worker.thread.join(SOON)
    worker.end()
    assert handler.bodies == [b"one"]
    with client.channel() as channel:
        method, _, body = channel.basic_get(queue, auto_ack=True)
    assert (body, method.redelivered) == (b"two", False)
    assert client.unsettled(queue) == 0


def test_once_ends_only_after_the_broker_has_confirmed_the_publications_of_the_job(
    start: Start, client: Client, queue: str
) -> None:
    settlement = Settlement.dead(b"one", code="GPU_OOM", message="", task_id="t")
    handler = Handler(lambda delivery: settlement)
    handler.go.clear()
    worker = start(handler, once_idle=60.0)
    client.publish(queue, b"one")
    until(lambda: handler.running)
    assert not worker.stop.wait(1), "the job is in hand: nobody asks it to stop"
    handler.go.set()
    worker.thread.join(SOON)
    worker.end()
    assert client.waiting(f"{queue}.dead") == 1 and client.unsettled(queue) == 0


def test_once_ends_after_a_while_without_a_message_and_not_during_an_ending(
    start: Start, client: Client, queue: str
) -> None:
    ending = Handler()
    ending.go.clear()
    worker = start(Handler(), ending, once_idle=0.5)
    client.publish(f"{queue}.endings", b"ending")
    until(lambda: ending.running)
    assert not worker.stop.wait(1.5), "an ending is being delivered"
    ending.go.set()
    worker.thread.join(SOON)
    worker.end()
    assert client.unsettled(f"{queue}.endings") == 0


def test_once_delivers_an_ending_without_a_training_message_and_ends(
    start: Start, client: Client, queue: str
) -> None:
    """A scaler starts a pod for it though there is no training message."""
    with client.channel() as channel:
        channel.queue_declare(f"{queue}.endings", durable=True)
    client.publish(f"{queue}.endings", b"ending")
    ending = Handler()
    worker = start(Handler(), ending, once_idle=1.0)
    worker.thread.join(SOON)
    worker.end()
    assert ending.bodies == [b"ending"]
    assert client.unsettled(f"{queue}.endings") == 0


def test_once_does_not_end_after_its_job_while_an_ending_is_being_handled(
    start: Start, client: Client, queue: str
) -> None:
    job, ending = Handler(), Handler()
    ending.go.clear()
    worker = start(job, ending, once_idle=60.0)
    client.publish(f"{queue}.endings", b"ending")
    until(lambda: ending.running)
    client.publish(queue, b"job")
    until(lambda: job.returned)
    assert not worker.stop.wait(1.5), "an ending is being delivered"
    ending.go.set()
    worker.thread.join(SOON)
    worker.end()
    assert client.unsettled(queue) == client.unsettled(f"{queue}.endings") == 0
