"""Carries a schedule out, and writes the time line."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

from sandbox.backend import Answer
from tests.chaos.fleet import Fleet, Slot, wait_for
from tests.chaos.jobs import Jobs
from tests.chaos.schedule import Fault, Kind
from tests.chaos.timing import ATTEMPTS_TO_SPARE, DEAD_QUEUE, MAX_ATTEMPTS, QUEUE
from tests.chaos.windows import (
    Window,
    anything,
    conditional_writes,
    progress,
    writes,
)
from tests.chaos.world import Message, Ways, World
from tests.integration.services.s3_proxy import Fault as S3Fault
from tests.integration.services.s3_proxy import refusal

PREEMPTION_SECONDS = 5.0
_PATIENCE_SECONDS = 8.0
"""How long a fault waits until it can be carried out."""
_COUNTED = {
    Kind.WORKER_KILLED,
    Kind.CHILD_KILLED,
    Kind.CHILD_HANGS,
    Kind.FROZEN,
    Kind.CRASH_POINT,
    Kind.S3_500,
    Kind.S3_503,
    Kind.S3_RESET,
    Kind.S3_AWAY,
    Kind.S3_SLOW,
    Kind.S3_SILENT,
    Kind.S3_ANSWER_LOST,
}
"""What can cost a job an attempt."""

_OF_PROCESSES = {
    Kind.WORKER_KILLED,
    Kind.CHILD_KILLED,
    Kind.CHILD_HANGS,
    Kind.FROZEN,
    Kind.PREEMPTED,
    Kind.CRASH_POINT,
    Kind.DISK_FULL,
}
"""What is done to one worker."""

_AT_WORK = {Kind.CHILD_HANGS, Kind.FROZEN}
"""What shows something only while the worker trains."""

_S3_FAULTS: dict[Kind, tuple[S3Fault, Callable[[str, str], bool]]] = {
    Kind.S3_500: (refusal(500, "InternalError"), anything),
    Kind.S3_503: (refusal(503, "SlowDown"), anything),
    Kind.S3_SLOW: (S3Fault(delay=0.25), anything),
    # Longer than any time-out of the workers, and than their lease.
    Kind.S3_SILENT: (S3Fault(delay=4.0, reset=True, forward=False), anything),
    Kind.S3_ANSWER_LOST: (S3Fault(reset=True), writes),
    Kind.S3_409: (refusal(409, "ConditionalRequestConflict"), conditional_writes),
    Kind.S3_RESET: (S3Fault(reset=True, forward=False), anything),
    Kind.S3_AWAY: (S3Fault(reset=True, forward=False), anything),
}


class TimeLine:
    """What the suite did, for people: printed when an invariant is broken."""

    def __init__(self, path: Path) -> None:
        self.began = time.monotonic()
        self.lines: list[str] = []
        self._path = path
        self._lock = threading.Lock()

    def note(self, text: str) -> None:
        """Add a line."""
        with self._lock:
            self.lines.append(f"{time.monotonic() - self.began:8.2f} s  {text}")
            self._path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


class Injector:
    """Breaks what the schedule says.

    Args:
        world: Servers and proxies.
        fleet: The workers.
        jobs: What was published.
        line: The time line.
    """

    def __init__(self, world: World, fleet: Fleet, jobs: Jobs, line: TimeLine) -> None:
        self._world, self._fleet, self._jobs, self._line = world, fleet, jobs, line
        self._threads: list[threading.Thread] = []
        self._freezing = threading.Lock()
        self._busy: set[int] = set()  # slots that are frozen or shutting down
        self.dead: list[Message] = []  # what deleted dead queues held
        self.errors: list[BaseException] = []

    def inject(self, fault: Fault) -> bool:
        """Carry out one fault. What lasts goes on in a thread.

        Returns:
            Whether it could be carried out.
        """
        time.sleep(fault.pause)
        if reason := self._hindrance(fault):
            self._line.note(f"{fault.number:3}  left out, {reason}: {fault}")
            return False
        self._line.note(f"{fault.number:3}  {fault}")
        if fault.kind in _S3_FAULTS:
            self._s3(fault)
        elif fault.kind.name.startswith("BACKEND_"):
            self._backend(fault)
        elif fault.kind in (Kind.BROKER_KILLED, Kind.BROKER_RESTARTED):
            self._aside(lambda: self._restart_broker(fault))
        elif fault.kind.name.startswith("BROKER_"):
            self._broker_way(fault)
        elif fault.kind is Kind.QUEUE_DELETED:
            self._aside(lambda: self._delete_queue(fault))
        elif fault.kind is Kind.PUBLISHED_TWICE:
            _in_time(self._two_workers_are_idle)
            self._aside(lambda: self._publish_twice(fault))
        else:
            self._process(fault, self._fleet.slots[fault.slot])
        return True

    def _hindrance(self, fault: Fault) -> str | None:
        """Why the fault cannot be carried out, after some patience; None where it can."""
        if fault.kind in _COUNTED and not _in_time(self._attempts_are_left):
            return "a job has few attempts left"
        if fault.kind not in _OF_PROCESSES:
            return None
        slot = self._fleet.slots[fault.slot]
        if not _in_time(lambda: fault.slot not in self._busy):
            return "the worker is frozen or shutting down"
        if fault.kind is Kind.CRASH_POINT:
            _in_time(slot.has_no_order)  # else that point is far away, and this order replaces it
        if fault.kind is Kind.CHILD_KILLED and not _in_time(lambda: slot.child is not None):
            return "it has no trainer process"
        if fault.kind is Kind.FROZEN:
            # One at a time: its job is to be taken from it, by one that is awake.
            with self._freezing:
                pass
        # While it trains the desk replaces it after STALL_SECONDS; elsewhere after minutes.
        if fault.kind in _AT_WORK and not _in_time(slot.is_training):
            return "it trains nothing"
        return None

    def cease(self) -> None:
        """Nothing goes wrong from now on; returns when what lasted is over."""
        for thread in self._threads:
            thread.join()
        self._world.calm()
        for slot in self._fleet.slots:
            slot.withdraw_order()
            slot.disk_full(False)
        if self.errors:
            raise self.errors[0]

    def _attempts_are_left(self) -> bool:
        """A job must be left an attempt beyond those that faults may cost it at once."""
        live = [one for one in self._world.records().values() if one["state"] == "live"]
        return all(one["attempts"] <= MAX_ATTEMPTS - ATTEMPTS_TO_SPARE for one in live)

    def _two_workers_are_idle(self) -> bool:
        return self._jobs.unended() <= len(self._fleet.slots) - 2

    def _process(self, fault: Fault, slot: Slot) -> None:
        match fault.kind:
            case Kind.WORKER_KILLED:
                slot.signal(signal.SIGKILL)
            case Kind.CHILD_KILLED:
                _kill(slot.child, signal.SIGKILL)
            case Kind.CHILD_HANGS:
                _kill(slot.child, signal.SIGSTOP)
            case Kind.CRASH_POINT:
                assert fault.order
                slot.order(fault.order)
                if fault.order.point.endswith("requeue"):  # only who shuts down returns a message
                    self._aside(lambda: self._preempt(fault, slot), slot=fault.slot)
            case Kind.FROZEN:
                self._freezing.acquire()  # pylint: disable=consider-using-with
                self._aside(lambda: self._freeze(fault, slot), slot=fault.slot)
            case Kind.PREEMPTED:
                self._aside(lambda: self._preempt(fault, slot), slot=fault.slot)
            case Kind.DISK_FULL:
                self._aside(lambda: self._fill_disk(fault, slot))
            case kind:
                raise AssertionError(kind)

    def _freeze(self, fault: Fault, slot: Slot) -> None:
        try:
            who = slot.who
            slot.signal(signal.SIGSTOP, with_child=True)
            self._jobs.journal.note("frozen", slot=who)
            time.sleep(fault.seconds)
            if slot.who == who:
                slot.signal(signal.SIGCONT, with_child=True)
            self._jobs.journal.note("thawed", slot=who)
            self._line.note(f"{fault.number:3}  … worker {fault.slot} goes on")
        finally:
            self._freezing.release()

    def _preempt(self, fault: Fault, slot: Slot) -> None:
        if not slot.preempt(PREEMPTION_SECONDS):
            self._line.note(f"{fault.number:3}  … worker {fault.slot} was killed after the grace")

    def _fill_disk(self, fault: Fault, slot: Slot) -> None:
        slot.disk_full(True)
        time.sleep(fault.seconds)
        slot.disk_full(False)

    def _s3(self, fault: Fault) -> None:
        what, hits = _S3_FAULTS[fault.kind]
        chance = 1.0 if fault.kind is Kind.S3_AWAY else fault.chance
        for way in self._ways(fault):
            way.s3.add(
                Window(
                    until=time.monotonic() + fault.seconds,
                    chance=chance,
                    dice=random.Random(fault.seed),
                    fault=what,
                    hits=hits,
                )
            )

    def _backend(self, fault: Fault) -> None:
        if fault.kind is Kind.BACKEND_CUT:
            # Half of them in the middle of the answer's head or body, half before its first byte.
            self._world.backend_way.cut_answers((0, 30)[fault.detail % 2], fault.seconds)
            return
        location = f"{self._world.elsewhere.url}/api/webhooks/training/progress"
        answers = {
            Kind.BACKEND_500: Answer(500, body=b"oops"),
            Kind.BACKEND_429: Answer(429, MappingProxyType({"Retry-After": "1"})),
            Kind.BACKEND_HANGS: Answer(delay=4.0),
            Kind.BACKEND_REDIRECTS: Answer(
                (301, 302, 307, 308)[fault.detail % 4], MappingProxyType({"Location": location})
            ),
        }
        self._world.mood.add(
            Window(
                until=time.monotonic() + fault.seconds,
                chance=fault.chance,
                dice=random.Random(fault.seed),
                fault=answers[fault.kind],
                hits=progress if fault.kind is Kind.BACKEND_REDIRECTS else anything,
            )
        )

    def _broker_way(self, fault: Fault) -> None:
        for way in self._ways(fault):
            match fault.kind:
                case Kind.BROKER_RESET:
                    way.broker.reset()
                case Kind.BROKER_SILENT:
                    way.broker.go_silent(fault.seconds)
                case Kind.BROKER_HALF_OPEN:
                    way.broker.half_open(server_knows=bool(fault.detail % 2))
                case Kind.BROKER_REFUSES:
                    way.broker.refuse(fault.seconds)

    def _restart_broker(self, fault: Fault) -> None:
        with self._world.broker_turn:
            if fault.kind is Kind.BROKER_RESTARTED:
                self._world.broker.restart()
            else:
                self._world.broker.kill()
                time.sleep(fault.seconds)
                self._world.broker.start()
        self._line.note(f"{fault.number:3}  … the broker is back")

    def _delete_queue(self, fault: Fault) -> None:
        own = [name for name in self._world.queues() if name not in (QUEUE, DEAD_QUEUE)]
        name = (QUEUE, QUEUE, DEAD_QUEUE, own[fault.detail // 4 % len(own)])[fault.detail % 4]
        with self._world.broker_turn:
            held = self._world.delete_queue(name)
            self._world.declare()
            if name == DEAD_QUEUE:
                self.dead += held
            again = self._jobs.publish_unclaimed(
                {body for _, body in held} if name != QUEUE else None
            )
        self._line.note(f"{fault.number:3}  … {name}; published again: {again or 'none'}")

    def _publish_twice(self, fault: Fault) -> None:
        if fault.detail % 2:
            self._jobs.publish_again(fault.detail)
        else:
            self._jobs.publish(times=2)  # two workers get it at the same moment

    def _ways(self, fault: Fault) -> list[Ways]:
        return self._world.ways if fault.slot < 0 else [self._world.ways[fault.slot]]

    def _aside(self, act: Callable[[], None], *, slot: int | None = None) -> None:
        def run() -> None:
            try:
                act()
            except BaseException as error:  # pylint: disable=broad-exception-caught
                self.errors.append(error)  # `cease` raises it
            finally:
                if slot is not None:
                    self._busy.discard(slot)

        if slot is not None:
            self._busy.add(slot)
        thread = threading.Thread(target=run, name="fault", daemon=True)
        self._threads.append(thread)
        thread.start()


def _in_time(condition: Callable[[], bool]) -> bool:
    return wait_for(condition, _PATIENCE_SECONDS, every=0.3)


def _kill(process: int | None, number: int) -> None:
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
