"""The doctor and a real broker: problems are named, and nothing is taken, made or left there."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cli.doctor import broker
from cli.doctor.findings import Finding, Verdict
from local.rabbitmq_node import RabbitMqNode
from tests.integration.consumer.broker import Client, make_settings

Examine = Callable[..., dict[str, Finding]]


@pytest.fixture(name="examine")
def _examine(rabbitmq: RabbitMqNode, queue: str) -> Examine:
    """The doctor's findings at the run's broker, by check."""

    def examine(kinds: Sequence[str] = ("style",), **values: Any) -> dict[str, Finding]:
        settings = make_settings(rabbitmq, queue, **values)
        found = broker.examine(settings.broker, settings.limits, kinds)
        return {each.check: each for each in found}

    return examine


def _queues(node: RabbitMqNode, name: str) -> list[str]:
    listed = node.ctl("list_queues", "--no-table-headers", "name").split()
    return [each for each in listed if each.startswith(name)]


def _failed(found: dict[str, Finding]) -> dict[str, Finding]:
    return {name: each for name, each in found.items() if each.verdict is Verdict.FAIL}


def test_a_healthy_broker_is_reported_and_not_changed(
    rabbitmq: RabbitMqNode, queue: str, client: Client, examine: Examine
) -> None:
    with client.channel() as channel:
        channel.queue_declare(queue, durable=True)
    client.publish(queue, b"a job")
    found = examine()
    assert not _failed(found)
    assert "RabbitMQ 3." in found["broker 127.0.0.1"].detail
    assert "classic; 1 waiting message, 0 consumers" in found[f"queue {queue}"].detail
    assert found["broker permissions"].detail == "may publish and take messages"
    assert f"{queue}.endings" in found["own queues"].detail
    assert "consumer_timeout" in found["broker limits"].command
    assert _queues(rabbitmq, queue) == [queue]
    with client.channel() as channel:
        method, _, body = channel.basic_get(queue, auto_ack=True)
        assert (body, method.redelivered) == (b"a job", False)


def test_a_missing_queue_passes_and_is_not_made(
    rabbitmq: RabbitMqNode, queue: str, examine: Examine
) -> None:
    found = examine()
    assert "is not there yet" in found[f"queue {queue}"].detail
    assert not _failed(found)
    assert not _queues(rabbitmq, queue)


@pytest.mark.parametrize(
    ("declared", "verdict", "says"),
    [
        ({"durable": False}, Verdict.FAIL, "it is not durable"),
        (
            {"durable": True, "auto_delete": True},
            Verdict.FAIL,
            "deleted when its last consumer leaves",
        ),
        (
            {"durable": True, "arguments": {"x-queue-type": "stream"}},
            Verdict.FAIL,
            "stream;",
        ),
        (
            {"durable": True, "arguments": {"x-queue-type": "quorum"}},
            Verdict.WARN,
            "quorum; 0 waiting messages, 0 consumers; it differs from the backend's declaration",
        ),
        (
            {"durable": True, "arguments": {"x-max-length": 5}},
            Verdict.WARN,
            # RabbitMQ names the first difference only, and here that hides the type.
            "its type cannot be read; 0 waiting messages, 0 consumers; it differs from the "
            "backend's declaration in x-max-length",
        ),
    ],
)
def test_a_queue_declared_differently_is_reported_with_its_type(
    queue: str,
    client: Client,
    examine: Examine,
    declared: dict[str, Any],
    verdict: Verdict,
    says: str,
) -> None:
    with client.channel() as channel:
        channel.queue_declare(queue, **declared)
    finding = examine()[f"queue {queue}"]
    assert finding.verdict is verdict
    assert says in finding.detail
    assert finding.remedy
    with client.channel() as channel:
        channel.queue_delete(queue)


def test_an_own_queue_with_other_arguments_stops_the_worker_and_is_named(
    queue: str, client: Client, examine: Examine
) -> None:
    with client.channel() as channel:
        channel.queue_declare(f"{queue}.delay.500", durable=True)
    assert f"{queue}.delay.500 exists with other arguments" in examine()["own queues"].detail


def test_the_own_queues_are_those_of_the_kinds_that_the_worker_serves(
    queue: str, client: Client, examine: Examine
) -> None:
    with client.channel() as channel:
        channel.queue_declare(f"{queue}.llm.delay.500", durable=True)
    assert examine()["own queues"].verdict is Verdict.OK
    found = examine(("style", "llm"))["own queues"]
    assert found.verdict is Verdict.FAIL
    assert f"{queue}.llm.delay.500 exists with other arguments" in found.detail


def test_letters_in_the_dead_queue_are_reported_to_the_operator(
    queue: str, client: Client, examine: Examine
) -> None:
    with client.channel() as channel:
        channel.queue_declare(f"{queue}.dead", durable=True)
    client.publish(f"{queue}.dead", b"one", b"two")
    finding = examine()[f"queue {queue}.dead"]
    assert finding.verdict is Verdict.WARN
    assert "2 messages" in finding.detail
    assert client.waiting(f"{queue}.dead") == 2


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"rabbitmq_pass": "wrong"}, "RABBITMQ_PASS"),
        ({"rabbitmq_vhost": "nowhere"}, "RABBITMQ_VHOST"),
        ({"rabbitmq_port": 1}, "RABBITMQ_PORT"),
        ({"rabbitmq_tls": True}, "RABBITMQ_TLS"),
    ],
)
def test_a_refused_connection_names_the_settings(
    examine: Examine, changed: dict[str, Any], remedy: str
) -> None:
    found = examine(**changed)
    assert list(found) == ["broker 127.0.0.1"]
    assert found["broker 127.0.0.1"].verdict is Verdict.FAIL
    assert remedy in found["broker 127.0.0.1"].remedy


def test_each_host_is_tried_and_one_that_lets_in_is_enough_for_the_rest(
    examine: Examine, queue: str
) -> None:
    found = examine(rabbitmq_host="127.0.0.1,127.9.9.9")
    assert not _failed(found)
    assert found["broker 127.9.9.9"].verdict is Verdict.WARN
    assert f"queue {queue}" in found


def test_missing_permissions_are_reported_and_the_printed_command_grants_them(
    rabbitmq: RabbitMqNode, queue: str, client: Client, examine: Examine
) -> None:
    user = f"worker-{secrets.token_hex(4)}"
    login = {"rabbitmq_user": user, "rabbitmq_pass": "a-password"}
    rabbitmq.ctl("add_user", user, "a-password")
    # The user may read everything, but neither declare nor publish.
    rabbitmq.ctl("set_permissions", user, "^$", "^$", ".*")
    with client.channel() as channel:
        channel.queue_declare(queue, durable=True)
    denied = _failed(examine(**login))
    assert set(denied) == {"own queues", "broker permissions"}
    program, *command = shlex.split(denied["broker permissions"].command)
    assert program == "rabbitmqctl"
    rabbitmq.ctl(*command)
    assert not _failed(examine(**login))


def test_a_user_who_may_not_take_messages_is_reported_and_no_message_moves(
    rabbitmq: RabbitMqNode, queue: str, client: Client, examine: Examine
) -> None:
    user = f"worker-{secrets.token_hex(4)}"
    rabbitmq.ctl("add_user", user, "a-password")
    rabbitmq.ctl("set_permissions", user, ".*", ".*", "^$")
    with client.channel() as channel:
        channel.queue_declare(queue, durable=True)
    client.publish(queue, b"a job")
    denied = _failed(examine(rabbitmq_user=user, rabbitmq_pass="a-password"))
    assert "broker permissions" in denied
    assert client.waiting(queue) == 1
