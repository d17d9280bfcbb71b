"""RabbitMQ: is it there, may the worker do there what it must, and are the queues sound?

Everything is asked so that the answer is no. A declaration with an argument that no queue can be
made with is refused as different where the queue exists, and as invalid where it does not: so it
tells type, arguments and permissions, and never leaves a queue behind. A subscription with an
argument that is no number is refused after the permission was checked, and takes no message.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any

from cli.doctor import broker_limits
from cli.doctor.broker_visit import BrokerVisit, Refusal
from cli.doctor.findings import Finding, Verdict, fail, ok, warn
from config import Settings
from consumer.training_consumer import NO_ROUTE
from services.broker.settlement import Queue
from services.broker.topology import (
    IMPOSSIBLE,
    TYPE_TRIAL,
    QueueDeclaration,
    declaration,
    different_argument,
    name_of,
    queue_type_of,
    tells_more_than_the_type,
)
from utils.errors import BrokerError, BrokerRefused
from utils.settings.groups import LOCAL_HOSTS
from utils.wording import counted as phrase

NOT_FOUND, LOCKED, REFUSED, PRECONDITION = 404, 405, 403, 406


def examine(settings: Settings) -> list[Finding]:
    """Every host, then everything else through the first that lets the worker in.

    One host of several that is down is no failure: the worker goes to the others.
    """
    findings: list[Finding] = []
    unreachable: list[Finding] = []
    way_in: BrokerVisit | None = None
    for host in settings.rabbitmq_host:
        one = settings.model_copy(update={"rabbitmq_host": (host,)})
        try:
            visit = BrokerVisit(one)
        except BrokerError as error:
            unreachable.append(_no_way_in(settings, host, error))
            continue
        findings.append(_introduced(settings, host, visit))
        if way_in is None:
            way_in = visit
        else:
            visit.close()
    if way_in is None:
        return unreachable
    findings += [dataclasses.replace(each, verdict=Verdict.WARN) for each in unreachable]
    with way_in:
        findings += _queues(settings, way_in)
    return findings


def _no_way_in(settings: Settings, host: str, error: BrokerError) -> Finding:
    check = f"broker {host}"
    if not isinstance(error, BrokerRefused):
        return fail(
            check,
            str(error),
            "check RABBITMQ_HOST, RABBITMQ_PORT, RABBITMQ_TLS (port 5671 wants true, 5672 false) "
            "and the firewall; several hosts: take out one that is gone",
        )
    remedy = "check RABBITMQ_USER, RABBITMQ_PASS and RABBITMQ_VHOST"
    if settings.rabbitmq_user == "guest" and host not in LOCAL_HOSTS:
        remedy = "guest may only log in on the broker's own machine: make a user for the workers"
    return fail(check, str(error), remedy)


def _introduced(settings: Settings, host: str, visit: BrokerVisit) -> Finding:
    check = f"broker {host}"
    detail = (
        f"{visit.product or 'a broker without a name'} {visit.version}, port "
        f"{settings.rabbitmq_port}, TLS {'on' if settings.rabbitmq_tls else 'off'}, virtual host "
        f"{settings.rabbitmq_vhost!r}, user {settings.rabbitmq_user!r}, heartbeat "
        f"{visit.heartbeat} s"
    )
    if not visit.heartbeat:
        return warn(
            check,
            detail,
            "the broker wants no heartbeats, so a dead connection is noticed late: set "
            "heartbeat = 60 in rabbitmq.conf",
        )
    if not settings.rabbitmq_tls and host not in LOCAL_HOSTS:
        return warn(
            check,
            detail,
            "the password goes over the network in the clear: use RABBITMQ_TLS=true with port "
            "5671, or a private network",
        )
    return ok(check, detail)


def _queues(settings: Settings, visit: BrokerVisit) -> list[Finding]:
    findings: list[Finding] = []
    name = settings.training_queue
    try:
        counted = visit.attempt(
            f"looking at {name}", lambda channel: channel.queue_declare(name, passive=True)
        )
        trial = visit.attempt(
            f"looking at {name}",
            lambda channel: channel.queue_declare(name, durable=True, arguments=TYPE_TRIAL),
        )
        queue_type = _type_of(counted, trial)
        findings.append(_training_queue(settings, visit, counted, queue_type))
        findings.append(_own_queues(settings, visit, queue_type))
        findings.append(_permissions(settings, visit, exists=not isinstance(counted, Refusal)))
        findings += _set_aside(settings, visit)
        findings.append(broker_limits.advice(settings, visit.product, visit.version, queue_type))
    except BrokerError as error:
        findings.append(fail("broker", f"the connection broke: {error}", "run the doctor again"))
    return findings


def _type_of(counted: Any, trial: Any) -> str | None:
    """The queue's type; None where there is no queue, or something hides its type."""
    if isinstance(counted, Refusal) or not isinstance(trial, Refusal):
        return None
    return queue_type_of(trial.text)


def _training_queue(
    settings: Settings, visit: BrokerVisit, counted: Any, queue_type: str | None
) -> Finding:
    name = settings.training_queue
    check = f"queue {name}"
    if isinstance(counted, Refusal):
        return _out_of_sight(check, counted)
    waiting = phrase(counted.method.message_count, "waiting message")
    consumers = phrase(counted.method.consumer_count, "consumer")
    detail = f"{queue_type or 'its type cannot be told'}; {waiting}, {consumers}"
    if queue_type == "stream":
        return fail(
            check,
            detail,
            "a stream forgets no message: jobs would come again at each start. Declare it as a "
            "classic or quorum queue",
        )
    as_the_backend = visit.attempt(
        f"looking at {name}",
        lambda channel: channel.queue_declare(name, durable=True, arguments=IMPOSSIBLE),
    )
    differs = _difference(as_the_backend)
    if differs in ("durable", "auto_delete"):
        return fail(
            check,
            f"{detail}; it is {'not durable' if differs == 'durable' else 'deleted by itself'}",
            "jobs are lost with the broker's next restart, and the backend's own declaration is "
            "refused: delete it while it is empty, and let the backend declare it",
        )
    if differs:
        return warn(
            check,
            f"{detail}; it differs from what the backend declares in {differs}",
            "the worker takes it as it is, but RabbitMQ refuses the backend's declaration (durable,"
            " no arguments) unless this is the virtual host's default: see that the backend "
            "publishes",
        )
    return ok(check, detail)


def _out_of_sight(check: str, refusal: Refusal) -> Finding:
    """The queue cannot be looked at."""
    if refusal.code == NOT_FOUND:
        return ok(check, "is not there yet; the worker declares it as the backend does")
    if refusal.code == LOCKED:
        return fail(check, "is another connection's alone (exclusive)", "delete it there")
    return fail(check, refusal.text)


def _difference(trial: Any) -> str | None:
    """The argument in which an existing queue differs from a trial declaration."""
    if isinstance(trial, Refusal) and trial.code == PRECONDITION:
        argument = different_argument(trial.text)
        return argument if argument not in IMPOSSIBLE else None
    return None


def _own_queues(settings: Settings, visit: BrokerVisit, queue_type: str | None) -> Finding:
    check = "own queues"
    wanted = [declaration(settings.training_queue, queue) for queue in Queue]
    wanted += [
        declaration(settings.training_queue, Queue.TRAINING, delay)
        for delay in settings.retry_delays_seconds
    ]
    for queue in wanted:
        differences: list[str] = []
        for arguments in queue.variants(queue_type) if queue.ours else ({},):
            trial = _try_to_declare(visit, queue, arguments)
            if isinstance(trial, Refusal) and trial.code == REFUSED:
                return fail(check, trial.text, *_permission_remedy(settings))
            if not _difference(trial):
                break
            differences.append(trial.text)
        else:
            if queue.ours:
                told = next(filter(tells_more_than_the_type, differences), differences[0])
                return fail(check, queue.conflict(told), "see what was found")
    return ok(check, f"can be declared: {', '.join(queue.name for queue in wanted if queue.ours)}")


def _try_to_declare(visit: BrokerVisit, queue: QueueDeclaration, arguments: dict[str, Any]) -> Any:
    return visit.attempt(
        f"trying to declare {queue.name}",
        lambda channel: channel.queue_declare(
            queue.name, durable=True, arguments=arguments | IMPOSSIBLE
        ),
    )


def _permissions(settings: Settings, visit: BrokerVisit, *, exists: bool) -> Finding:
    """May it publish, and take messages? Asked without doing either."""
    check = "broker permissions"

    def publish(channel: Any) -> None:
        channel.confirm_delivery()
        channel.basic_publish("", f"{settings.training_queue}.nowhere", b"", mandatory=True)

    def subscribe(channel: Any) -> None:
        channel.basic_consume(
            settings.training_queue, lambda *_: None, arguments={"x-priority": "none"}
        )

    publishing = visit.attempt("trying to publish", publish)
    if isinstance(publishing, Refusal) and publishing.code != NO_ROUTE:
        return fail(check, publishing.text, *_permission_remedy(settings))
    if not exists:
        return ok(check, "may publish; whether it may take messages shows when the queue is there")
    taking = visit.attempt("trying to take messages", subscribe)
    if isinstance(taking, Refusal) and taking.code == REFUSED:
        return fail(check, taking.text, *_permission_remedy(settings))
    return ok(check, "may publish and take messages")


def _permission_remedy(settings: Settings) -> tuple[str, str]:
    queues = f"^{re.escape(settings.training_queue)}"
    return (
        f"user {settings.rabbitmq_user!r} needs configure, write and read on its queues, and write "
        "on the default exchange; as far as it has other rights, keep those",
        shlex.join(
            ["rabbitmqctl", "set_permissions", "-p", settings.rabbitmq_vhost]
            + [settings.rabbitmq_user, queues, rf"{queues}|^amq\.default$", queues]
        ),
    )


def _set_aside(settings: Settings, visit: BrokerVisit) -> list[Finding]:
    """What waits in the dead queue is for a person."""
    name = name_of(settings.training_queue, Queue.DEAD)
    counted: Any = visit.attempt(
        f"looking at {name}", lambda channel: channel.queue_declare(name, passive=True)
    )
    if isinstance(counted, Refusal) or not counted.method.message_count:
        return []
    return [
        warn(
            f"queue {name}",
            phrase(counted.method.message_count, "message"),
            "`main.py redrive` shows why, and sends back what should be tried again",
        )
    ]
