"""A broker that is a list, a loop on it that tests turn by hand, and a clock that tests move."""

# Tests turn the loop themselves and put deliveries into its lanes.
# pylint: disable=protected-access

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from consumer.pages.observer import Observer
from services.broker import connection as broker_loop
from services.broker import outbox
from services.broker.client import Link, Subscription
from services.broker.connection import BrokerLoop, InHand, Lane
from services.broker.settlement import Action, Delivery, Publication, Queue, Settlement
from utils.errors import BrokerError


def soon(condition: Callable[[], Any]) -> None:
    """Wait for another thread; fails if the condition does not become true."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept = 0.0

    def monotonic(self) -> float:
        """The time that the test has set."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Moves the clock."""
        self.now += seconds
        self.slept += seconds


@pytest.fixture(name="clock")
def clock_fixture(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the loop and of the outbox."""
    clock = Clock()
    monkeypatch.setattr(broker_loop, "time", clock)
    monkeypatch.setattr(outbox, "time", clock)
    monkeypatch.setattr("services.broker.outbox.random.uniform", lambda least, most: most)
    return clock


class FakeSubscription:
    """A consumer on a broker that is a list.

    Attributes:
        act: Notes an act.
        on_its_way: A message that arrives during the cancellation of the consumer.
    """

    def __init__(
        self,
        queue: Queue = Queue.TRAINING,
        act: Callable[[str], None] = lambda act: None,
        arrived: Callable[[Subscription, Delivery, int], None] | None = None,
    ) -> None:
        self.queue = queue
        self.is_open = self.is_consuming = True
        self.on_its_way: Delivery | None = None
        self.act = act
        self._arrived = arrived

    def answer(self, tag: int, action: Action) -> None:
        """Note the answer."""
        self.act(f"{action} {tag}")

    def cancel(self) -> None:
        """Note it, and deliver a message that was under way."""
        self.act(f"unsubscribe {self.queue}")
        self.is_consuming = False
        if self.on_its_way and self._arrived:
            self.deliver(self.on_its_way)

    def deliver(self, delivery: Delivery, tag: int = 7) -> None:
        """Have a message arrive."""
        assert self._arrived
        self._arrived(cast(Subscription, self), delivery, tag)

    def close(self) -> None:
        """Close the channel."""
        self.is_open = self.is_consuming = False


class FakeLink:
    """A connection to a broker that is a list.

    Attributes:
        acts: The acts on the broker, in order.
        published: The accepted publications.
        waiting: The number of waiting messages per queue.
        subscriptions: The consumers that were made, the newest last.
        fails: Raises an error instead of an act; given the act's name.
        refuses: Raises an error for a publication.
        survives: Whether the connection stands after an error.
        woken: Set when the owner's wait was ended.
    """

    def __init__(self) -> None:
        self.acts: list[str] = []
        self.published: list[Publication] = []
        self.waiting: dict[Queue, int] = {Queue.TRAINING: 0}
        self.subscriptions: list[FakeSubscription] = []
        self.fails: Callable[[str], BaseException | None] = lambda act: None
        self.refuses: Callable[[Publication], BaseException | None] = lambda publication: None
        self.survives = True
        self.is_open = True
        self.woken = threading.Event()
        self._next_turn: list[Callable[[], None]] = []

    def on_next_turn(self, act: Callable[[], None]) -> None:
        """Do something once, in the owner's thread."""
        self._next_turn.append(act)

    @property
    def queues(self) -> tuple[Queue, ...]:
        """The queues whose length is asked for."""
        return tuple(self.waiting)

    def act(self, act: str) -> None:
        """Note an act, or fail at it."""
        self.acts.append(act)
        self._fail(self.fails(act))

    def connect(self) -> Link:
        """Connect, unless the test fails it."""
        self.act("connect")
        self.is_open = True
        return cast(Link, self)

    def declare(self) -> None:
        """All queues exist."""

    def close(self) -> None:
        """The loop has disconnected."""
        self.act("disconnect")
        self.is_open = False

    def process_events(self, seconds: float) -> None:
        """Let the test do what a broker would."""
        assert seconds > 0
        self._fail(self.fails("events"))
        threading.Event().wait(0.001)  # other threads run
        while self._next_turn:
            self._next_turn.pop()()

    def publish(self, publication: Publication) -> None:
        """Take a publication unless the test refuses it."""
        self.acts.append(f"publish {publication.body.decode()[:20]}")
        self._fail(self.refuses(publication))
        self.published.append(publication)

    def probe(self) -> None:
        """Note the probe."""
        self.act("probe")

    def look(self, queue: Queue) -> tuple[int, int] | None:
        """The number of waiting messages, and one consumer."""
        self.act(f"look {queue}")
        return self.waiting[queue], 1

    def subscribe(
        self, queue: Queue, arrived: Callable[[Subscription, Delivery, int], None]
    ) -> Subscription:
        """Make a consumer."""
        self.act(f"subscribe {queue}")
        self.subscriptions.append(FakeSubscription(queue, self.act, arrived))
        return cast(Subscription, self.subscriptions[-1])

    def wake(self) -> None:
        """Note it."""
        self.woken.set()

    def _fail(self, error: BaseException | None) -> None:
        if isinstance(error, BaseException):
            self.is_open = self.is_open and self.survives
            raise error


class FakeLoop(BrokerLoop):
    """A loop on a broker that is a list.

    Attributes:
        broker: The broker.
        stop: Stops the loop.
        observer: Gets the events.
    """

    def __init__(self, *lanes: Lane, **how: Any) -> None:
        self.broker = FakeLink()
        self.stop = threading.Event()
        self.observer = Observer()
        how = (
            dict[str, Any]()
            | {"stop": self.stop, "stop_seconds": 5.0, "events": self.observer}
            | how
        )
        super().__init__(self.broker.connect, lanes, **how)
        for each in lanes:
            if each._subscription:
                subscription_of(each).act = self.broker.act

    def turn(self) -> list[str]:
        """One turn of a connection; returns what it did."""
        self.broker.acts.clear()
        self.broker.is_open = self.connected = True
        self._link = cast(Link, self.broker)
        self._turn(self._link)
        return [act for act in self.broker.acts if not act.startswith("look")]


def lane(*queues: Queue, limit: float = math.inf) -> Lane:
    """A lane that consumes its first queue, and whose handler never returns."""
    made = Lane(queues or (Queue.TRAINING,), lambda delivery, decide: None, limit)
    subscribe(made)
    return made


def subscription_of(of: Lane) -> FakeSubscription:
    """The lane's present subscription."""
    return cast(FakeSubscription, of._subscription)


def subscribe(to: Lane) -> FakeSubscription:
    """Give a lane a new subscription without the broker's knowledge."""
    made = FakeSubscription(to._resting_at)
    to._subscription = cast(Subscription, made)
    return made


def hold(of: Lane, settlement: Settlement | None = None, tag: int = 7) -> InHand:
    """Give a lane a delivery whose handler has returned this settlement."""
    subscription = cast(Subscription, of._subscription or subscribe(of))
    hand = of._hand = InHand(Delivery(b"message", queue=of._resting_at), subscription, tag)
    if settlement:
        hand.decide(settlement)
    return hand


def release(of: Lane) -> None:
    """Remove a lane's delivery."""
    of._hand = None


def dead(body: bytes = b"letter") -> Publication:
    """A publication."""
    return Publication(Queue.DEAD, body, "task")


def lost() -> BrokerError:
    """The connection is gone."""
    return BrokerError("the connection is gone")
