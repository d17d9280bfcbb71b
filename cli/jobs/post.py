"""Publishing by hand: persistent, mandatory and confirmed, as the worker publishes."""

from __future__ import annotations

from typing import Any

from cli.doctor.broker_visit import BrokerVisit, Refusal
from config import Settings
from consumer.training_consumer import properties_of
from services.broker.settlement import Publication, Queue
from services.broker.topology import declaration
from utils.errors import BrokerError, BrokerRefused

NOT_FOUND = 404


def ensure(visit: BrokerVisit, settings: Settings, queue: Queue) -> None:
    """Have a queue there: as it is, or else exactly as worker and backend declare it.

    Raises:
        BrokerError: The broker refuses; `BrokerRefused` where that will not pass.
    """
    name = declaration(settings.training_queue, queue).name
    doing = f"declaring {name}"
    answer = visit.attempt(doing, lambda channel: channel.queue_declare(name, passive=True))
    if isinstance(answer, Refusal) and answer.code == NOT_FOUND:
        answer = visit.attempt(doing, lambda channel: channel.queue_declare(name, durable=True))
    if isinstance(answer, Refusal):
        raise BrokerRefused(f"RabbitMQ refuses {doing}: {answer.text}")


def publish(channel: Any, settings: Settings, publication: Publication) -> None:
    """Publish on a channel with confirms, and wait until the broker has the message."""
    name = declaration(settings.training_queue, publication.queue, publication.delay_seconds).name
    channel.basic_publish("", name, publication.body, properties_of(publication), mandatory=True)


def check(settings: Settings) -> None:
    """See that a training message would find its queue.

    Raises:
        BrokerError: It would not; `BrokerRefused` where waiting cannot help.
    """
    with BrokerVisit(settings) as visit:
        ensure(visit, settings, Queue.TRAINING)


def publish_one(settings: Settings, publication: Publication) -> None:
    """Publish a single message over a connection of its own.

    Raises:
        BrokerError: The broker does not have it; `BrokerRefused` where waiting cannot help.
    """

    def act(channel: Any) -> None:
        channel.confirm_delivery()
        publish(channel, settings, publication)

    with BrokerVisit(settings) as visit:
        ensure(visit, settings, publication.queue)
        answer = visit.attempt("publishing", act)
    if isinstance(answer, Refusal):
        raise BrokerError(f"RabbitMQ did not take the message: {answer.text}")
