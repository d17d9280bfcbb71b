"""Short connections of the commands to RabbitMQ: they look, declare, and publish with confirms."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Self, TypeVar

from services.broker.client import connect, properties_of, refusal_of, translated
from services.broker.settlement import Publication, Queue
from services.broker.topology import declaration
from utils.errors import BrokerError, BrokerRefused
from utils.settings.groups import BrokerSettings

NOT_FOUND = 404

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelClose:
    """AMQP's code and the broker's text for a channel that it closed."""

    code: int
    text: str


class BrokerVisit:
    """A connection that lasts for one block.

    Attributes:
        product, version: The broker's name and version; empty if it does not send them.
        heartbeat: The agreed interval in seconds; 0 for none.

    Raises:
        BrokerError: The broker cannot be reached; `BrokerRefused` if waiting cannot help.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        # pika raises everything that it logs.
        logging.getLogger("pika").setLevel(logging.CRITICAL)
        self._settings = settings
        self._connection = connect(settings)
        # pika has no public name for the facts that client and broker agreed on.
        connection: Any = self._connection
        negotiated = connection._impl  # pylint: disable=protected-access
        properties = negotiated.server_properties or {}
        self.product = str(properties.get("product", ""))
        self.version = str(properties.get("version", ""))
        self.heartbeat = int(negotiated.params.heartbeat or 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; an error of the closing itself is ignored."""
        if self._connection.is_open:
            with contextlib.suppress(BrokerError), translated(self._settings, "closing"):
                self._connection.close()

    def attempt(self, doing: str, act: Callable[[Any], T]) -> T | ChannelClose:
        """Use a new channel.

        Args:
            doing: The action, for the message of an error.
            act: Receives the channel.

        Returns:
            The result of `act`, or the broker's refusal.

        Raises:
            BrokerError: The connection failed.
        """
        results: list[T] = []
        with translated(self._settings, doing):
            refusal = refusal_of(self._connection, lambda channel: results.append(act(channel)))
        return ChannelClose(*refusal) if refusal else results[0]

    def count(self, queue: str) -> Any:
        """The broker's answer about an existing queue, with its counts, or its refusal."""
        return self.attempt(
            f"looking at {queue}", lambda channel: channel.queue_declare(queue, passive=True)
        )

    def ensure(self, queue: Queue) -> None:
        """Declare a queue as worker and backend do, unless it exists.

        Raises:
            BrokerError: The connection failed; `BrokerRefused` if the broker refuses.
        """
        name = declaration(self._settings.training_queue, queue).name
        answer = self.count(name)
        if isinstance(answer, ChannelClose) and answer.code == NOT_FOUND:
            answer = self.attempt(
                f"declaring {name}", lambda channel: channel.queue_declare(name, durable=True)
            )
        if isinstance(answer, ChannelClose):
            raise BrokerRefused(f"RabbitMQ refuses to declare the queue {name}: {answer.text}")


def publish_on(channel: Any, settings: BrokerSettings, publication: Publication) -> None:
    """Publish on a channel with confirms, and wait until the broker has the message."""
    name = declaration(settings.training_queue, publication.queue, publication.delay_seconds).name
    channel.basic_publish("", name, publication.body, properties_of(publication), mandatory=True)


def publish(settings: BrokerSettings, publication: Publication) -> None:
    """Publish one message over a new connection.

    Raises:
        BrokerError: The broker does not have it; `BrokerRefused` if waiting cannot help.
    """

    def act(channel: Any) -> None:
        channel.confirm_delivery()
        publish_on(channel, settings, publication)

    with BrokerVisit(settings) as visit:
        visit.ensure(publication.queue)
        answer = visit.attempt("publishing", act)
    if isinstance(answer, ChannelClose):
        raise BrokerError(f"RabbitMQ did not accept the message: {answer.text}")


def check_training_queue(settings: BrokerSettings) -> None:
    """Test that a training message would reach its queue.

    Raises:
        BrokerError: It would not; `BrokerRefused` if waiting cannot help.
    """
    with BrokerVisit(settings) as visit:
        visit.ensure(Queue.TRAINING)
