"""A RabbitMQ under `deploy/rabbitmq.conf`, with the plugins of its image.

The settings of the file hold, and Prometheus and KEDA find their numbers.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest
import requests
import yaml

from local.rabbitmq_node import RabbitMqNode
from tests.acceptance.world import until
from tests.unit.deploy.test_monitoring import BROKERS_OWN
from utils.settings.groups import JobLimits

DEPLOY = Path(__file__).parents[3] / "deploy"
QUEUE = "model_training"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


MANAGEMENT, METRICS = _free_port(), _free_port()


@pytest.fixture(scope="module", name="node")
def _node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMqNode]:
    own = (DEPLOY / "rabbitmq.conf").read_text(encoding="utf-8")
    # On ports of this test's own; and the machine's disk may be nearly full.
    own = own.replace("management.tcp.port = 15672", f"management.tcp.port = {MANAGEMENT}")
    own = own.replace("disk_free_limit.absolute = 2GB", "disk_free_limit.absolute = 2MB")
    more = f"prometheus.tcp.port = {METRICS}\nprometheus.tcp.ip = 127.0.0.1\n"
    with RabbitMqNode(
        tmp_path_factory.mktemp("rabbitmq"),
        configuration=f"{own}\n{more}",
        plugins=("rabbitmq_management", "rabbitmq_prometheus"),
    ) as node:
        with pika.BlockingConnection(pika.URLParameters(node.url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.queue_declare(QUEUE, durable=True)
            channel.basic_publish("", QUEUE, b"one")
            channel.basic_publish("", QUEUE, b"two")
        yield node


def test_the_broker_waits_longer_for_an_acknowledgement_than_a_job_may_take(
    node: RabbitMqNode,
) -> None:
    said = node.ctl("eval", "application:get_env(rabbit, consumer_timeout).")
    milliseconds = int(re.findall(r"\d+", said)[0])
    longest: float = JobLimits().max_job_seconds
    assert milliseconds == (longest + 3600) * 1000


def test_prometheus_finds_the_queues_that_the_alerts_ask_for(node: RabbitMqNode) -> None:
    assert node.port
    scrapes = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    (scrape,) = (one for one in scrapes["scrape_configs"] if one["job_name"] == "rabbitmq")
    address = f"http://127.0.0.1:{METRICS}{scrape['metrics_path']}"
    text = requests.get(address, params=scrape["params"], timeout=30).text
    for name, labels in BROKERS_OWN.items():
        (series,) = (line for line in text.splitlines() if line.startswith(f"{name}{{"))
        assert all(f'{label}="' in series for label in labels) and f'queue="{QUEUE}"' in series


def test_a_user_who_may_only_read_gets_the_number_of_waiting_messages_as_a_scaler_requests_it(
    node: RabbitMqNode,
) -> None:
    for command in (
        ("add_user", "scaler", "secret"),
        ("set_user_tags", "scaler", "management"),
        ("set_permissions", "scaler", "", "", "^model_training"),
    ):
        node.ctl(*command)
    address = f"http://scaler:secret@127.0.0.1:{MANAGEMENT}/api/queues/%2f/{QUEUE}"

    def waiting() -> bool:  # the broker counts every few seconds
        told = requests.get(address, timeout=30)
        assert told.status_code == 200, told.text
        return bool(told.json().get("messages") == 2)

    assert until(waiting)
