"""RabbitMQ's limits on a message that is held for hours or returned often.

AMQP shows no time-outs, limits or policies, only the broker's version and the queue's type. The
finding therefore names the defaults of that version and the command that changes them.

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

_COPES = "Training goes on, and a worker that receives the message again finds the job's record."
_NO_LIMIT = "Messages may be returned without limit."
_UNKNOWN = "AMQP does not tell whether these defaults were changed."


def advice(settings: Settings, product: str, version: str, queue_type: str | None) -> Finding:
    """The limits on the training queue.

    Args:
        settings: Queue, virtual host, longest job.
        product: The broker's name.
        version: Its version.
        queue_type: `classic` or `quorum`; None if it is not known.
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if product != "RabbitMQ" or not match:
        return warn(
            CHECK,
            f"{product or 'this broker'} {version} is not a RabbitMQ whose rules are known.",
            "Read in its documentation how long a delivery may stay unacknowledged, and after how "
            "many returns a message is dropped.",
        )
    number = tuple(int(part or 0) for part in match.groups())
    limited = number >= _DELIVERY_LIMIT and queue_type != "classic"
    detail = f"{_timeout(number, queue_type)} {_limit(number) if limited else _NO_LIMIT} {_UNKNOWN}"
    remedy, command = _remedy(settings, number, queue_type, limited)
    verdict = warn if limited and queue_type == "quorum" else ok
    return verdict(CHECK, detail, remedy, command)


def _timeout(number: tuple[int, ...], queue_type: str | None) -> str:
    if number < _FIRST_TIMEOUT:
        return "This version has no delivery-ack time-out."
    if number < _TIMEOUT_ON_QUORUM_ONLY:
        minutes = 15 if number < _HALF_AN_HOUR else 30
        return (
            f"By default a delivery that is not acknowledged within {minutes} minutes closes its "
            f"channel (406), and the message returns to the queue. {_COPES}"
        )
    if queue_type == "classic":
        return "From 4.3 on, classic queues have no delivery-ack time-out."
    return (
        "By default a quorum queue takes back a message that is not acknowledged within 30 "
        f"minutes, and cancels the consumer (4.3 and later). {_COPES}"
    )


def _limit(number: tuple[int, ...]) -> str:
    counts = "all count"
    if number >= _TIMEOUT_ON_QUORUM_ONLY:
        counts = "lost connections and rejections count"
    return f"By default a quorum queue silently drops a message after 20 returns ({counts})."


def _remedy(
    settings: Settings, number: tuple[int, ...], queue_type: str | None, limited: bool
) -> tuple[str, str]:
    """A remedy and its command; both empty if none is needed."""
    milliseconds = int((settings.max_job_seconds + _SLACK_SECONDS) * 1000)
    if number < _FIRST_TIMEOUT or (number >= _TIMEOUT_ON_QUORUM_ONLY and queue_type == "classic"):
        return "", ""
    if number < _TIMEOUT_BY_POLICY:
        return (
            "Optional: before 3.12 the time-out is set in the node's configuration, not by a "
            f"policy. Put `consumer_timeout = {milliseconds}` into the rabbitmq.conf of every "
            "node. The command sets it on a running node until it restarts.",
            f"rabbitmqctl eval 'application:set_env(rabbit, consumer_timeout, {milliseconds}).'",
        )
    definition: dict[str, str | int] = {"consumer-timeout": milliseconds}
    remedy = "Optional: the command lets a message be held for as long as the longest job takes."
    if limited:
        dead = name_of(settings.training_queue, Queue.DEAD)
        definition |= {
            "delivery-limit": _GENEROUS_LIMIT,
            "dead-letter-exchange": "",
            "dead-letter-routing-key": dead,
        }
        remedy = f"The command raises both limits, and keeps dropped messages in {dead}."
    command = ["rabbitmqctl", "set_policy", "-p", settings.rabbitmq_vhost, POLICY]
    command += [f"^{re.escape(settings.training_queue)}$", json.dumps(definition)]
    command += ["--priority", "10", "--apply-to"]
    command += [f"{queue_type}_queues" if queue_type else "queues"]
    return (
        f"{remedy} Only the policy of the highest priority applies to a queue: merge an existing "
        "policy into this one.",
        shlex.join(command),
    )
