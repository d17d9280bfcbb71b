"""Faults of processes: workers and trainers killed, stopped, preempted, or without disk."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.clock import LONGEST_STEP
from tests.chaos.fleet import ROOT, Fleet, Slot, wait_for
from tests.chaos.hits import Hits
from tests.chaos.jobs import Jobs
from tests.chaos.noted import noted
from tests.chaos.reference import Destiny
from tests.chaos.schedule import Fault, Kind
from tests.chaos.time_line import TimeLine
from tests.chaos.world import World

PREEMPTION_SECONDS = 5.0
CHECKPOINTS_KEPT = 3
PATIENCE_SECONDS = 8.0
"""How long a fault waits until it can be carried out."""


class ProcessFaults:
    """Breaks workers.

    Args:
        world: Servers and proxies.
        fleet: The workers.
        jobs: The published jobs.
        line: The time line.
        old_tree: The last release's code; None if it is not available.

    Attributes:
        errors: Errors of its threads.
        world: Servers and proxies.
    """

    def __init__(
        self, world: World, fleet: Fleet, jobs: Jobs, line: TimeLine, old_tree: Path | None
    ) -> None:
        self.errors: list[BaseException] = []
        self.world = world
        self._world, self._fleet, self._jobs, self._line = world, fleet, jobs, line
        self._old_tree = old_tree
        self._threads: list[threading.Thread] = []
        self._freezing = threading.Lock()
        self._busy: set[int] = set()  # slots that are frozen or shutting down

    @property
    def hits(self) -> Hits:
        """The hits so far."""
        return self.world.hits

    def join(self) -> None:
        """Return when the longer faults are over."""
        for thread in self._threads:
            thread.join()

    def _struck(self, fault: Fault) -> None:
        self._world.hits.struck(fault.kind)

    def _process(self, fault: Fault, slot: Slot) -> None:
        """Break one worker; a longer fault continues in a thread."""
        lasting: dict[Kind, Callable[[], None]] = {
            Kind.STOP_POINT: lambda: self._let_go_on(fault, slot),
            Kind.FROZEN: lambda: self._freeze(fault, slot),
            Kind.PREEMPTED: lambda: self._preempt(fault, slot),
        }
        beside: dict[Kind, Callable[[], None]] = {
            Kind.DISK_FULL: lambda: self._fill_disk(fault, slot),
            Kind.DISK_FULL_MID_WRITE: lambda: self._fill_disk(fault, slot),
            Kind.CLOCK_STEP: lambda: self._step_clock(fault, slot),
        }
        at_once: dict[Kind, Callable[[Fault, Slot], None]] = {
            Kind.WORKER_KILLED: self._kill_worker,
            Kind.CHILD_KILLED: self._kill_child,
            Kind.CHILD_HANGS: self._hang_child,
            Kind.CRASH_POINT: self._order_death,
            Kind.CHECKPOINT_DAMAGED: self._spoil_checkpoint,
            Kind.CHECKPOINT_DELETED: self._spoil_checkpoint,
            Kind.TWO_VERSIONS: self._run_old_release,
        }
        if fault.kind is Kind.STOP_POINT:
            assert fault.order
            slot.order(fault.order)
        elif fault.kind is Kind.FROZEN:
            self._freezing.acquire()  # pylint: disable=consider-using-with
        elif fault.kind is Kind.PREEMPTED and slot.diary.is_busy():
            self._struck(fault)
        if fault.kind in lasting:
            self._aside(lasting[fault.kind], slot=fault.slot)
        elif fault.kind in beside:
            self._aside(beside[fault.kind])
        else:
            at_once[fault.kind](fault, slot)

    def _kill_worker(self, fault: Fault, slot: Slot) -> None:
        if slot.diary.is_busy():
            self._struck(fault)
        slot.signal(signal.SIGKILL)

    def _kill_child(self, fault: Fault, slot: Slot) -> None:
        if slot.diary.is_training():
            self._struck(fault)
        _kill(slot.diary.child(), signal.SIGKILL)

    def _hang_child(self, fault: Fault, slot: Slot) -> None:
        self._struck(fault)
        _kill(slot.diary.child(), signal.SIGSTOP)

    def _order_death(self, fault: Fault, slot: Slot) -> None:
        assert fault.order
        slot.order(fault.order)
        if fault.order.point.endswith("requeue"):  # only a worker that shuts down returns a message
            self._aside(lambda: self._preempt(fault, slot), slot=fault.slot)

    def _freeze(self, fault: Fault, slot: Slot) -> None:
        try:
            self._struck(fault)
            slot.signal(signal.SIGSTOP, with_child=True)
            self._thaw(fault, slot)
        finally:
            self._freezing.release()

    def _let_go_on(self, fault: Fault, slot: Slot) -> None:
        """Wait until the worker has stopped itself at its ordered point; later, continue it."""
        # It stops itself when it has noted the point; the order has gone by then.
        if not wait_for(slot.is_stopped, 3 * PATIENCE_SECONDS, every=0.1):
            slot.withdraw_order()
            if not wait_for(slot.is_stopped, 0.5):
                return
        with self._freezing:
            slot.stop_child()
            self._thaw(fault, slot)

    def _thaw(self, fault: Fault, slot: Slot) -> None:
        who = slot.who
        self._jobs.journal.note("frozen", slot=who)
        time.sleep(fault.seconds)
        if slot.who == who:
            slot.signal(signal.SIGCONT, with_child=True)
        self._jobs.journal.note("thawed", slot=who)
        self._line.note(f"{fault.number:3}  … worker {fault.slot} goes on")

    def _preempt(self, fault: Fault, slot: Slot) -> None:
        if not slot.preempt(PREEMPTION_SECONDS):
            self._line.note(f"{fault.number:3}  … worker {fault.slot} was killed after the grace")

    def _fill_disk(self, fault: Fault, slot: Slot) -> None:
        mid_write = fault.kind is Kind.DISK_FULL_MID_WRITE
        before = self._struck_inside(fault.kind)
        slot.disk_full(True, mid_write=mid_write)
        time.sleep(fault.seconds)
        in_time(lambda: self._struck_inside(fault.kind) > before)
        slot.disk_full(False, mid_write=mid_write)

    def _struck_inside(self, kind: Kind) -> int:
        return noted(self._world.folder)[kind]

    def _step_clock(self, fault: Fault, slot: Slot) -> None:
        dice = random.Random(fault.seed)
        slot.set_clock(dice.choice((-1, 1)) * dice.uniform(30.0, LONGEST_STEP))
        time.sleep(fault.seconds)
        slot.set_clock(0)

    def _spoil_checkpoint(self, fault: Fault, slot: Slot) -> None:
        """Damage the newest checkpoint of the current job, and kill its worker."""
        # More than one is to be lost with it, should the worker not look for an older one.
        in_time(lambda: len(self._checkpoints_of(slot)) >= CHECKPOINTS_KEPT)
        # So that it makes no newer one meanwhile.
        slot.signal(signal.SIGSTOP, with_child=True)
        if checkpoints := self._checkpoints_of(slot):
            newest = checkpoints[-1]
            facts = {"task": slot.diary.task(), "name": newest["name"]}
            self._jobs.journal.note("spoilt", how=fault.kind, **facts)
            self._world.spoil(newest["prefix"], delete=fault.kind is Kind.CHECKPOINT_DELETED)
        slot.signal(signal.SIGKILL, with_child=True)

    def _checkpoints_of(self, slot: Slot) -> list[dict[str, Any]]:
        """The checkpoints of the current job."""
        record = self._world.records().get(slot.diary.task() or "")
        if record is None or record["state"] != "live":
            return []
        return list(record["checkpoints"])

    def _run_old_release(self, fault: Fault, slot: Slot) -> None:
        """Replace a worker by one of the last release until that has worked, and back."""
        assert self._old_tree is not None
        self.join()
        for tree in (self._old_tree, ROOT):
            slot.tree = tree
            starts = slot.starts
            slot.preempt(PREEMPTION_SECONDS)
            wait_for(lambda before=starts: slot.starts > before, PATIENCE_SECONDS)
            if tree is self._old_tree:
                wait_for(lambda: self._feed() and slot.diary.claims() > 0, 4 * PATIENCE_SECONDS)
                time.sleep(fault.seconds)  # some of its work is to be taken over
                self._world.hits.struck(fault.kind, slot.diary.claims())
                self._line.note(
                    f"{fault.number:3}  … {slot.who} has made {slot.diary.claims()} claims"
                )

    def _feed(self) -> bool:
        """Publish work for every worker; returns True."""
        while self._jobs.unended() < len(self._fleet.slots) + 1:
            self._jobs.publish(destiny=Destiny.PLAIN)
        return True

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


def in_time(condition: Callable[[], bool]) -> bool:
    """Whether the condition becomes true while a fault can wait."""
    return wait_for(condition, PATIENCE_SECONDS, every=0.3)


def _kill(process: int | None, number: int) -> None:
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
