"""What RabbitMQ does to a message that is held for hours or returned often, and how to be safe.

AMQP tells neither time-outs nor limits nor policies, only the broker's version and the queue's
type. So this says what holds unless somebody has set it otherwise, and the command that sets it.

Sources: RabbitMQ's guides "Consumers" (delivery acknowledgement timeout), "Quorum Queues" (poison
message handling, consumer timeout) and "Policies" of 3.13, 4.0, 4.2 and 4.3, and the release notes
of 3.8.15, 3.8.17 and 3.12.0.
"""

from __future__ import annotations

import json
import re
import shlex

from cli.doctor.findings import Finding, ok, warn
from config import Settings
from services.broker.settlement import Queue
from services.broker.topology import name_of

CHECK = "broker limits"
POLICY = "training-server"

_FIRST_TIMEOUT = (3, 8, 15)  # 15 minutes
_HALF_AN_HOUR = (3, 8, 17)
_TIMEOUT_BY_POLICY = (3, 12, 0)
_DELIVERY_LIMIT = (4, 0, 0)  # of 20, on quorum queues
_TIMEOUT_ON_QUORUM_ONLY = (4, 3, 0)
_GENEROUS_LIMIT = 1000
_SLACK_SECONDS = 3600

_COPES = (
    "The worker copes with it: training goes on, and whoever gets the message again finds the "
    "job's record."
)
_NOT_TOLD = "AMQP does not tell whether somebody has set it otherwise."


def advice(settings: Settings, product: str, version: str, queue_type: str | None) -> Finding:
    """What holds for the training queue on this broker.

    Args:
        settings: Queue, virtual host, longest job.
        product: As the broker says.
        version: As the broker says.
        queue_type: `classic` or `quorum`; None where it is not known.
    """
    number = _number(version)
    if product != "RabbitMQ" or number is None:
        return warn(
            CHECK,
            f"{product or 'this broker'} {version} is not a RabbitMQ whose rules are known",
            "see in its documentation how long a delivery may stay unacknowledged, and after how "
            "many returns a message is dropped",
        )
    sentences = [_timeout(number, queue_type), _limit(number, queue_type), _NOT_TOLD]
    command, remedy = _command(settings, number, queue_type)
    detail = " ".join(filter(None, sentences))
    if number >= _DELIVERY_LIMIT and queue_type == "quorum":
        return warn(CHECK, detail, remedy, command)
    return ok(CHECK, detail, remedy, command)


def _number(version: str) -> tuple[int, ...] | None:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(part or 0) for part in match.groups()) if match else None


def _timeout(number: tuple[int, ...], queue_type: str | None) -> str:
    if number < _FIRST_TIMEOUT:
        return "This version has no delivery-ack time-out."
    if number >= _TIMEOUT_ON_QUORUM_ONLY:
        if queue_type == "classic":
            return "From 4.3 on classic queues have no delivery-ack time-out."
        return (
            "Unless set otherwise, a quorum queue takes a message back that is not acknowledged "
            f"within 30 minutes, and cancels the consumer (4.3 and later). {_COPES}"
        )
    minutes = 15 if number < _HALF_AN_HOUR else 30
    return (
        f"Unless set otherwise, a delivery that is not acknowledged within {minutes} minutes "
        f"closes its channel (406), and the message goes back. {_COPES}"
    )


def _limit(number: tuple[int, ...], queue_type: str | None) -> str:
    if queue_type == "classic" or number < _DELIVERY_LIMIT:
        return "Messages may be returned without limit."
    counted = (
        "lost connections and rejections count"
        if number >= _TIMEOUT_ON_QUORUM_ONLY
        else "all count"
    )
    return (
        "Unless set otherwise, a quorum queue drops a message, without a word, after 20 returns "
        f"({counted})."
    )


def _command(
    settings: Settings, number: tuple[int, ...], queue_type: str | None
) -> tuple[str, str]:
    """The command line that makes it safe, and what it does; both empty where none is needed."""
    milliseconds = int((settings.max_job_seconds + _SLACK_SECONDS) * 1000)
    if number < _FIRST_TIMEOUT or (number >= _TIMEOUT_ON_QUORUM_ONLY and queue_type == "classic"):
        return "", ""
    if number < _TIMEOUT_BY_POLICY:
        return (
            f"rabbitmqctl eval 'application:set_env(rabbit, consumer_timeout, {milliseconds}).'",
            "optional: before 3.12 only the node's own configuration sets the time-out, no policy. "
            f"Put `consumer_timeout = {milliseconds}` into every node's rabbitmq.conf; the command "
            "sets it on a running node until it restarts",
        )
    definition: dict[str, str | int] = {"consumer-timeout": milliseconds}
    remedy = "optional: the command lets a message be held for as long as the longest job takes"
    if queue_type != "classic" and number >= _DELIVERY_LIMIT:
        definition |= {
            "delivery-limit": _GENEROUS_LIMIT,
            "dead-letter-exchange": "",
            "dead-letter-routing-key": name_of(settings.training_queue, Queue.DEAD),
        }
        remedy = (
            "the command raises both limits, and has what is dropped all the same kept in "
            f"{definition['dead-letter-routing-key']}"
        )
    command = ["rabbitmqctl", "set_policy", "-p", settings.rabbitmq_vhost, POLICY]
    command += [f"^{re.escape(settings.training_queue)}$", json.dumps(definition)]
    command += [
        "--priority",
        "10",
        "--apply-to",
        f"{queue_type}_queues" if queue_type else "queues",
    ]
    return (
        shlex.join(command),
        f"{remedy}. Only one policy applies to a queue, the one of the highest priority: merge "
        "yours into it",
    )
