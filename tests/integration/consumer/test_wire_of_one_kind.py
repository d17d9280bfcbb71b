"""With one kind of job, queues and messages on the broker are those of the protocol, exactly."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from pika.exceptions import ChannelClosedByBroker

from local.rabbitmq_node import RabbitMqNode
from services.broker.settlement import Delivery, Publication, Queue, Settlement
from tests.integration.consumer.broker import Client, Handler, Start, until

Q = "QUEUE"
TTL = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": Q, "x-message-ttl": 500}
KEPT = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
QUORUM = {"x-queue-type": "quorum"}
LIMITED = QUORUM | {"x-delivery-limit": 1_000_000}
DECLARED = {
    "classic": {Q: {}, f"{Q}.dead": {}, f"{Q}.endings": {}, f"{Q}.delay.500": TTL},
    "quorum": {
        Q: QUORUM,
        f"{Q}.dead": LIMITED,
        f"{Q}.endings": LIMITED,
        f"{Q}.delay.500": TTL | KEPT | QUORUM,
    },
}


@pytest.mark.parametrize("queue_type", DECLARED)
def test_names_arguments_and_bindings_of_the_queues(
    start: Start, client: Client, queue: str, rabbitmq: RabbitMqNode, queue_type: str
) -> None:
    if queue_type == "quorum":
        with client.channel() as channel:
            channel.queue_declare(queue, durable=True, arguments=QUORUM)
    start(Handler(), Handler())

    def rows(*command: str) -> list[dict[str, object]]:
        return json.loads(rabbitmq.ctl(*command, "--formatter", "json"))  # type: ignore[no-any-return]

    found = {
        str(row["name"]).replace(queue, Q): {
            str(name): value.replace(queue, Q) if isinstance(value, str) else value
            for name, _, value in row["arguments"]  # type: ignore[attr-defined]
        }
        for row in rows("list_queues", "name", "durable", "arguments")
        if str(row["name"]).startswith(queue) and row["durable"]
    }
    assert found == DECLARED[queue_type]
    bound = {
        (row["source_name"], row["destination_name"])
        for row in rows("list_bindings", "source_name", "destination_name")
        if str(row["destination_name"]).startswith(queue)
    }
    assert {source for source, _ in bound} == {""}, "the default exchange and no other"


def test_properties_and_headers_of_the_messages(start: Start, client: Client, queue: str) -> None:
    def settle(delivery: Delivery) -> Settlement:
        if delivery.body == b"breaks":
            raise ZeroDivisionError
        return Settlement.ack(
            Publication.to_dead(b"letter", code="GPU_OOM", message="why", task_id="t", attempts=2),
            Publication(Queue.ENDINGS, b"ending", "t", delay_seconds=30),
            Publication(Queue.TRAINING, b"copy", "t", {"x-worker-copy": True}, 40),
        )

    start(Handler(settle), retry_delays_seconds="30")
    client.publish(queue, b"order", b"breaks", message_id="id", headers={"tracestate": "a=b"})
    found = {}
    for name in (".dead", ".endings.delay.30000", ".delay.40000", ".delay.30000"):
        properties, body = _get(client, queue + name)
        assert (properties.content_type, properties.delivery_mode) == ("application/json", 2)
        found[name] = (body, properties.message_id, list((properties.headers or {}).items()))
        rest = {*vars(properties)} - {"content_type", "delivery_mode", "message_id", "headers"}
        assert {each for each in rest if getattr(properties, each) is not None} <= {"_type"}
    assert found == {
        ".dead": (
            b"letter",
            "t",
            [
                ("x-error-code", "GPU_OOM"),
                ("x-error-message", "why"),
                ("x-task-id", "t"),
                ("x-attempts", 2),
            ],
        ),
        ".endings.delay.30000": (b"ending", "t", []),
        ".delay.40000": (b"copy", "t", [("x-worker-copy", True)]),
        ".delay.30000": (
            b"breaks",
            "id",
            [("tracestate", "a=b"), ("x-put-offs", 1), ("x-crashes", 1)],
        ),
    }


def _get(client: Client, queue: str) -> tuple[Any, bytes]:
    """The first message of a queue, as soon as both are there."""

    def look() -> tuple[Any, bytes] | None:
        with contextlib.suppress(ChannelClosedByBroker):  # the queue is not there yet
            return client.get(queue)
        return None

    message: tuple[Any, bytes] = until(look)
    return message
