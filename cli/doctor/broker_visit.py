"""Looking around on a broker: no message is taken, no queue made."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Self, TypeVar

from config import Settings
from consumer.training_consumer import connect, refusal_of, translated
from utils.errors import BrokerError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """What the broker closed a channel over: AMQP's code, and its own words."""

    code: int
    text: str


class BrokerVisit:
    """A connection of one's own, for as long as the block runs.

    Args:
        settings: As for the consumer.

    Attributes:
        product, version: What the broker says of itself; empty where it does not.
        heartbeat: Seconds that were agreed on; 0 for none.

    Raises:
        BrokerError: There is no way in; `BrokerRefused` where waiting cannot help.
    """

    def __init__(self, settings: Settings) -> None:
        # All that pika tells is raised too.
        logging.getLogger("pika").setLevel(logging.CRITICAL)
        self._settings = settings
        self._connection: Any = connect(settings)
        negotiated = _negotiated(self._connection)
        properties = negotiated.server_properties or {}
        self.product = str(properties.get("product", ""))
        self.version = str(properties.get("version", ""))
        self.heartbeat = int(negotiated.params.heartbeat or 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye; what fails at that does not matter."""
        if self._connection.is_open:
            with contextlib.suppress(BrokerError), translated(self._settings, "closing"):
                self._connection.close()

    def attempt(self, doing: str, act: Callable[[Any], T]) -> T | Refusal:
        """Do something on a channel of its own.

        Args:
            doing: What, for the message of an error.
            act: Is given the channel.

        Returns:
            What `act` gave, or the broker's refusal.

        Raises:
            BrokerError: The connection failed.
        """
        results: list[T] = []
        with translated(self._settings, doing):
            refusal = refusal_of(self._connection, lambda channel: results.append(act(channel)))
        return Refusal(*refusal) if refusal else results[0]


def _negotiated(connection: Any) -> Any:
    """The connection below the blocking one: pika shows what was agreed on by no public name."""
    return connection._impl  # pylint: disable=protected-access
