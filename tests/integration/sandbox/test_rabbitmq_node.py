"""The private broker keeps to its folder, keeps what it was given, and ends with its owner."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pika
import pytest

from local import rabbitmq_node
from local.rabbitmq_node import RabbitMqMissing, RabbitMqNode

ROOT = Path(__file__).parents[3]
OWNER = """
import sys, time
from local.rabbitmq_node import RabbitMqNode
node = RabbitMqNode(sys.argv[1])
node.start()
print(node.port, flush=True)
time.sleep(600)
"""


def answers(port: int) -> bool:
    """Whether anything listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_messages_on_the_disk_survive_a_kill_and_a_restart(tmp_path: Path) -> None:
    with RabbitMqNode(tmp_path / "node") as node:
        with pika.BlockingConnection(pika.URLParameters(node.url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.queue_declare("kept", durable=True)
            channel.basic_publish("", "kept", b"x", pika.BasicProperties(delivery_mode=2))
        node.kill()
        assert not answers(node.port)
        node.start()
        node.restart()
        assert node.ctl("list_queues", "--no-table-headers", "name", "messages") == "kept\t1\n"
    assert not answers(node.port)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node"]


def test_a_broker_ends_with_its_killed_owner(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        port = int(owner.stdout.readline())
        assert answers(port)
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while answers(port):
        assert time.monotonic() < deadline, "the broker outlived its owner"
        time.sleep(0.1)


def test_a_machine_without_rabbitmq_gets_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq_node, "_USUAL_FOLDERS", ())
    monkeypatch.setattr(rabbitmq_node, "_search_path", lambda: str(tmp_path))
    with pytest.raises(RabbitMqMissing, match="apt-get install rabbitmq-server"):
        RabbitMqNode(tmp_path)
