"""The names and arguments of the queues (docs/protocol.md, section 1). Pure: it knows no broker.

`model_training` belongs to the backend; everything named after it belongs to the worker.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from services.broker.settlement import Queue

CLASSIC, QUORUM, STREAM = "classic", "quorum", "stream"

IMPOSSIBLE = {"x-max-age": "1X"}
"""Arguments that no queue can have: an age without a unit that exists. Only streams know the
argument, and they refuse this value."""
TYPE_TRIAL = {"x-queue-type": STREAM} | IMPOSSIBLE
"""Arguments of a declaration that is always refused; the refusal tells an existing queue's type."""
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
        arguments: The arguments that decide what becomes of its messages. Two declarations of a
            name must agree in them, but for those that go with the queue's type.
        ours: The worker declares it and so decides its arguments; otherwise what exists is taken as
            it is.
    """

    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    ours: bool = True

    def variants(self, queue_type: str | None) -> tuple[dict[str, Any], ...]:
        """The arguments that an own queue may have: first those of a new one, then those of an
        existing one that is taken as it is, since it differs in its type alone.

        Args:
            queue_type: Type of the training queue; None where it is not known.
        """
        classic, plain = self.arguments, self.arguments | {"x-queue-type": QUORUM}
        full = plain | self._of_quorum()
        return (full, plain, classic) if queue_type == QUORUM else (classic, full, plain)

    def _of_quorum(self) -> dict[str, Any]:
        if "x-dead-letter-exchange" not in self.arguments:
            return {"x-delivery-limit": MANY_RETURNS}
        # Without these RabbitMQ drops what expires while the node or the target is away.
        return {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}

    def conflict(self, reply: str) -> str:
        """What a person should know when the broker has the name with other arguments, and says
        `reply`.
        """
        if not self.ours:
            return f"The queue {self.name} cannot be declared durable, without arguments ({reply})"
        return (
            f"The queue {self.name} exists with other arguments than this worker's own "
            f"({self.arguments or 'none'}). It belongs to the worker: move its messages elsewhere "
            f"and delete it, or choose another TRAINING_QUEUE ({reply})"
        )


def declaration(
    training_queue: str, queue: Queue, delay_seconds: float | None = None
) -> QueueDeclaration:
    """The queue to publish to, so that a message reaches `queue`, after `delay_seconds` if given.

    A delay queue has no consumer: what lies in it for its time to live is moved on to the queue
    that it leads to. One queue a delay, because messages leave a queue only at its head: a long
    delay would hold up a short one behind it.
    """
    name = name_of(training_queue, queue)
    if delay_seconds is None:
        return QueueDeclaration(name, ours=queue is not Queue.TRAINING)
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
    return training_queue if queue is Queue.TRAINING else f"{training_queue}.{queue.value}"


def queue_type_of(reply: str) -> str | None:
    """The type of an existing queue, by the broker's answer to `TYPE_TRIAL`; None if that does not
    tell it.
    """
    if match := _TYPE.search(reply):
        # Declared without a type, as the backend does on a virtual host without a default.
        return CLASSIC if match["type"] == "none" else match["type"]
    # A queue that differs from a stream in its age alone is a stream.
    return STREAM if different_argument(reply) == "x-max-age" else None


def different_argument(reply: str) -> str | None:
    """The argument in which an existing queue differs, by the broker's answer to a declaration."""
    match = _DIFFERENT.search(reply)
    return match["argument"] if match else None


def tells_more_than_the_type(reply: str) -> bool:
    """Whether a refused declaration differs in something else than what goes with the type."""
    return different_argument(reply) not in _OF_THE_TYPE
