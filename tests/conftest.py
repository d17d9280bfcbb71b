"""Real servers for the tests, each private to this run. One that does not start is a failure, never
a skip."""

from __future__ import annotations

import gc
import uuid
from collections.abc import Iterator

import pytest

from local.rabbitmq_node import RabbitMqNode
from sandbox.backend import Backend
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from services.s3.s3_service import S3Service


def pytest_collection_finish() -> None:
    """What was imported is no garbage, as in the trainer's process: a third of the tests' time."""
    gc.collect()
    gc.freeze()


# --- S3


@pytest.fixture(scope="session", name="s3_server")
def _s3_server() -> Iterator[S3Server]:
    """An S3 server for the whole run; each test takes a bucket of its own."""
    with S3Server() as server:
        yield server


@pytest.fixture(name="bucket")
def _bucket(s3_server: S3Server) -> str:
    """The name of a new, empty bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3_server.create_bucket(name)
    return name


@pytest.fixture(scope="session", name="s3")
def _s3(s3_server: S3Server) -> S3Service:
    """The service, connected to the S3 server."""
    return S3Service(
        region=REGION,
        endpoint_url=s3_server.endpoint,
        access_key_id=ACCESS_KEY_ID,
        secret_access_key=SECRET_ACCESS_KEY,
    )


# --- Backend


@pytest.fixture(name="backend")
def _backend() -> Iterator[Backend]:
    """A backend that checks every request."""
    with Backend() as running:
        yield running


# --- RabbitMQ


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMqNode]:
    """A broker for the whole run, with a delivery-ack time-out of 5 s for every test."""
    with RabbitMqNode(tmp_path_factory.mktemp("rabbitmq"), consumer_timeout_ms=5000) as node:
        yield node
