"""The run's broker, with a new queue name for each test."""

from __future__ import annotations

import secrets

import pytest

from local.rabbitmq_node import RabbitMqNode
from tests.integration.consumer.broker import Client


@pytest.fixture(name="queue")
def _queue() -> str:
    return f"training-{secrets.token_hex(4)}"


@pytest.fixture(name="client")
def _client(rabbitmq: RabbitMqNode) -> Client:
    return Client(rabbitmq)
