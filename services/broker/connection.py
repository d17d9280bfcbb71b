"""The owner of a connection: a thread that connects, publishes, takes deliveries and settles them.

    connect ─▶ declare ─▶ turn: events, publications, settlements, subscriptions ─▶ turn …
       ▲                                      │ connection lost
       └─── jittered back-off, for ever ◀─────┘

One thread owns the connection and does nothing else, so heartbeats go on through a job of any
length. Handlers work in other threads and never touch the connection.

A job goes on if the connection, its channel or its consumer closes. The owner reconnects at once,
so that the job's publications can be made, but subscribes again only after the job has ended. Until
then the broker may deliver the message to another worker, which finds the job's record. A tag of a
closed channel is never acknowledged.

A lane serves one or several queues and holds at most one delivery over all of them. RabbitMQ has no
such limit for quorum queues (`basic.qos` with `global` is refused), so a lane has one consumer at a
time, with a prefetch of one, and moves it from queue to queue. Before the last delivery is
acknowledged the consumer is cancelled; then the queue with waiting messages that was served longest
ago is next. An idle lane moves when another of its queues has messages, at the next look at the
queues. So the broker keeps every other message ready for other workers, and no queue starves.

Stop order: cancel the consumers; wait for the handlers, which obey the same stop; make their
publications; acknowledge or return; close, which returns the rest.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from services.broker.client import Link, Subscription
from services.broker.outbox import Backoff, Outbox, Parcel
from services.broker.settlement import Delivery, Publication, Queue, Settlement
from utils.errors import BrokerError, BrokerRefused, PublicationRefused, Refusal
from utils.logger import get_logger

log = get_logger(__name__)

STEADY_SECONDS = 5.0  # a connection that lives so long resets the back-off
STOP_CHECK_SECONDS = 0.1
TURN_SECONDS = 0.25
RESUBSCRIBE_SECONDS = 1.0  # no hot loop with a broker that cancels each consumer
LOOK_SECONDS = 3.0  # between two looks at the queues, one short request per queue

Start = Callable[[Delivery, Callable[[Settlement], None]], None]
"""Starts to handle a delivery in another thread, which calls the function with the settlement."""


class BrokerEvents(Protocol):
    """Gets the events of a connection, in the owner's thread."""

    def connected(self, *, again: bool) -> None:
        """The connection is up; `again`: not for the first time."""

    def disconnected(self) -> None:
        """The connection is lost."""

    def took(self, delivery: Delivery) -> None:
        """A message was delivered."""

    def looked(self, queue: Queue, messages: int, consumers: int) -> None:
        """A queue has this many waiting messages and consumers."""

    def publication_refused(self, refusal: Refusal) -> None:
        """The broker did not take a publication. It is tried again."""

    def publication_stuck(self) -> None:
        """The broker does not take a publication even in its shortest form. It is tried again."""


class InHand:
    """A delivery between its arrival and its settlement.

    Attributes:
        delivery: The message.
        subscription: The subscription that delivered it; the tag is valid only there.
        tag: AMQP's delivery tag.
        settlement: The handler's decision; None while it works.
    """

    def __init__(self, delivery: Delivery, subscription: Subscription, tag: int) -> None:
        self.delivery = delivery
        self.subscription = subscription
        self.tag = tag
        self.settlement: Settlement | None = None
        self._confirmations: tuple[Future[None], ...] | None = None

    def decide(self, settlement: Settlement) -> None:
        """Store the settlement that the handler returned."""
        self.settlement = settlement

    def collect(self, outbox: Outbox) -> None:
        """Put the settlement's publications into the outbox, once."""
        if self.settlement and self._confirmations is None:
            self._confirmations = tuple(outbox.put(one) for one in self.settlement.publish)

    def is_settled(self) -> bool:
        """Whether every publication is confirmed, so that the action may follow."""
        confirmations = self._confirmations
        return confirmations is not None and all(one.done() for one in confirmations)


class Lane:
    """Queues with one handler, one subscription at a time, and one delivery in hand.

    Args:
        queues: The queues.
        start: Starts the handler for a delivery.
        limit: The lane takes no more deliveries than this.
    """

    def __init__(self, queues: Sequence[Queue], start: Start, limit: float = math.inf) -> None:
        self._start = start
        self._left = limit
        self._order = list(queues)  # the queue that was served longest ago comes first
        self._resting_at = queues[0]
        self._is_called_away = False
        self._subscription: Subscription | None = None
        self._subscribed_at = float("-inf")
        self._hand: InHand | None = None

    @property
    def in_hand(self) -> InHand | None:
        """The delivery in hand."""
        return self._hand

    def is_working(self) -> bool:
        """Whether a handler has not returned yet."""
        return self._hand is not None and self._hand.settlement is None

    def is_spent(self) -> bool:
        """Whether the lane has taken all that it may take."""
        return self._left <= 0

    def is_consuming(self) -> bool:
        """Whether the broker would deliver a message."""
        return self._subscription is not None and self._subscription.is_consuming

    def takes_from(self, subscription: Subscription) -> bool:
        """Whether the subscription is the lane's present one."""
        return subscription is self._subscription

    def take(self, delivery: Delivery, tag: int, wake: Callable[[], None]) -> None:
        """Handle a delivery of the present subscription, and call `wake` when that is done."""
        assert self._subscription is not None
        hand = self._hand = InHand(delivery, self._subscription, tag)
        self._left -= 1
        self._order.remove(delivery.queue)
        self._order.append(delivery.queue)

        def decide(settlement: Settlement) -> None:
            hand.decide(settlement)
            wake()

        self._start(delivery, decide)

    def collect(self, outbox: Outbox) -> None:
        """Put the publications of a handler that has returned into the outbox."""
        if self._hand:
            self._hand.collect(outbox)

    def looked(self, waiting: Mapping[Queue, int]) -> None:
        """Note the number of waiting messages per queue: an idle lane moves to where some are."""
        elsewhere = (waiting.get(queue, 0) for queue in self._order if queue != self._resting_at)
        self._is_called_away = any(elsewhere)

    def tend(self, link: Link, arrived: Callable[[Subscription, Delivery, int], None]) -> None:
        """Cancel or make the subscription as the lane's state asks for.

        Args:
            link: The connection.
            arrived: Called for each message of a new subscription.
        """
        if self._is_to_move():
            self._cancel()
            self._subscribed_at = float("-inf")
        if self.is_spent():
            self._cancel()
        elif not self._hand and not self.is_consuming():
            now = time.monotonic()
            if now >= self._subscribed_at + RESUBSCRIBE_SECONDS:
                self._subscribed_at = now
                self._subscribe(link, arrived)

    def stop(self) -> None:
        """Take nothing more."""
        self._cancel()

    def settle(self) -> None:
        """Answer a delivery whose publications are confirmed, if its channel is still there."""
        hand = self._hand
        if hand is None or hand.settlement is None or not hand.is_settled():
            return
        self._hand = None
        if self.takes_from(hand.subscription) and hand.subscription.is_open:
            hand.subscription.answer(hand.tag, hand.settlement.action)
        else:
            queue = str(hand.delivery.queue)
            log.info("acknowledgement_dropped", queue=queue, why="its channel is gone")

    def disconnected(self) -> None:
        """The connection is gone, and the subscription with it."""
        self._subscription = None

    def _is_to_move(self) -> bool:
        if len(self._order) == 1 or not self.is_consuming():
            return False
        return self._hand.is_settled() if self._hand else self._is_called_away

    def _cancel(self) -> None:
        if self._subscription and self._subscription.is_consuming:
            self._subscription.cancel()

    def _subscribe(
        self, link: Link, arrived: Callable[[Subscription, Delivery, int], None]
    ) -> None:
        if self._subscription:
            self._subscription.close()
        if len(self._order) > 1:
            lengths = ((queue, link.look(queue)) for queue in self._order)
            waiting = (queue for queue, found in lengths if found and found[0])
            self._resting_at = next(waiting, self._resting_at)
        self._is_called_away = False
        self._subscription = link.subscribe(self._resting_at, arrived)


class BrokerLoop:
    """Keeps a connection up, publishes, and settles deliveries until it is stopped.

    Args:
        connect: Makes a connection; called in the owner's thread.
        lanes: The work of the first keeps the worker busy. None: the loop only publishes.
        stop: Set to end the loop.
        stop_seconds: The longest time from the stop to the return of `run`.
        events: Gets the connection's events.
        idle_seconds: Stop when the first lane has taken and settled all that it may take, and after
            this many seconds without a message; None: only when stopped.
        outbox: Holds publications of other threads; a new one if None.

    Attributes:
        connected: Whether the connection is up.
        consuming: Whether a message of the first lane would be taken now.
    """

    def __init__(
        self,
        connect: Callable[[], Link],
        lanes: Sequence[Lane],
        *,
        stop: threading.Event,
        stop_seconds: float,
        events: BrokerEvents,
        idle_seconds: float | None = None,
        outbox: Outbox | None = None,
    ) -> None:
        self.connected = False
        self.consuming = False
        self._connect_link = connect
        self._link: Link | None = None
        self._lanes = tuple(lanes)
        self._stop = stop
        self._stop_seconds = stop_seconds
        self._events = events
        self._idle_seconds = idle_seconds
        self._outbox = outbox or Outbox()
        self._turned_at = self._idle_since = time.monotonic()
        self._look_at = float("-inf")
        self._abandoned = threading.Event()
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a message of the first lane is in hand."""
        return bool(self._lanes) and self._lanes[0].in_hand is not None

    def turned_within(self, seconds: float) -> bool:
        """Whether the owner's thread has turned in this time, connected or not."""
        return time.monotonic() - self._turned_at < seconds

    def run(self) -> None:
        """Serve until `stop` is set. Blocks; call it once.

        Raises:
            BrokerRefused: Waiting cannot help: credentials, virtual host, permissions, a queue that
                exists with other arguments.
        """
        owner = threading.Thread(target=self._own, name="broker", daemon=True)
        owner.start()
        while owner.is_alive() and not self._stop.wait(STOP_CHECK_SECONDS):
            if self._idle_seconds is not None and self._has_done_its_part(self._idle_seconds):
                self._stop.set()
        deadline = time.monotonic() + self._stop_seconds
        while owner.is_alive() and time.monotonic() < deadline:
            if not self.connected and self._is_idle():
                break  # nothing to settle, and no connection to close
            owner.join(0.05)
        self._abandoned.set()
        if owner.is_alive() and not self._is_idle():
            log.warning("stopped_with_unsettled_work", after=self._stop_seconds)
        if self._failure is not None:
            raise self._failure

    def publish(self, publication: Publication) -> Future[None]:
        """Publish from any thread; a lost connection only delays it.

        Returns:
            Done when the broker has confirmed the message; cancelled if the loop ended before.
        """
        confirmed = self._outbox.put(publication)
        self.wake()
        return confirmed

    def wake(self) -> None:
        """End the owner's wait for events; from any thread, in any state of the connection."""
        if (link := self._link) is not None:
            link.wake()

    # Everything below runs in the owner's thread.

    def _own(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # pylint: disable=broad-exception-caught  # `run` raises it
            self._failure = error
        finally:
            self._disconnect()
            self._outbox.abandon()

    def _serve(self) -> None:
        backoff = Backoff()
        connections = 0
        while not self._is_over():
            self._turned_at = time.monotonic()
            steady_at = float("inf")
            try:
                link = self._connect()
                self._events.connected(again=connections > 0)
                connections += 1
                steady_at = time.monotonic() + STEADY_SECONDS
                while not self._is_over():
                    self._turn(link)
            except BrokerError as error:
                # A job that runs is trained to its end: its record and its model need no broker.
                if isinstance(error, BrokerRefused) and not self._is_working():
                    raise
                if not isinstance(error, PublicationRefused):
                    self._outbox.acquit()
                if time.monotonic() > steady_at:
                    backoff.reset()
                delay = backoff.next()
                log.warning("broker_lost", error=str(error), retry_in=round(delay, 1))
                self._disconnect()
                self._events.disconnected()
                self._pause(delay)

    def _connect(self) -> Link:
        link = self._link = self._connect_link()
        self.connected = True
        link.declare()
        return link

    def _disconnect(self) -> None:
        self.connected = self.consuming = False
        link, self._link = self._link, None
        for lane in self._lanes:
            lane.disconnected()
        if link is not None:
            link.close()

    def _turn(self, link: Link) -> None:
        self._turned_at = time.monotonic()
        link.process_events(TURN_SECONDS)
        for lane in self._lanes:
            lane.collect(self._outbox)
        self._publish_due(link)
        for lane in self._lanes:
            # In this order: a consumer that is to go is cancelled before its last message is
            # acknowledged, and the broker sends it no other.
            if self._stop.is_set():
                lane.stop()
            else:
                lane.tend(link, self._arrived)
            lane.settle()
        self.consuming = bool(self._lanes) and self._lanes[0].is_consuming()
        if self._turned_at >= self._look_at:
            self._look_at = self._turned_at + LOOK_SECONDS
            self._look(link)

    def _look(self, link: Link) -> None:
        waiting: dict[Queue, int] = {}
        for queue in link.queues:
            if found := link.look(queue):
                waiting[queue] = found[0]
                self._events.looked(queue, *found)
        for lane in self._lanes:
            lane.looked(waiting)

    def _arrived(self, subscription: Subscription, delivery: Delivery, tag: int) -> None:
        for lane in self._lanes:
            if lane.takes_from(subscription) and not self._stop.is_set():
                self._events.took(delivery)
                lane.take(delivery, tag, self.wake)
        # Any other goes back with its channel.

    def _publish_due(self, link: Link) -> None:
        for parcel in self._outbox.due():
            if parcel.is_suspect:
                link.probe()
            try:
                link.publish(parcel.form)
            except BrokerError as error:
                self._put_off(parcel, error)
                if isinstance(error, BrokerRefused) or not link.is_open:
                    raise
            else:
                self._outbox.confirm(parcel)

    def _put_off(self, parcel: Parcel, error: BrokerError) -> None:
        """Try a publication again later, so that others pass; shorten it after many refusals."""
        refusal = error.refusal if isinstance(error, PublicationRefused) else Refusal.LOST
        queue, task_id = str(parcel.form.queue), parcel.form.message_id
        is_shorter = parcel.strike(refusal, str(error))
        delay = self._outbox.put_off(parcel)
        self._events.publication_refused(refusal)
        log.warning(
            "publication_refused",
            queue=queue,
            task_id=task_id,
            refusal=refusal.value,
            error=str(error),
            retry_in=round(delay, 1),
        )
        if is_shorter:
            log.error("publication_shortened", queue=queue, task_id=task_id, cut=parcel.is_cut)
        elif parcel.is_stuck:
            self._events.publication_stuck()
            log.error("publication_stuck", queue=queue, task_id=task_id, error=str(error))

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; settle what a handler returns, and notice the stop."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._is_over():
            for lane in self._lanes:
                lane.collect(self._outbox)
                lane.settle()
            time.sleep(0.05)

    def _has_done_its_part(self, idle_seconds: float) -> bool:
        """Whether nothing is left to wait for. A broker that is away is waited for."""
        if self._lanes[0].is_spent():
            return self._is_idle()
        if not self.consuming or not self._is_idle():
            self._idle_since = time.monotonic()
        return time.monotonic() - self._idle_since >= idle_seconds

    def _is_working(self) -> bool:
        return any(lane.is_working() for lane in self._lanes)

    def _is_idle(self) -> bool:
        return self._outbox.is_empty() and all(lane.in_hand is None for lane in self._lanes)

    def _is_over(self) -> bool:
        return self._abandoned.is_set() or (self._stop.is_set() and self._is_idle())
