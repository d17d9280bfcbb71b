"""The names and arguments of the queues (docs/protocol.md, section 1). Pure: it knows no broker.

`model_training` belongs to the backend; everything named after it belongs to the worker.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from consumer.settlement import Queue


@dataclasses.dataclass(frozen=True, slots=True)
class QueueDeclaration:
    """One durable queue on the broker.

    Attributes:
        name: Its name.
        arguments: Its arguments; two declarations of a name must agree in them.
        ours: The worker declares it and so decides its arguments; otherwise what exists is taken as
            it is.
    """

    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    ours: bool = True

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
