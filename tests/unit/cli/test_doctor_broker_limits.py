"""The doctor's findings about RabbitMQ's time-outs and limits, by version and type of queue."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from cli.doctor.broker_limits import advice
from cli.doctor.findings import Finding, Verdict
from utils.settings.groups import BrokerSettings

SETTINGS = BrokerSettings(training_queue="model.training", rabbitmq_vhost="a host")
MAX_JOB_SECONDS = 7200


def _advice(version: str, queue_type: str | None) -> Finding:
    return advice(SETTINGS, MAX_JOB_SECONDS, "RabbitMQ", version, queue_type)


def _policy(found: Finding) -> tuple[list[str], dict[str, Any]]:
    """The command's arguments, and the policy's definition in them."""
    words = shlex.split(found.command)
    return words, json.loads(words[6])


@pytest.mark.parametrize(
    ("version", "queue_type", "says"),
    [
        ("3.8.9", "classic", "no delivery-ack time-out"),
        ("3.8.15", "classic", "within 15 minutes"),
        ("3.10.8", "classic", "within 30 minutes closes its channel (406)"),
        ("4.2.1", "quorum", "within 30 minutes closes its channel (406)"),
        ("4.3.0", "quorum", "cancels the consumer"),
        ("4.3.0", "classic", "classic queues have no delivery-ack time-out"),
        ("3.13.7", "quorum", "returned without limit"),
        ("4.0.2", "quorum", "after 20 returns"),
        ("4.1", None, "after 20 returns"),
        ("4.1.0", "classic", "returned without limit"),
    ],
)
def test_the_time_out_and_the_limit_follow_version_and_type(
    version: str, queue_type: str | None, says: str
) -> None:
    found = _advice(version, queue_type)
    assert says in found.detail
    assert "AMQP does not show" in found.detail


def test_only_a_queue_that_may_drop_messages_is_a_warning() -> None:
    assert _advice("4.0.2", "quorum").verdict is Verdict.WARN
    for version, queue_type in (("4.0.2", "classic"), ("3.13.7", "quorum"), ("3.10.8", "classic")):
        assert _advice(version, queue_type).verdict is Verdict.OK


def test_before_3_12_the_node_is_configured_since_no_policy_reaches_the_time_out() -> None:
    found = _advice("3.10.8", "classic")
    assert "consumer_timeout, 10800000)" in found.command  # the longest job and an hour
    assert "`consumer_timeout = 10800000`" in found.remedy
    assert "set_policy" not in found.command


def test_from_3_12_a_policy_holds_the_message_for_the_longest_job() -> None:
    words, definition = _policy(_advice("3.12.0", "classic"))
    assert words[:4] == ["rabbitmqctl", "set_policy", "-p", "a host"]
    assert words[5] == r"^model\.training$"
    assert definition == {"consumer-timeout": 10_800_000}
    assert words[-2:] == ["--apply-to", "classic_queues"]


def test_from_4_0_a_quorum_queue_keeps_what_it_would_drop_in_the_dead_queue() -> None:
    words, definition = _policy(_advice("4.0.2", "quorum"))
    assert definition["delivery-limit"] >= 1000
    assert definition["dead-letter-routing-key"] == "model.training.dead"
    assert definition["dead-letter-exchange"] == ""
    assert words[-1] == "quorum_queues"


def test_without_a_problem_no_command_is_printed() -> None:
    for version, queue_type in (("3.8.9", "classic"), ("4.3.0", "classic")):
        assert not _advice(version, queue_type).command


def test_a_broker_other_than_rabbitmq_is_reported_as_unknown() -> None:
    for product, version in (("LavinMQ", "2.1.0"), ("RabbitMQ", "unknown"), ("", "")):
        found = advice(SETTINGS, MAX_JOB_SECONDS, product, version, "classic")
        assert found.verdict is Verdict.WARN
        assert "not a RabbitMQ whose rules are known" in found.detail
