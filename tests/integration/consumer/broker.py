"""Tools of the consumer's tests: a worker in a thread, a backend at the broker, a handler."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pika
import pika.exceptions

from config import Settings, load
from local.rabbitmq_node import RabbitMqNode
from services.broker.connection import BrokerLoop
from services.broker.settlement import Delivery, Settlement

SOON = 15.0


def make_settings(node: RabbitMqNode, queue: str, **values: Any) -> Settings:
    """Settings of a worker on the node."""
    defaults: dict[str, Any] = {
        "backend_api_url": "http://localhost:1",
        "internal_api_token": "t" * 32,
        "aws_storage_bucket_name": "media",
        "rabbitmq_host": node.host,
        "rabbitmq_port": node.port,
        "rabbitmq_heartbeat_seconds": 20,
        "training_queue": queue,
        "retry_delays_seconds": "0.5",
    }
    return load(_env_file=None, **(defaults | values))


def until(condition: Callable[[], Any], seconds: float = SOON) -> Any:
    """The condition's first true value; fails if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not in {seconds} s: {inspect.getsource(condition).strip()}")


class Client:
    """Another client of the broker: the backend, or an operator."""

    def __init__(self, node: RabbitMqNode) -> None:
        self._node = node

    @contextlib.contextmanager
    def channel(self) -> Iterator[Any]:
        """A channel with confirms, on a separate connection."""
        with pika.BlockingConnection(pika.URLParameters(self._node.url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            yield channel

    def publish(self, queue: str, *bodies: bytes, **properties: Any) -> None:
        """Publish as the backend does."""
        with self.channel() as channel:
            for body in bodies:
                channel.basic_publish("", queue, body, pika.BasicProperties(**properties), True)

    def get(self, queue: str) -> tuple[Any, bytes] | None:
        """Take one message off a queue: its properties and its body."""
        with self.channel() as channel:
            _, properties, body = channel.basic_get(queue, auto_ack=True)
            return None if properties is None else (properties, body)

    def waiting(self, queue: str) -> int:
        """Ready messages in the queue; 0 if there is no such queue."""
        with self.channel() as channel:
            try:
                count: int = channel.queue_declare(queue, passive=True).method.message_count
            except pika.exceptions.ChannelClosedByBroker as closed:
                assert closed.reply_code == 404, closed
                return 0
            return count

    def unsettled(self, queue: str) -> int:
        """All messages in the queue, also unacknowledged ones. Slow: it runs rabbitmqctl."""
        listed = self._node.ctl("list_queues", "--no-table-headers", "name", "messages")
        return int(dict(line.split("\t") for line in listed.splitlines())[queue])


class Handler:
    """A handler that a test observes and blocks."""

    def __init__(self, settle: Callable[[Delivery], Settlement] | None = None) -> None:
        self.deliveries: list[Delivery] = []
        self.returned = 0
        self.running = 0
        self.most_running = 0
        self.go = threading.Event()
        self.go.set()
        self._settle = settle or (lambda delivery: Settlement.ack())

    def __call__(self, delivery: Delivery) -> Settlement:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.deliveries.append(delivery)
        try:
            assert self.go.wait(60)
            return self._settle(delivery)
        finally:
            self.running -= 1
            self.returned += 1

    @property
    def bodies(self) -> list[bytes]:
        """Bodies of the deliveries so far."""
        return [delivery.body for delivery in self.deliveries]


@dataclasses.dataclass
class Worker:
    """A consumer running in a thread of the test."""

    consumer: BrokerLoop
    stop: threading.Event
    thread: threading.Thread
    errors: list[BaseException]

    def end(self) -> None:
        """Stop it, and have its error raised if there is one."""
        self.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.errors:
            raise self.errors.pop()


Start = Callable[..., Worker]
