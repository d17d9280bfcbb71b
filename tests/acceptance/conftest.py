"""A world around the program, and workers in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from local.rabbitmq_node import RabbitMqNode
from sandbox.backend import Backend
from sandbox.photographs import photographs
from sandbox.s3_server import S3Server
from sandbox.worker_process import WorkerProcess
from tests.acceptance.world import World
from training.style.stand_in_model import build_stand_in


@pytest.fixture(scope="session", name="base_model")
def _base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stand_in(tmp_path_factory.mktemp("base-model") / "stand-in")


@pytest.fixture(scope="module", name="world")
def _world(
    rabbitmq: RabbitMqNode,
    s3_server: S3Server,
    base_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """Real servers, with the photographs in storage. Nothing that the backend refused is left
    unnoticed.
    """
    with Backend() as backend:
        folder = tmp_path_factory.mktemp("world")
        world = World(rabbitmq, s3_server, backend, base_model, folder)
        world.photographs = tuple(world.upload(each.name, each.content) for each in photographs())
        yield world
        assert backend.rejected == ()


@pytest.fixture(scope="module", name="worker")
def _worker(world: World) -> Iterator[WorkerProcess]:
    """One worker, warm across the tests of a file."""
    with world.worker() as worker:
        yield worker
        assert worker.stop() == 0, worker.last_words(20)


@pytest.fixture(name="apart")
def _apart(world: World) -> World:
    """The same world with a queue and buckets of its own, so that no other worker takes part."""
    return world.apart()
