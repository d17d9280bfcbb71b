"""One queue's deliveries: at most one in hand, handled in a thread of its own.

The thread does no AMQP. It leaves a `Settlement` behind, and the connection's owner carries it out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from consumer.settlement import Delivery, Queue, Settlement
from utils.logger import get_logger

log = get_logger(__name__)

CRASH_DELAY_SECONDS = 10.0

Handler = Callable[[Delivery], Settlement]


class InHand:
    """A delivery between its arrival and its settlement.

    Attributes:
        delivery: The message.
        channel: The channel it came by; its tag means nothing on any other.
        tag: AMQP's delivery tag.
        settlement: What the handler decided; None while it is at work.
        is_collected: The settlement's publications are in the outbox.
        confirmations: One a publication.
    """

    def __init__(self, delivery: Delivery, channel: Any, tag: int) -> None:
        self.delivery = delivery
        self.channel = channel
        self.tag = tag
        self.settlement: Settlement | None = None
        self.is_collected = False
        self.confirmations: tuple[Future[None], ...] = ()

    def is_settled(self) -> bool:
        """Whether every publication is confirmed, so that the action may follow."""
        return self.is_collected and all(one.done() for one in self.confirmations)


class Lane:
    """A queue, who handles its messages, and the one in hand.

    Args:
        queue: The queue.
        handle: Called in a thread of its own, one delivery at a time.
        wake: Called when a handler has returned.
        limit: Take no more than so many deliveries.

    Attributes:
        channel: The connection owner's channel for this queue; None without one.
        opened_at: When it was last subscribed to (`time.monotonic`).
        in_hand: The delivery in hand; None if there is none.
    """

    def __init__(
        self, queue: Queue, handle: Handler, wake: Callable[[], None], limit: float = math.inf
    ) -> None:
        self.queue = queue
        self.channel: Any = None
        self.opened_at = float("-inf")
        self.in_hand: InHand | None = None
        self._handle = handle
        self._wake = wake
        self._left = limit

    def take(self, delivery: Delivery, tag: int) -> None:
        """Start handling a delivery that came by the lane's channel."""
        hand = self.in_hand = InHand(delivery, self.channel, tag)
        self._left -= 1
        threading.Thread(
            target=self._work, args=(hand,), name=f"{self.queue.value}-handler", daemon=True
        ).start()

    def is_working(self) -> bool:
        """Whether a handler has not returned yet."""
        return self.in_hand is not None and self.in_hand.settlement is None

    def is_spent(self) -> bool:
        """Whether it has taken all that it may take."""
        return self._left <= 0

    def is_consuming(self) -> bool:
        """Whether the broker would hand over a message: neither channel nor consumer has gone."""
        return (
            self.channel is not None and self.channel.is_open and bool(self.channel.consumer_tags)
        )

    def _work(self, hand: InHand) -> None:
        settlement = put_off(hand.delivery)  # should the handler break
        try:
            settlement = self._handle(hand.delivery)
        except Exception:  # pylint: disable=broad-exception-caught  # last line of defence
            log.exception("handler_crashed", queue=self.queue.value, again_in=CRASH_DELAY_SECONDS)
        finally:
            hand.settlement = settlement
            self._wake()


def put_off(delivery: Delivery) -> Settlement:
    """The same message again in a while: never lost, and no hot loop.

    Its `message_id` stays as it was, None too: an id that the worker made up would change what the
    message means.
    """
    return Settlement.delayed(
        delivery.body,
        seconds=CRASH_DELAY_SECONDS,
        message_id=delivery.message_id,
        headers=delivery.carried_headers,
        queue=delivery.queue,
    )
