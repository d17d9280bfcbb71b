"""The queues on the broker: names, arguments, declarations (docs/protocol.md, section 1).

`model_training` belongs to the backend. Every queue that is named after it belongs to the worker.
Nothing here imports the client: `Declarations` works through a function that it is given.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from services.broker.settlement import Queue
from utils.errors import BrokerError, BrokerRefused

CLASSIC, QUORUM, STREAM = "classic", "quorum", "stream"
NOT_FOUND, PRECONDITION_FAILED = 404, 406

IMPOSSIBLE = {"x-max-age": "1X"}
"""Arguments that no queue can have: an age with an unknown unit. Only streams know the argument,
and they refuse this value."""
TYPE_TRIAL = {"x-queue-type": STREAM} | IMPOSSIBLE
"""Arguments of a declaration that is always refused. The refusal names an existing queue's type."""
MANY_RETURNS = 1_000_000
"""RabbitMQ 4 drops a message of a quorum queue after 20 returns unless the queue has a limit."""

_TYPE = re.compile(
    r"inequivalent arg 'x-queue-type'.* but current is (?:the value )?'?(?P<type>\w+)"
)
_DIFFERENT = re.compile(r"inequivalent arg '(?P<argument>[\w-]+)'")
_OF_THE_TYPE = frozenset(
    {"x-queue-type", "x-overflow", "x-dead-letter-strategy", "x-delivery-limit"}
)


@dataclasses.dataclass(frozen=True, slots=True)
class QueueDeclaration:
    """One durable queue on the broker.

    Attributes:
        name: Its name.
        arguments: The arguments that decide what happens to its messages. Two declarations of a
            name must agree in them, except in those that belong to the queue's type.
        ours: The worker decides the arguments of a new queue; otherwise a new one has none, as the
            backend declares it.
        as_found: An existing queue is used with any arguments.
    """

    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    ours: bool = True
    as_found: bool = False

    def variants(self, queue_type: str | None) -> tuple[dict[str, Any], ...]:
        """The arguments that a queue of the worker may have.

        The first are those of a new queue. An existing queue may have the others, which differ only
        in the queue's type.

        Args:
            queue_type: Type of the backend's queue; None if it is not known.
        """
        classic, plain = self.arguments, self.arguments | {"x-queue-type": QUORUM}
        full = plain | self._of_quorum()
        return (full, plain, classic) if queue_type == QUORUM else (classic, full, plain)

    def _of_quorum(self) -> dict[str, Any]:
        if "x-dead-letter-exchange" not in self.arguments:
            return {"x-delivery-limit": MANY_RETURNS}
        # Without these RabbitMQ drops messages that expire while the node or the target is away.
        return {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}

    def conflict(self, reply: str) -> str:
        """The error message for a queue with other arguments; `reply` is the broker's."""
        if self.as_found:
            return f"The queue {self.name} cannot be declared durable, without arguments ({reply})"
        return (
            f"The queue {self.name} exists with other arguments than this worker's own "
            f"({self.arguments or 'none'}). It belongs to the worker: move its messages elsewhere "
            f"and delete it, or choose another TRAINING_QUEUE ({reply})"
        )


def declaration(
    training_queue: str, queue: Queue, delay_seconds: float | None = None
) -> QueueDeclaration:
    """The queue to publish to so that a message reaches `queue`, after `delay_seconds` if given.

    A delay queue has no consumer. Its messages expire after the delay and move to the queue that it
    leads to. There is one queue per delay because messages leave a queue only at its head: behind a
    long delay a short one would wait.
    """
    name = name_of(training_queue, queue)
    if delay_seconds is None:
        return QueueDeclaration(name, ours=queue != Queue.TRAINING, as_found=queue.is_training)
    milliseconds = max(1, math.ceil(delay_seconds * 1000))
    return QueueDeclaration(
        f"{name}.delay.{milliseconds}",
        {
            "x-message-ttl": milliseconds,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": name,
        },
    )


def name_of(training_queue: str, queue: Queue) -> str:
    """The queue's name on the broker."""
    return training_queue + queue.suffix


def queue_type_of(reply: str) -> str | None:
    """The type of an existing queue, from the broker's answer to `TYPE_TRIAL`.

    It is None if the answer does not name it.
    """
    if match := _TYPE.search(reply):
        # Declared without a type, as the backend does on a virtual host without a default.
        return CLASSIC if match["type"] == "none" else match["type"]
    # A queue that differs from a stream only in its age is a stream.
    return STREAM if different_argument(reply) == "x-max-age" else None


def different_argument(reply: str) -> str | None:
    """The argument in which an existing queue differs, from the answer to a declaration."""
    match = _DIFFERENT.search(reply)
    return match["argument"] if match else None


def tells_more_than_the_type(reply: str) -> bool:
    """Whether an existing queue differs in an argument that does not belong to the queue's type."""
    return different_argument(reply) not in _OF_THE_TYPE


Attempt = Callable[[str, Callable[[Any], object]], tuple[int, str] | None]
"""Runs an act on a channel that is opened for it; the first argument describes it for errors.

Returns the code and text of the broker's 404 or 406, or None. Raises `BrokerError` for any other
error."""


class Declarations:
    """The queues that were declared on one connection.

    Args:
        training_queue: Name of the backend's queue.
        attempt: Runs an act on the connection.
    """

    def __init__(self, training_queue: str, attempt: Attempt) -> None:
        self._training_queue = training_queue
        self._attempt = attempt
        self._declared: set[str] = set()
        self._queue_type: str | None = None

    def of(self, queue: Queue, delay_seconds: float | None = None) -> QueueDeclaration:
        """The queue to publish to so that a message reaches `queue`."""
        return declaration(self._training_queue, queue, delay_seconds)

    def begin(self) -> None:
        """Declare the backend's queue and find out its type, which the worker's new queues get too.

        Raises:
            BrokerError: The broker fails; `BrokerRefused` if waiting cannot help.
        """
        queue = self.of(Queue.TRAINING)
        self.ensure(queue)
        refusal = self._attempt(
            f"looking at {queue.name}",
            lambda channel: channel.queue_declare(queue.name, durable=True, arguments=TYPE_TRIAL),
        )
        self._queue_type = queue_type_of(refusal[1]) if refusal else None

    def ensure(self, queue: QueueDeclaration, *, again: bool = False) -> None:
        """Declare a queue unless that was done before.

        Args:
            queue: The queue.
            again: Declare it in any case, because it may have been deleted.

        Raises:
            BrokerError: The broker fails; `BrokerRefused` if the queue cannot be used.
        """
        if again or queue.name not in self._declared:
            if queue.as_found:
                self._ensure_as_found(queue)
            else:
                self._ensure_with_arguments(queue)
            self._declared.add(queue.name)

    def forget(self, queue: QueueDeclaration) -> None:
        """Declare the queue again before its next use, because it may have been deleted."""
        self._declared.discard(queue.name)

    def _ensure_as_found(self, queue: QueueDeclaration) -> None:
        refusal = self._declare(queue.name, passive=True)
        if refusal and refusal[0] == NOT_FOUND:
            # The backend's queue exactly as the backend declares it; else the broker refuses the
            # backend's own declaration.
            arguments = queue.variants(self._queue_type)[0] if queue.ours else None
            refusal = self._declare(queue.name, durable=True, arguments=arguments or None)
        if refusal:
            raise BrokerRefused(queue.conflict(refusal[1]))

    def _ensure_with_arguments(self, queue: QueueDeclaration) -> None:
        refusals: list[str] = []
        for arguments in queue.variants(self._queue_type):
            refusal = self._declare(queue.name, durable=True, arguments=arguments or None)
            if refusal is None:
                return
            if refusal[0] != PRECONDITION_FAILED:
                raise BrokerError(f"RabbitMQ failed while declaring {queue.name} ({refusal[1]})")
            refusals.append(refusal[1])
        shown = next(filter(tells_more_than_the_type, refusals), refusals[0])
        raise BrokerRefused(queue.conflict(shown))

    def _declare(self, name: str, **how: Any) -> tuple[int, str] | None:
        return self._attempt(
            f"declaring {name}", lambda channel: channel.queue_declare(name, **how)
        )
