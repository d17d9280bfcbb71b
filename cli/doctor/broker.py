"""Checks of RabbitMQ: its hosts, the queues, the permissions and the limits.

No message is taken and no queue is made, because every request is one that the broker refuses. A
declaration with an impossible argument is refused as different if the queue exists, as invalid if
it does not, and as forbidden without the permission. A subscription with a priority that is no
number is refused after the permission was checked.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from cli.broker import NOT_FOUND, BrokerVisit, ChannelClose
from cli.doctor.broker_limits import advice
from cli.doctor.findings import Finding, Verdict, fail, ok, warn
from services.broker.client import NO_ROUTE
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
from utils.settings.groups import LOCAL_HOSTS, BrokerSettings, JobLimits
from utils.wording import counted

LOCKED, FORBIDDEN, PRECONDITION = 405, 403, 406


def examine(settings: BrokerSettings, limits: JobLimits, kinds: Sequence[str]) -> Iterator[Finding]:
    """Test every host, then everything else on the first host that accepts the worker.

    If one host accepts it, a host that is down is only a warning.

    Args:
        settings: The broker and the queue.
        limits: The limits of a job.
        kinds: The kinds of job that the worker serves.
    """
    unreachable: list[Finding] = []
    visit: BrokerVisit | None = None
    for host in settings.rabbitmq_host:
        try:
            another = BrokerVisit(settings.model_copy(update={"rabbitmq_host": (host,)}))
        except BrokerError as error:
            unreachable.append(_unreachable(settings, host, error))
            continue
        yield _reached(settings, host, another)
        if visit is None:
            visit = another
        else:
            another.close()
    if visit is None:
        yield from unreachable
        return
    yield from (dataclasses.replace(each, verdict=Verdict.WARN) for each in unreachable)
    with visit:
        try:
            yield from _queues(settings, limits, visit, kinds)
        except BrokerError as error:
            yield fail("broker", f"The connection failed: {error}", "Run the doctor again.")


def _unreachable(settings: BrokerSettings, host: str, error: BrokerError) -> Finding:
    remedy = "Check RABBITMQ_USER, RABBITMQ_PASS and RABBITMQ_VHOST."
    if not isinstance(error, BrokerRefused):
        remedy = (
            "Check RABBITMQ_HOST, RABBITMQ_PORT, RABBITMQ_TLS (true for port 5671, false for 5672) "
            "and the firewall. Remove a host that no longer exists."
        )
    elif settings.rabbitmq_user == "guest" and host not in LOCAL_HOSTS:
        remedy = "guest may log in only on the broker's own machine: create a user for the workers."
    return fail(f"broker {host}", str(error), remedy)


def _reached(settings: BrokerSettings, host: str, visit: BrokerVisit) -> Finding:
    check = f"broker {host}"
    detail = (
        f"{visit.product or 'an unnamed broker'} {visit.version}, port {settings.rabbitmq_port}, "
        f"TLS {'on' if settings.rabbitmq_tls else 'off'}, virtual host "
        f"{settings.rabbitmq_vhost!r}, user {settings.rabbitmq_user!r}, heartbeat "
        f"{visit.heartbeat} s."
    )
    if not visit.heartbeat:
        detail += " Without heartbeats a dead connection is noticed late."
        return warn(check, detail, "Set heartbeat = 60 in the broker's rabbitmq.conf.")
    if not settings.rabbitmq_tls and host not in LOCAL_HOSTS:
        detail += " The network can read the password."
        return warn(check, detail, "Set RABBITMQ_TLS=true and port 5671, or use a private network.")
    return ok(check, detail)


def _queues(
    settings: BrokerSettings, limits: JobLimits, visit: BrokerVisit, kinds: Sequence[str]
) -> Iterator[Finding]:
    name, dead = settings.training_queue, name_of(settings.training_queue, Queue.DEAD)
    found = visit.count(name)
    trial = _declare(visit, name, TYPE_TRIAL)
    is_there = not isinstance(found, ChannelClose)
    queue_type = queue_type_of(trial.text) if is_there and isinstance(trial, ChannelClose) else None
    check = f"queue {name}"
    yield _training_queue(visit, name, found, queue_type) if is_there else _no_queue(check, found)
    training = [Queue.of_kind(kind) for kind in kinds]
    yield _own_queues(settings, training, limits.retry_delays_seconds, visit, queue_type)
    yield _permissions(settings, visit, exists=is_there)
    of_the_dead = visit.count(dead)
    if not isinstance(of_the_dead, ChannelClose) and of_the_dead.method.message_count:
        detail = f"It holds {counted(of_the_dead.method.message_count, 'message')}."
        remedy = "`main.py redrive` shows the reasons and sends back what should be tried again."
        yield warn(f"queue {dead}", detail, remedy)
    yield advice(settings, limits.max_job_seconds, visit.product, visit.version, queue_type)


def _no_queue(check: str, refusal: ChannelClose) -> Finding:
    if refusal.code == NOT_FOUND:
        return ok(check, "It is not there yet. The worker declares it as the backend does.")
    if refusal.code == LOCKED:
        return fail(check, "It belongs to one other connection (exclusive).", "Delete it there.")
    return fail(check, refusal.text, "Correct this on the broker.")


def _training_queue(visit: BrokerVisit, name: str, found: Any, queue_type: str | None) -> Finding:
    check = f"queue {name}"
    waiting = counted(found.method.message_count, "waiting message")
    consumers = counted(found.method.consumer_count, "consumer")
    detail = f"{queue_type or 'its type cannot be read'}; {waiting}, {consumers}"
    if queue_type == "stream":
        return fail(
            check,
            f"{detail}. A stream keeps every message, so jobs would return at each start.",
            "Declare it as a classic or quorum queue.",
        )
    differs = _difference(_declare(visit, name, IMPOSSIBLE))
    if differs in ("durable", "auto_delete"):
        wrong = "not durable" if differs == "durable" else "deleted when its last consumer leaves"
        return fail(
            check,
            f"{detail}; it is {wrong}. Jobs get lost, and the backend cannot declare it.",
            "Delete it while it is empty, and let the backend declare it.",
        )
    if differs:
        return warn(
            check,
            f"{detail}; it differs from the backend's declaration in {differs}. RabbitMQ refuses "
            "that declaration, unless this is the default of the virtual host.",
            "Check that the backend can publish. The worker uses the queue as it is.",
        )
    return ok(check, f"{detail}.")


def _declare(visit: BrokerVisit, name: str, arguments: dict[str, Any]) -> Any:
    return visit.attempt(
        f"trying to declare {name}",
        lambda channel: channel.queue_declare(name, durable=True, arguments=arguments),
    )


def _difference(trial: Any) -> str | None:
    """The argument in which an existing queue differs from a declaration."""
    if isinstance(trial, ChannelClose) and trial.code == PRECONDITION:
        argument = different_argument(trial.text)
        return argument if argument not in IMPOSSIBLE else None
    return None


def _own_queues(
    settings: BrokerSettings,
    training: Sequence[Queue],
    delays: Sequence[float],
    visit: BrokerVisit,
    queue_type: str | None,
) -> Finding:
    check = "own queues"
    wanted = [
        declaration(settings.training_queue, queue)
        for queue in (*training, Queue.ENDINGS, Queue.DEAD)
    ]
    wanted += [
        declaration(settings.training_queue, queue, delay) for queue in training for delay in delays
    ]
    for queue in wanted:
        answers = []
        for arguments in queue.variants(queue_type) if queue.ours else ({},):
            answer = _declare(visit, queue.name, arguments | IMPOSSIBLE)
            if isinstance(answer, ChannelClose) and answer.code == FORBIDDEN:
                return fail(check, answer.text, *_permission_remedy(settings))
            answers.append(answer)
            if not _difference(answer):
                break
        else:
            if queue.ours:
                return _conflict(check, queue, [answer.text for answer in answers])
    return ok(check, f"can be declared: {', '.join(queue.name for queue in wanted if queue.ours)}")


def _conflict(check: str, queue: QueueDeclaration, answers: list[str]) -> Finding:
    shown = next(filter(tells_more_than_the_type, answers), answers[0])
    remedy = "Move its messages to another queue and delete it, or choose another TRAINING_QUEUE."
    return fail(check, queue.conflict(shown), remedy)


def _permissions(settings: BrokerSettings, visit: BrokerVisit, *, exists: bool) -> Finding:
    """Test whether the user may publish and subscribe, without doing either."""
    check = "broker permissions"

    def publish(channel: Any) -> None:
        channel.confirm_delivery()
        channel.basic_publish("", f"{settings.training_queue}.nowhere", b"", mandatory=True)

    def subscribe(channel: Any) -> None:
        channel.basic_consume(
            settings.training_queue, lambda *_: None, arguments={"x-priority": "none"}
        )

    answer = visit.attempt("trying to publish", publish)
    if isinstance(answer, ChannelClose) and answer.code != NO_ROUTE:
        return fail(check, answer.text, *_permission_remedy(settings))
    if not exists:
        return ok(check, "may publish; taking messages can be tested once the queue exists")
    answer = visit.attempt("trying to take messages", subscribe)
    if isinstance(answer, ChannelClose) and answer.code == FORBIDDEN:
        return fail(check, answer.text, *_permission_remedy(settings))
    return ok(check, "may publish and take messages")


def _permission_remedy(settings: BrokerSettings) -> tuple[str, str]:
    """A remedy and its command."""
    queues = f"^{re.escape(settings.training_queue)}"
    command = ["rabbitmqctl", "set_permissions", "-p", settings.rabbitmq_vhost]
    command += [settings.rabbitmq_user, queues, rf"{queues}|^amq\.default$", queues]
    return (
        f"Grant user {settings.rabbitmq_user!r} configure, write and read on its queues, and write "
        "on the default exchange. The command replaces other rights of the user: add those.",
        shlex.join(command),
    )
