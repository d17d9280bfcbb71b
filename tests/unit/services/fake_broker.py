"""A broker's side without a broker: a clock that tests move, and a loop whose broker is a list."""

# Tests drive the loop turn by turn instead of running it.
# pylint: disable=protected-access

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from consumer.pages.observer import Observer
from services.broker import connection as broker_loop
from services.broker import outbox
from services.broker.connection import BrokerLoop
from services.broker.lane import InHand, Lane
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


@dataclasses.dataclass(eq=False)
class Channel:
    """A channel of a lane."""

    is_open: bool = True
    consumer_tags: list[str] = dataclasses.field(default_factory=lambda: ["tag"])


class FakeLoop(BrokerLoop):
    """A loop that notes its acts.

    Attributes:
        acts: What was done on the broker, in order.
        published: The publications that were taken.
        fails: Raises an error instead of an act; given the act's name.
        refuses: Raises an error for a publication.
        survives: Whether the connection stands after an error.
    """

    def __init__(self, *lanes: Lane, **how: Any) -> None:
        self.stop = threading.Event()
        self.observer = Observer()
        how.setdefault("stop_seconds", 5.0)
        how.setdefault("observer", self.observer)
        super().__init__(lanes, self.stop, **how)
        self.acts: list[str] = []
        self.published: list[Publication] = []
        self.fails: Callable[[str], BaseException | None] = lambda act: None
        self.refuses: Callable[[Publication], BaseException | None] = lambda publication: None
        self.survives = True
        self.woken = threading.Event()
        self.events: Callable[[], None] = lambda: None

    def _act(self, act: str) -> None:
        self.acts.append(act)
        self._fail(self.fails(act))

    def _fail(self, error: BaseException | None) -> None:
        if isinstance(error, BaseException):
            self.connected = self.connected and self.survives
            raise error

    def _connect(self) -> None:
        self._act("connect")
        self.connected = True

    def _disconnect(self) -> None:
        self._act("disconnect")
        self.connected = self.consuming = False
        for lane in self._lanes:
            lane.channel = None

    def _is_connected(self) -> bool:
        return self.connected

    def _process_events(self) -> None:
        self._fail(self.fails("events"))
        self.events()

    def _wake(self) -> None:
        self.woken.set()

    def _publish(self, publication: Publication) -> None:
        self.acts.append(f"publish {publication.body.decode()[:20]}")
        self._fail(self.refuses(publication))
        self.published.append(publication)

    def _probe(self) -> None:
        self._act("probe")

    def _answer(self, hand: InHand, action: Action) -> None:
        self._act(f"{action} {hand.tag}")

    def _look_at_queues(self) -> None:
        self._act("look")

    def _subscribe(self, lane: Lane) -> None:
        self._act(f"subscribe {lane.queue}")
        lane.channel = Channel()

    def _unsubscribe(self, lane: Lane) -> None:
        self._act(f"unsubscribe {lane.queue}")
        lane.channel.consumer_tags.clear()

    def turn(self) -> list[str]:
        """One turn of a connection; answers what it did."""
        self.acts.clear()
        self.connected = True
        self._turn()
        return [act for act in self.acts if act != "look"]

    def is_over(self) -> bool:
        """Whether the owner's thread would end now."""
        return self._is_over()

    def has_done_its_part(self, idle_seconds: float) -> bool:
        """Whether a worker of one message would end now."""
        return self._has_done_its_part(idle_seconds)


def lane(queue: Queue = Queue.TRAINING, **how: Any) -> Lane:
    """A lane that consumes, and whose handler nobody calls."""
    how.setdefault("observer", Observer())
    made = Lane(queue, lambda delivery: Settlement.ack(), lambda: None, **how)
    made.channel = Channel()
    return made


def hold(of: Lane, settlement: Settlement | None = None, tag: int = 7) -> InHand:
    """Put a delivery into the lane's hand, whose handler has come to this settlement."""
    of.in_hand = InHand(Delivery(b"message", queue=of.queue), of.channel, tag)
    of.in_hand.settlement = settlement
    return of.in_hand


def dead(body: bytes = b"letter") -> Publication:
    """A publication."""
    return Publication(Queue.DEAD, body, "task")


def lost() -> BrokerError:
    """The connection is gone."""
    return BrokerError("the connection is gone")
