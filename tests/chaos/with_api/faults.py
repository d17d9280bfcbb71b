"""Faults of the API: its processes, its database, its webhooks, its clients."""

from __future__ import annotations

import functools
import random
import signal
import threading
import time
from collections.abc import Callable

import psycopg

from tests.chaos.fleet import Slot, wait_for
from tests.chaos.schedule import Fault, Kind
from tests.chaos.time_line import TimeLine
from tests.chaos.windows import Window, anything
from tests.chaos.with_api.clients import Follower, Orders
from tests.chaos.with_api.ground import DATABASE, ApiGround
from tests.chaos.world import World
from tests.integration.services.s3_proxy import Fault as S3Fault

GRACE_SECONDS = 8.0
_KEPT_SECONDS = 20.0


class ApiFaults:
    """Breaks the API.

    Args:
        world: The servers, with an API.
        ground: The API.
        orders: Its clients that order.
        followers: Its clients that follow events.
        line: The time line.

    Attributes:
        broken: Findings, as sentences.
    """

    def __init__(
        self,
        world: World,
        ground: ApiGround,
        orders: Orders,
        followers: tuple[Follower, ...],
        line: TimeLine,
    ) -> None:
        self.broken: list[str] = []
        self._world, self._ground, self._orders, self._line = world, ground, orders, line
        self._followers = followers
        self._one_at_a_time = threading.Lock()

    def inject(self, fault: Fault) -> None:
        """Carry out one fault; returns when it is over."""
        acts: dict[Kind, Callable[[Fault, Slot], None]] = {
            Kind.API_KILLED: self._kill,
            Kind.API_FROZEN: self._freeze,
            Kind.API_PREEMPTED: self._preempt,
            Kind.API_CRASH_POINT: self._order_death,
            Kind.DATABASE_KILLED: self._kill_database,
            Kind.DATABASE_RESTORED: self._restore_database,
            Kind.NEWS_LATE: self._deliver_late,
            Kind.NEWS_FORGED: self._forge,
            Kind.ORDER_REPEATED: self._repeat_order,
        }
        if act := acts.get(fault.kind):
            act(fault, self._ground.slots[fault.slot % len(self._ground.slots)])
        else:
            self._break_a_way(fault)

    def _struck(self, fault: Fault, times: int = 1) -> None:
        self._world.hits.struck(fault.kind, times)

    def _kill(self, fault: Fault, slot: Slot) -> None:
        self._struck(fault)
        slot.signal(signal.SIGKILL)

    def _freeze(self, fault: Fault, slot: Slot) -> None:
        self._struck(fault)
        slot.signal(signal.SIGSTOP)
        time.sleep(2.5 * fault.seconds)
        slot.signal(signal.SIGCONT)

    def _preempt(self, fault: Fault, slot: Slot) -> None:
        self._struck(fault)
        slot.may_end_with(-signal.SIGTERM)
        if not slot.preempt(GRACE_SECONDS):
            self._line.note(f"{fault.number:3}  … {slot.who} was killed after the grace")

    def _order_death(self, fault: Fault, slot: Slot) -> None:
        assert fault.order
        slot.order(fault.order)

    def _kill_database(self, fault: Fault, _slot: Slot) -> None:
        with self._one_at_a_time:
            self._struck(fault)
            self._ground.node.kill()
            time.sleep(fault.seconds)
            self._ground.node.start()
        self._line.note(f"{fault.number:3}  … the database is back")

    def _restore_database(self, fault: Fault, _slot: Slot) -> None:
        with self._one_at_a_time:
            backup = self._ground.node.dump(DATABASE)
            time.sleep(3 * fault.seconds)
            with self._ground.turn.alone():
                # An order that is not on S3 yet exists only in the database.
                if not wait_for(self._orders_are_kept, _KEPT_SECONDS, every=0.5):
                    self._line.note(f"{fault.number:3}  … left out: an order is not on S3 yet")
                    return
                self._struck(fault)
                self._orders.forget()
                for follower in self._followers:
                    follower.begin_again()
                self._ground.restore(backup)
        ago = 3 * fault.seconds
        self._line.note(f"{fault.number:3}  … the database is that of {ago:.1f} s ago")

    def _orders_are_kept(self) -> bool:
        try:
            found = self._ground.query("SELECT count(*) FROM jobs WHERE order_kept_at IS NULL")
        except psycopg.Error:
            return False
        return not found[0][0]

    def _deliver_late(self, fault: Fault, _slot: Slot) -> None:
        self._ground.recorder.late_until = time.monotonic() + 2 * fault.seconds
        time.sleep(2 * fault.seconds + 1)
        sent, wrong = self._ground.recorder.repeat(fault.seed)
        self._struck(fault, sent)
        self.broken += [f"a webhook that came again was answered {each}" for each in wrong]

    def _forge(self, fault: Fault, _slot: Slot) -> None:
        sent, wrong = self._ground.recorder.forge(fault.seed)
        self._struck(fault, sent)
        self.broken += [f"a forged webhook was answered {each}" for each in wrong]

    def _repeat_order(self, fault: Fault, _slot: Slot) -> None:
        self._struck(fault, self._orders.repeat())

    def _break_a_way(self, fault: Fault) -> None:
        struck = functools.partial(self._world.hits.struck, fault.kind)
        way = self._ground.database_way
        match fault.kind:
            case Kind.DATABASE_RESET:
                way.reset(struck)
            case Kind.DATABASE_SLOW:
                way.slow(0.15, 2 * fault.seconds, struck)
            case Kind.DATABASE_SILENT:
                way.go_silent(fault.seconds, struck)
            case Kind.API_BROKER_RESET:
                self._world.ways[-1].broker.reset(struck)
            case Kind.API_BROKER_SILENT:
                self._world.ways[-1].broker.go_silent(2 * fault.seconds, struck)
            case Kind.API_CONFIRMS_LOST:
                self._world.ways[-1].broker.lose_confirms(2 * fault.seconds, struck)
            case Kind.API_S3_AWAY:
                self._world.ways[-1].s3.add(
                    Window(
                        until=time.monotonic() + fault.seconds,
                        chance=1.0,
                        dice=random.Random(fault.seed),
                        fault=S3Fault(reset=True, forward=False),
                        hits=anything,
                        kind=fault.kind,
                    )
                )
            case kind:
                raise AssertionError(kind)
