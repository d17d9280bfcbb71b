"""A consumer on the run's broker, with a separate queue for each test."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from consumer.training_consumer import training_consumer
from local.rabbitmq_node import RabbitMqNode
from services.broker.settlement import Delivery, Queue, Settlement
from tests.integration.consumer.broker import Client, Start, Worker, make_settings, until


@pytest.fixture(name="queue")
def _queue() -> str:
    return f"training-{secrets.token_hex(4)}"


@pytest.fixture(name="client")
def _client(rabbitmq: RabbitMqNode) -> Client:
    return Client(rabbitmq)


@pytest.fixture(name="start")
def _start(rabbitmq: RabbitMqNode, queue: str) -> Iterator[Start]:
    """Start a consumer; it is stopped after the test, and must not have failed."""
    workers: list[Worker] = []

    def start(
        handle: Callable[[Delivery], Settlement],
        handle_ending: Callable[[Delivery], Settlement] | None = None,
        *,
        stop_seconds: float = 5.0,
        once_idle: float | None = None,
        answer_seconds: float = 30.0,
        queues: Sequence[Queue] = (Queue.TRAINING,),
        **values: Any,
    ) -> Worker:
        stop, errors = threading.Event(), list[BaseException]()
        settings = make_settings(rabbitmq, queue, **values)
        consumer = training_consumer(
            settings.broker,
            handle=handle,
            handle_ending=handle_ending,
            queues=queues,
            stop=stop,
            stop_seconds=stop_seconds,
            retry_delays=settings.limits.retry_delays_seconds,
            ending_retry_delays=settings.limits.ending_retry_delays_seconds,
            once_idle=once_idle,
            answer_seconds=answer_seconds,
        )

        def run() -> None:
            try:
                consumer.run()
            except BaseException as error:  # pylint: disable=broad-exception-caught
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        workers.append(Worker(consumer, stop, thread, errors))
        until(lambda: consumer.consuming or errors or not thread.is_alive())
        return workers[-1]

    yield start
    for worker in workers:
        worker.end()
