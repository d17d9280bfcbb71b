"""The API on both databases, with a real S3 and a real broker."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from local.rabbitmq_node import RabbitMqNode
from sandbox.postgres_node import PostgresNode
from sandbox.s3_server import S3Server
from tests.integration.api.world import Ground, World, running


@pytest.fixture(scope="session", name="postgres")
def _postgres() -> Iterator[PostgresNode]:
    """A database server for the whole run; each test takes a database of its own."""
    with PostgresNode() as node:
        yield node


@pytest.fixture(params=["sqlite", "postgresql"], name="database_url")
def _database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either sort."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'api.db'}"
    node: PostgresNode = request.getfixturevalue("postgres")
    return node.create_database(f"api_{secrets.token_hex(6)}")


@pytest.fixture(name="ground")
def _ground(
    database_url: str, s3_server: S3Server, rabbitmq: RabbitMqNode, tmp_path: Path
) -> Ground:
    """The servers, with a database of either sort."""
    return Ground(database_url, s3_server, rabbitmq, tmp_path)


@pytest.fixture(name="world")
def _world(ground: Ground) -> Iterator[World]:
    """A running API."""
    with running(ground) as world:
        yield world
