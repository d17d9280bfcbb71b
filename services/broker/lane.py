"""One queue's deliveries: at most one in hand, handled in a thread of its own.

The thread does no AMQP. It leaves a `Settlement` behind, and the connection's owner carries it out.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from services.broker.events import BrokerEvents
from services.broker.settlement import CRASHES, OWN_COPY, PUT_OFFS, Delivery, Queue, Settlement
from utils.errors import ErrorCode
from utils.logger import get_logger

log = get_logger(__name__)

MAX_CRASHES = 5
"""Times that a message is put off; the next crash makes it a dead letter."""
CRASH_DELAYS = (10.0, 60.0, 600.0)  # seconds

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
        crash_delays: Seconds before a message whose handler broke comes back, by how often that
            happened before; the last repeats.
        observer: Is told of messages that are put off or given up.

    Attributes:
        channel: The connection owner's channel for this queue; None without one.
        opened_at: When it was last subscribed to (`time.monotonic`).
        in_hand: The delivery in hand; None if there is none.
    """

    def __init__(
        self,
        queue: Queue,
        handle: Handler,
        wake: Callable[[], None],
        limit: float = math.inf,
        *,
        crash_delays: Sequence[float] = CRASH_DELAYS,
        observer: BrokerEvents,
    ) -> None:
        self.queue = queue
        self.channel: Any = None
        self.opened_at = float("-inf")
        self.in_hand: InHand | None = None
        self._handle = handle
        self._wake = wake
        self._left = limit
        self._crash_delays = tuple(crash_delays)
        self._observer = observer

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
        settlement = Settlement.requeue()  # if even the answer to a crash crashes
        try:
            settlement = self._handle(hand.delivery)
        # Also what is no `Exception`: a thread that dies must not keep its message for ever.
        except BaseException as error:  # pylint: disable=broad-exception-caught
            settlement = self._after_crash(hand.delivery, error)
        finally:
            hand.settlement = settlement
            self._wake()

    def _after_crash(self, delivery: Delivery, error: BaseException) -> Settlement:
        """Put the message off, or make it a dead letter if that has been tried often enough."""
        crashes = delivery.crashes
        given_up = crashes >= MAX_CRASHES
        delay = self._crash_delays[min(crashes, len(self._crash_delays) - 1)]
        log.error(
            "handler_crashed",
            queue=self.queue.value,
            task_id=_task_id(delivery),
            crashes=crashes + 1,
            again_in=None if given_up else delay,
            exc_info=error,
        )
        if given_up:
            self._observer.dead_lettered(ErrorCode.TRAINING_FAILED)
            return give_up(delivery, error)
        self._observer.put_off("crash")
        return put_off(delivery, delay)


def put_off(delivery: Delivery, seconds: float) -> Settlement:
    """The same message again in a while, with a count of how often that was done.

    Its `message_id` stays as it was, None too: an id that the worker made up would change what the
    message means. For the same reason it counts as a worker's own copy only if another handler may
    have claimed it before.
    """
    headers = delivery.carried_headers | {
        PUT_OFFS: delivery.put_offs + 1,
        CRASHES: delivery.crashes + 1,
    }
    if delivery.redelivered:
        headers[OWN_COPY] = True
    return Settlement.delayed(
        delivery.body,
        seconds=seconds,
        message_id=delivery.message_id,
        headers=headers,
        queue=delivery.queue,
    )


def give_up(delivery: Delivery, error: BaseException) -> Settlement:
    """The message as a dead letter. The error's text is left out: it may hold a secret."""
    return Settlement.dead(
        delivery.body,
        code=ErrorCode.TRAINING_FAILED,
        message=f"the worker's handler of the queue {delivery.queue.value} broke with "
        f"{type(error).__name__} each time; the worker's log has the stack trace "
        "(handler_crashed)",
        task_id=_task_id(delivery),
        attempts=delivery.crashes + 1,
        min_level=delivery.min_level,
    )


def _task_id(delivery: Delivery) -> str | None:
    """The task's id as far as it can be read without trusting the message."""
    if delivery.message_id:
        return delivery.message_id
    try:
        given = json.loads(delivery.body)["task_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return given if isinstance(given, str) and given.isascii() and 0 < len(given) <= 128 else None
