"""The worker's side of the broker: which queues it serves, and the threads of its handlers.

`services.broker.connection` owns the connection. A handler runs in a separate thread, uses no
AMQP and returns a `Settlement`. The message of a handler that breaks is put off, and becomes a dead
letter if that happens too often.
"""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Callable, Sequence

from consumer.pages.observer import Observer
from services.broker.client import ANSWER_SECONDS, Link
from services.broker.connection import BrokerLoop, Lane
from services.broker.outbox import Outbox
from services.broker.settlement import CRASHES, OWN_COPY, PUT_OFFS, Delivery, Queue, Settlement
from utils.errors import ErrorCode
from utils.logger import get_logger
from utils.settings.groups import BrokerSettings

log = get_logger(__name__)

MAX_CRASHES = 5
"""Times that a message is put off; the next crash makes it a dead letter."""

Handler = Callable[[Delivery], Settlement]


def training_consumer(
    settings: BrokerSettings,
    *,
    handle: Handler,
    handle_ending: Handler | None = None,
    queues: Sequence[Queue] = (Queue.TRAINING,),
    stop: threading.Event,
    stop_seconds: float,
    retry_delays: Sequence[float],
    ending_retry_delays: Sequence[float],
    observer: Observer | None = None,
    once_idle: float | None = None,
    answer_seconds: float = ANSWER_SECONDS,
    outbox: Outbox | None = None,
) -> BrokerLoop:
    """The broker's loop of a worker, which takes one training message at a time over all queues.

    Args:
        settings: Hosts, credentials, heartbeat, name of the backend's queue.
        handle: Handles a training message; obeys `stop` by itself.
        handle_ending: Handles a message of the endings' queue, also while a job is trained; None to
            leave that queue to others.
        queues: The training queues; the first is `Queue.TRAINING`.
        stop: Set to stop the worker.
        stop_seconds: The longest time that stopping takes.
        retry_delays: Seconds before each further attempt at a message whose handler broke.
        ending_retry_delays: The same for messages of the endings' queue.
        observer: Gets connections, deliveries and the queues' lengths.
        once_idle: Take one training message and stop, or stop after this many seconds without one.
        answer_seconds: The longest wait for a confirm or any other answer of the broker.
        outbox: Takes publications from threads other than the handlers'; a new one if None.
    """
    observer = observer or Observer()
    jobs = HandlerThreads(handle, retry_delays, observer)
    lanes = [Lane(queues, jobs.start, math.inf if once_idle is None else 1)]
    if handle_ending:
        endings = HandlerThreads(handle_ending, ending_retry_delays, observer)
        lanes.append(Lane((Queue.ENDINGS,), endings.start))
    return BrokerLoop(
        functools.partial(
            Link,
            settings,
            training_queues=queues,
            delays=retry_delays,
            answer_seconds=answer_seconds,
        ),
        lanes,
        stop=stop,
        stop_seconds=stop_seconds,
        events=observer,
        idle_seconds=once_idle,
        outbox=outbox,
    )


class HandlerThreads:
    """Runs a handler in a thread per delivery, one at a time.

    Args:
        handle: The handler.
        crash_delays: Seconds before a message whose handler broke comes back, by the number of
            times that this happened before; the last one repeats.
        observer: Counts messages that are put off or given up.
    """

    def __init__(self, handle: Handler, crash_delays: Sequence[float], observer: Observer) -> None:
        self._handle = handle
        self._crash_delays = tuple(crash_delays)
        self._observer = observer

    def start(self, delivery: Delivery, decide: Callable[[Settlement], None]) -> None:
        """Handle a delivery in a new thread, which calls `decide` with the settlement."""
        name = f"{delivery.queue}-handler"
        threading.Thread(target=self._work, args=(delivery, decide), name=name, daemon=True).start()

    def _work(self, delivery: Delivery, decide: Callable[[Settlement], None]) -> None:
        settlement = Settlement.requeue()  # if even the answer to a crash crashes
        try:
            settlement = self._handle(delivery)
        # `BaseException`, because a thread that dies must not keep its message for ever.
        except BaseException as error:  # pylint: disable=broad-exception-caught
            settlement = self._after_crash(delivery, error)
        finally:
            decide(settlement)

    def _after_crash(self, delivery: Delivery, error: BaseException) -> Settlement:
        """Put the message off, or make it a dead letter after too many crashes."""
        crashes = delivery.crashes
        given_up = crashes >= MAX_CRASHES
        delay = self._crash_delays[min(crashes, len(self._crash_delays) - 1)]
        log.error(
            "handler_crashed",
            queue=str(delivery.queue),
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
    """The same message again after a delay, with a count of how often that was done.

    Its `message_id` stays as it was, also if there is none: an id from the worker would change the
    message's meaning. For the same reason it counts as a worker's own copy only if another handler
    may have claimed it before.
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
    """The message as a dead letter. The error's text is left out because it may hold a secret."""
    return Settlement.dead(
        delivery.body,
        code=ErrorCode.TRAINING_FAILED,
        message=f"the worker's handler of the queue {delivery.queue} broke with "
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
