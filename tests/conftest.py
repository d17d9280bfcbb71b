"""Real servers for the tests, each private to this run.

A server that does not start fails the tests; they are never skipped.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import uuid
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

from local.rabbitmq_node import RabbitMqNode
from sandbox.backend import Backend
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from services.s3.s3_service import S3Service
from utils.logger import TALKATIVE

# Slowness of a busy machine is no property of the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection, as the trainer does.

    It saves a third of the time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The logging that a test configures ends with it, such as the level of a command."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    hooks = sys.excepthook, threading.excepthook
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    yield
    if root.handlers is not handlers:
        root.handlers = handlers
        root.setLevel(level)
        for name, value in levels.items():
            logging.getLogger(name).setLevel(value)
        logging.captureWarnings(False)
        sys.excepthook, threading.excepthook = hooks
        structlog.reset_defaults()


# --- S3


@pytest.fixture(scope="session", name="s3_server")
def _s3_server() -> Iterator[S3Server]:
    """An S3 server for the whole run; each test uses a separate bucket."""
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
