"""Has the worker's queues on the broker: its own as it wants them, the backend's as it is.

Pure: it declares by a function that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from services.broker.settlement import Queue
from services.broker.topology import (
    TYPE_TRIAL,
    QueueDeclaration,
    declaration,
    queue_type_of,
    tells_more_than_the_type,
)
from utils.errors import BrokerError, BrokerRefused

NOT_FOUND, PRECONDITION_FAILED = 404, 406

Attempt = Callable[[str, Callable[[Any], object]], tuple[int, str] | None]
"""Does something on a channel of its own: given what it does, in words, and the act. Answers the
broker's 404 or 406, code and text, or None. Raises `BrokerError` for anything else."""


class Declarations:
    """The queues of one connection.

    Args:
        training_queue: Name of the backend's queue.
        attempt: How something is done on the connection.
    """

    def __init__(self, training_queue: str, attempt: Attempt) -> None:
        self._training_queue = training_queue
        self._attempt = attempt
        self._declared: set[str] = set()
        self._queue_type: str | None = None

    def of(self, queue: Queue, delay_seconds: float | None = None) -> QueueDeclaration:
        """The queue to publish to, so that a message reaches `queue`."""
        return declaration(self._training_queue, queue, delay_seconds)

    def begin(self) -> None:
        """Have the training queue there, and learn its type: own queues are made of the same type.

        Raises:
            BrokerError: The broker fails; `BrokerRefused` where waiting cannot help.
        """
        queue = self.of(Queue.TRAINING)
        self.ensure(queue)
        refusal = self._attempt(
            f"looking at {queue.name}",
            lambda channel: channel.queue_declare(queue.name, durable=True, arguments=TYPE_TRIAL),
        )
        self._queue_type = queue_type_of(refusal[1]) if refusal else None

    def ensure(self, queue: QueueDeclaration, *, again: bool = False) -> None:
        """Have a queue there.

        Args:
            queue: The queue.
            again: Also where it was there before: it may have been deleted since.

        Raises:
            BrokerError: The broker fails; `BrokerRefused` where the queue cannot be used.
        """
        if again or queue.name not in self._declared:
            if queue.ours:
                self._ensure_ours(queue)
            else:
                self._ensure_the_backends(queue)
            self._declared.add(queue.name)

    def forget(self, queue: QueueDeclaration) -> None:
        """The queue may be gone: it is declared again before it is used."""
        self._declared.discard(queue.name)

    def _ensure_ours(self, queue: QueueDeclaration) -> None:
        refusals: list[str] = []
        for arguments in queue.variants(self._queue_type):
            refusal = self._declare(queue.name, durable=True, arguments=arguments or None)
            if refusal is None:
                return
            if refusal[0] != PRECONDITION_FAILED:
                raise BrokerError(f"RabbitMQ failed while declaring {queue.name} ({refusal[1]})")
            refusals.append(refusal[1])
        told = next(filter(tells_more_than_the_type, refusals), refusals[0])
        raise BrokerRefused(queue.conflict(told))

    def _ensure_the_backends(self, queue: QueueDeclaration) -> None:
        refusal = self._declare(queue.name, passive=True)
        if refusal and refusal[0] == NOT_FOUND:
            # Exactly as the backend declares it, or the backend's own declaration is refused.
            refusal = self._declare(queue.name, durable=True)
        if refusal:
            raise BrokerRefused(queue.conflict(refusal[1]))

    def _declare(self, name: str, **how: Any) -> tuple[int, str] | None:
        return self._attempt(
            f"declaring {name}", lambda channel: channel.queue_declare(name, **how)
        )
