"""The listener of the broker connection: it counts and shows, and decides nothing."""

from __future__ import annotations

from typing import Protocol

from services.broker.settlement import Delivery, Queue
from utils.errors import ErrorCode
from utils.metrics import Metrics


class BrokerEvents(Protocol):
    """Hears of connections, deliveries and queues. Called from the connection's own thread.

    Attributes:
        metrics: Counts refused and stuck publications.
    """

    metrics: Metrics

    def connected(self, *, again: bool) -> None:
        """A connection to the broker is open; `again` if it is not the first."""

    def disconnected(self) -> None:
        """The connection is closed."""

    def took(self, delivery: Delivery) -> None:
        """A message was handed over."""

    def looked(self, queue: Queue, messages: int, consumers: int) -> None:
        """The broker reported a queue's length."""

    def put_off(self, reason: str) -> None:
        """A message was put off."""

    def dead_lettered(self, code: ErrorCode) -> None:
        """A message was given up and goes to the dead queue."""
