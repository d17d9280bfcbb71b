"""Lists the dead queue without removing messages, and sends messages back from it.

AMQP can only deliver messages. So they are fetched on one channel without an acknowledgement, and
return to their places when the channel closes. A quorum queue counts the returns and drops a
message at its limit. Therefore a message that was returned often is replaced by a new copy, so that
listing never loses a message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cli.broker import NOT_FOUND, BrokerVisit, ChannelClose, publish_on
from services.broker.settlement import (
    BODY_BYTES,
    BODY_SHA256,
    Delivery,
    Publication,
    Queue,
)
from services.broker.topology import name_of
from utils.errors import BrokerError
from utils.settings.groups import BrokerSettings

MOST_RETURNS = 10  # RabbitMQ 4 drops a message of a quorum queue after 20


@dataclasses.dataclass(frozen=True, slots=True)
class DeadLetter:
    """One message of the dead queue.

    Attributes:
        number: Its place in the queue, from 1.
        code: The reason as a `utils.errors.ErrorCode`; empty for a message that the broker itself
            has moved there.
        reason: The reason in words.
        task_id: The task's id; empty if the message has none.
        attempts: Attempts made, as far as they were counted.
        body: The message as it was published.
        headers: The headers that a copy of the original keeps.
    """

    number: int
    code: str
    reason: str
    task_id: str
    attempts: int
    body: bytes
    headers: Mapping[str, str | int | bool]

    @property
    def is_cut(self) -> bool:
        """The body is only the beginning of the message, because the broker refused the whole."""
        return BODY_SHA256 in self.headers


Judge = Callable[[DeadLetter], Publication | None]
"""Returns the message that replaces a letter; None leaves the letter in its place."""


def go_through(settings: BrokerSettings, judge: Judge, *, limit: int) -> int:
    """Show every message of the dead queue to `judge`, and replace those for which it returns one.

    A message leaves the dead queue only after the broker has confirmed its replacement.

    Args:
        settings: The broker and the queue.
        judge: Sees each message, oldest first.
        limit: The most messages to show.

    Returns:
        The number of messages that were not shown.

    Raises:
        BrokerError: The broker failed. Messages without a confirmed replacement are still in the
            dead queue.
    """
    dead = name_of(settings.training_queue, Queue.DEAD)

    def act(channel: Any) -> int:
        channel.confirm_delivery()
        left: int = channel.queue_declare(dead, passive=True).method.message_count
        # Counted before: new copies are at the end of the queue, and are not shown again.
        for tag, returns, letter in _fetched(channel, dead, min(left, limit)):
            publication = judge(letter)
            if publication is None and returns >= MOST_RETURNS:
                publication = _copy(letter)
            if publication is not None:
                visit.ensure(publication.queue)
                publish_on(channel, settings, publication)
                channel.basic_ack(tag)
        return max(0, left - limit)

    with BrokerVisit(settings) as visit:
        answer = visit.attempt(f"reading the queue {dead}", act)
    if isinstance(answer, ChannelClose):
        if answer.code == NOT_FOUND:
            return 0  # no worker has declared it yet
        raise BrokerError(f"RabbitMQ refuses to read the queue {dead}: {answer.text}")
    return answer


def _fetched(channel: Any, queue: str, count: int) -> Iterator[tuple[int, int, DeadLetter]]:
    """Each message with its tag, and how often it was returned before."""
    for number in range(1, count + 1):
        method, properties, body = channel.basic_get(queue)
        if method is None:
            return
        headers = properties.headers or {}
        returns = headers.get("x-delivery-count")
        yield method.delivery_tag, returns if isinstance(returns, int) else 0, _letter(
            number, properties, body
        )


def _letter(number: int, properties: Any, body: bytes) -> DeadLetter:
    message_id = properties.message_id if isinstance(properties.message_id, str) else None
    delivery = Delivery(body=body, message_id=message_id, headers=properties.headers or {})
    headers = delivery.headers
    attempts = headers.get("x-attempts")
    return DeadLetter(
        number=number,
        code=str(headers.get("x-error-code", "")),
        reason=str(headers.get("x-error-message", "")),
        task_id=str(headers.get("x-task-id", "")) or message_id or "",
        attempts=attempts if isinstance(attempts, int) else 0,
        body=body,
        headers=delivery.carried_headers
        | {name: headers[name] for name in (BODY_BYTES, BODY_SHA256) if name in headers},
    )


def _copy(letter: DeadLetter) -> Publication:
    reasons: dict[str, str | int | bool] = {
        "x-error-code": letter.code,
        "x-error-message": letter.reason,
        "x-task-id": letter.task_id,
        "x-attempts": letter.attempts,
    }
    return Publication(
        Queue.DEAD, letter.body, letter.task_id or None, {**letter.headers, **reasons}
    )
