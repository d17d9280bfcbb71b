"""The life of the thread that owns a connection: serve, back off, come back, stop. No AMQP here."""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from services.broker.events import BrokerEvents
from services.broker.lane import InHand, Lane
from services.broker.outbox import Backoff, Outbox, Parcel
from services.broker.settlement import Action, Publication
from utils.errors import BrokerError, BrokerRefused, PublicationRefused, Refusal
from utils.logger import get_logger

log = get_logger(__name__)

STEADY_SECONDS = 5.0  # a connection that lived so long makes the next back-off short again
STOP_CHECK_SECONDS = 0.1
RESUBSCRIBE_SECONDS = 1.0  # no hot loop with a broker that cancels each consumer
LOOK_SECONDS = 3.0  # between two looks at the queues' lengths, one short request a queue


class BrokerLoop(abc.ABC):
    """Keeps a connection up and work settled until told to stop.

    Args:
        lanes: The queues; the first is the one whose work keeps the worker busy.
        stop: Set by whoever wants it to end.
        stop_seconds: How long `run` may take after that.
        observer: Is told of connections and of the queues' lengths.
        idle_seconds: Stop by itself once the first lane has taken and settled all that it may, and
            after so many seconds in which nothing came; None: only when told to.
        outbox: Where publications come from; one of its own if None.

    Attributes:
        connected: Whether there is a connection at the moment.
        consuming: Whether a message of the first lane would be taken at the moment.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        stop: threading.Event,
        stop_seconds: float,
        observer: BrokerEvents,
        idle_seconds: float | None = None,
        outbox: Outbox | None = None,
    ) -> None:
        self._observer = observer
        self._turned_at = time.monotonic()
        self._look_at = float("-inf")
        self.connected = False
        self.consuming = False
        self._lanes = tuple(lanes)
        self._outbox = outbox or Outbox()
        self._stop = stop
        self._stop_seconds = stop_seconds
        self._idle_seconds = idle_seconds
        self._idle_since = time.monotonic()
        self._abandoned = threading.Event()
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a training message is in hand."""
        return self._lanes[0].in_hand is not None

    def turned_within(self, seconds: float) -> bool:
        """Whether the owner's thread has come round in that time, connected or not."""
        return time.monotonic() - self._turned_at < seconds

    def run(self) -> None:
        """Consume until `stop` is set. Blocks; call it once.

        Raises:
            BrokerRefused: Waiting cannot help: credentials, virtual host, permissions, a
                conflicting declaration.
        """
        owner = threading.Thread(target=self._own, name="broker", daemon=True)
        owner.start()
        while owner.is_alive() and not self._stop.wait(STOP_CHECK_SECONDS):
            if self._idle_seconds is not None and self._has_done_its_part(self._idle_seconds):
                self._stop.set()
        deadline = time.monotonic() + self._stop_seconds
        while owner.is_alive() and time.monotonic() < deadline:
            if not self.connected and self._is_idle():
                break  # nothing to settle, and nobody to say goodbye to
            owner.join(0.05)
        self._abandoned.set()
        if owner.is_alive() and not self._is_idle():
            log.warning("stopped_with_unsettled_work", after=self._stop_seconds)
        if self._failure is not None:
            raise self._failure

    def publish(self, publication: Publication) -> Future[None]:
        """Publish from any thread; waits through a lost connection.

        Returns:
            Done when the broker has confirmed the message; cancelled if the consumer ended before.
        """
        confirmed = self._outbox.put(publication)
        self._wake()
        return confirmed

    @abc.abstractmethod
    def _connect(self) -> None:
        """Connect and declare. Raises `BrokerError`."""

    @abc.abstractmethod
    def _disconnect(self) -> None:
        """Close what there is; nothing that fails here matters. The lanes' channels are None
        afterwards.
        """

    @abc.abstractmethod
    def _is_connected(self) -> bool:
        """Whether the connection still stands."""

    @abc.abstractmethod
    def _process_events(self) -> None:
        """Handle what the broker sent, waiting a moment for it. Raises `BrokerError`."""

    @abc.abstractmethod
    def _wake(self) -> None:
        """End the wait of `_process_events`; called from any thread."""

    @abc.abstractmethod
    def _publish(self, publication: Publication) -> None:
        """Publish, and wait for the broker's confirmation, no longer than a limit.

        Raises `BrokerError`, as `PublicationRefused` where the publication may be at fault.
        """

    @abc.abstractmethod
    def _probe(self) -> None:
        """See that the broker takes a publication at all; leaves nothing behind. Raises
        `BrokerError`.
        """

    @abc.abstractmethod
    def _answer(self, hand: InHand, action: Action) -> None:
        """Acknowledge a delivery or return it, by its own open channel. Raises `BrokerError`."""

    @abc.abstractmethod
    def _look_at_queues(self) -> None:
        """Ask the broker for the queues' lengths, and tell the observer. Raises `BrokerError`."""

    @abc.abstractmethod
    def _subscribe(self, lane: Lane) -> None:
        """Give the lane a new channel that consumes. Raises `BrokerError`."""

    @abc.abstractmethod
    def _unsubscribe(self, lane: Lane) -> None:
        """Have no more messages sent to the lane. Raises `BrokerError`."""

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
                self._connect()
                self._observer.connected(again=connections > 0)
                connections += 1
                steady_at = time.monotonic() + STEADY_SECONDS
                while not self._is_over():
                    self._turn()
            except BrokerError as error:
                # Refused or not, a job in hand is trained to its end: its record and its model need
                # no broker.
                if isinstance(error, BrokerRefused) and not self._is_working():
                    raise
                if not isinstance(error, PublicationRefused):
                    self._outbox.acquit()
                if time.monotonic() > steady_at:
                    backoff.reset()
                delay = backoff.next()
                log.warning("broker_lost", error=str(error), retry_in=round(delay, 1))
                self._disconnect()
                self._observer.disconnected()
                self._pause(delay)

    def _turn(self) -> None:
        self._turned_at = time.monotonic()
        self._process_events()
        for lane in self._lanes:
            self._collect(lane)
        self._publish_due()
        for lane in self._lanes:
            # In this order: a lane that may take no more is cancelled before its last message is
            # acknowledged, and the broker sends it no other.
            self._tend(lane)
            self._settle(lane)
        self.consuming = self._lanes[0].is_consuming()
        if self._turned_at >= self._look_at:
            self._look_at = self._turned_at + LOOK_SECONDS
            self._look_at_queues()

    def _collect(self, lane: Lane) -> None:
        """Bring what a handler wants published on its way."""
        hand = lane.in_hand
        if hand and hand.settlement and not hand.is_collected:
            hand.confirmations = tuple(self._outbox.put(one) for one in hand.settlement.publish)
            hand.is_collected = True

    def _publish_due(self) -> None:
        for parcel in self._outbox.due():
            if parcel.is_suspect:
                self._probe()
            try:
                self._publish(parcel.form)
            except BrokerError as error:
                self._put_off(parcel, error)
                if isinstance(error, BrokerRefused) or not self._is_connected():
                    raise
            else:
                self._outbox.confirm(parcel)

    def _put_off(self, parcel: Parcel, error: BrokerError) -> None:
        """Let the others pass a publication that failed, and give up a form of it that is refused
        again and again.
        """
        refusal = error.refusal if isinstance(error, PublicationRefused) else Refusal.LOST
        queue, task_id = parcel.form.queue.value, parcel.form.message_id
        is_shorter = parcel.strike(refusal, str(error))
        delay = self._outbox.put_off(parcel)
        self._observer.metrics.publications_refused.labels(refusal).inc()
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
            self._observer.metrics.publications_stuck.inc()
            log.error("publication_stuck", queue=queue, task_id=task_id, error=str(error))

    def _settle(self, lane: Lane) -> None:
        """Answer a delivery whose publications are confirmed, if its channel is still there."""
        hand = lane.in_hand
        if hand is None or hand.settlement is None or not hand.is_settled():
            return
        lane.in_hand = None
        if hand.channel is lane.channel and hand.channel.is_open:
            self._answer(hand, hand.settlement.action)
        else:
            log.info("acknowledgement_dropped", queue=lane.queue.value, why="its channel is gone")

    def _tend(self, lane: Lane) -> None:
        """Subscribe where there is neither subscription nor job in hand; not when stopping."""
        if self._stop.is_set() or lane.is_spent():
            if lane.is_consuming():
                self._unsubscribe(lane)
        elif not lane.is_consuming() and not lane.in_hand:
            now = time.monotonic()
            if now >= lane.opened_at + RESUBSCRIBE_SECONDS:
                lane.opened_at = now
                self._subscribe(lane)

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt, noticing handlers that return and the stop."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._is_over():
            for lane in self._lanes:
                self._collect(lane)
                self._settle(lane)
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
