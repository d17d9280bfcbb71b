"""Carries out a schedule, and writes the time line."""

from __future__ import annotations

import functools
import random
import time
from pathlib import Path

from tests.chaos.conductor import REDRIVEN
from tests.chaos.fleet import Fleet, Slot, wait_for
from tests.chaos.jobs import Jobs
from tests.chaos.process_faults import PATIENCE_SECONDS, ProcessFaults, in_time
from tests.chaos.reference import MAX_ATTEMPTS, Destiny
from tests.chaos.schedule import OF_API, Fault, Kind
from tests.chaos.service_faults import ServiceFaults
from tests.chaos.time_line import TimeLine
from tests.chaos.timing import ATTEMPTS_TO_SPARE, DEAD_QUEUE, QUEUE, QUEUES
from tests.chaos.with_api.faults import ApiFaults
from tests.chaos.world import Message, World, task_of

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
    Kind.S3_AWAY_LONG,
    Kind.S3_CUT,
    Kind.S3_FLIPPED,
    Kind.S3_412,
    Kind.STOP_POINT,
    Kind.CHECKPOINT_DAMAGED,
    Kind.CHECKPOINT_DELETED,
}
"""What can cost a job an attempt."""

OF_PROCESSES = {
    Kind.WORKER_KILLED,
    Kind.CHILD_KILLED,
    Kind.CHILD_HANGS,
    Kind.FROZEN,
    Kind.PREEMPTED,
    Kind.CRASH_POINT,
    Kind.STOP_POINT,
    Kind.DISK_FULL,
    Kind.DISK_FULL_MID_WRITE,
    Kind.CLOCK_STEP,
    Kind.CHECKPOINT_DAMAGED,
    Kind.CHECKPOINT_DELETED,
    Kind.TWO_VERSIONS,
}
"""What is done to one worker."""

_AT_WORK = {
    Kind.CHILD_HANGS,
    Kind.FROZEN,
    Kind.CHECKPOINT_DAMAGED,
    Kind.CHECKPOINT_DELETED,
}
"""What shows something only while the worker trains."""


YOUNG_QUEUE_SECONDS = 4.0
"""RabbitMQ 3.10 writes the address of a new quorum queue to disk up to three seconds after it has
confirmed the queue. A queue whose node is killed before that has no leader any more, and a person
has to delete it (docs/decisions.md)."""

_DELETIONS = {Kind.TRAINING_QUEUE_DELETED, Kind.DEAD_QUEUE_DELETED, Kind.OWN_QUEUE_DELETED}


class Injector(ProcessFaults):
    """Injects the faults of the schedule.

    Args:
        world: Servers and proxies.
        fleet: The workers.
        jobs: The published jobs.
        line: The time line.
        old_tree: The last release's code; None if it is not available.
        api: Carries out the faults of the API; None without one.
    """

    def __init__(
        self,
        world: World,
        fleet: Fleet,
        jobs: Jobs,
        line: TimeLine,
        old_tree: Path | None,
        api: ApiFaults | None = None,
    ) -> None:
        super().__init__(world, fleet, jobs, line, old_tree)
        self._api = api
        self._services = ServiceFaults(world)
        self.dead: list[Message] = []  # the messages of deleted dead queues

    def inject(self, fault: Fault) -> bool:
        """Carry out one fault. A longer fault continues in a thread.

        Returns:
            Whether it could be carried out.
        """
        time.sleep(fault.pause)
        if reason := self._hindrance(fault):
            self._line.note(f"{fault.number:3}  left out, {reason}: {fault}")
            return False
        self._line.note(f"{fault.number:3}  {fault}")
        self._jobs.journal.note("fault", name=fault.kind.name)
        if fault.kind in (Kind.BROKER_KILLED, Kind.BROKER_RESTARTED):
            self._aside(lambda: self._restart_broker(fault))
        elif fault.kind is Kind.BROKER_ALARM:
            self._aside(lambda: self._alarm(fault))
        elif fault.kind in _DELETIONS:
            self._aside(lambda: self._delete_queue(fault))
        elif fault.kind is Kind.PUBLISHED_TWICE:
            wait_for(self._two_workers_are_idle, 2 * PATIENCE_SECONDS, every=0.3)
            self._aside(lambda: self._publish_twice(fault))
        elif self._api and fault.kind in OF_API:
            self._aside(functools.partial(self._api.inject, fault))
        elif fault.kind in OF_PROCESSES:
            self._process(fault, self._fleet.slots[fault.slot])
        else:
            self._services.inject(fault)
            if fault.kind is Kind.BROKER_CONFIRMS_LOST:
                self._jobs.publish(
                    destiny=Destiny.INVALID
                )  # the worker that takes it publishes a copy
        return True

    def _hindrance(self, fault: Fault) -> str | None:
        """The reason why the fault cannot be carried out, after some time; None if it can."""
        if fault.kind in _COUNTED and not in_time(self._attempts_are_left):
            return "a job has few attempts left"
        if fault.kind not in OF_PROCESSES:
            return None
        if not in_time(lambda: fault.slot not in self._busy):
            return "the worker is frozen or shutting down"
        if fault.kind is Kind.TWO_VERSIONS and self._old_tree is None:
            return "this copy has no history to take the last release from"
        return self._hindrance_of(fault.kind, self._fleet.slots[fault.slot])

    def _hindrance_of(self, kind: Kind, slot: Slot) -> str | None:
        if kind in (Kind.CRASH_POINT, Kind.STOP_POINT):
            in_time(slot.has_no_order)  # else that point is far away, and this order replaces it
        if kind is Kind.CHILD_KILLED and not in_time(lambda: slot.diary.child() is not None):
            return "it has no trainer process"
        if kind in (Kind.WORKER_KILLED, Kind.PREEMPTED):
            # An idle worker is hit too, but that counts as no hit.
            in_time(slot.is_busy)
        if kind is Kind.FROZEN:
            # One at a time: another worker, which runs, has to take its job.
            with self._freezing:
                pass
        # While it trains the desk replaces it after STALL_SECONDS; elsewhere after minutes.
        if kind in _AT_WORK and not in_time(slot.is_training):
            return "it trains nothing"
        return None

    def cease(self) -> None:
        """End all faults; returns when the longer ones are over."""
        self.join()
        self._world.calm()
        for slot in self._fleet.slots:
            slot.withdraw_order()
            slot.disk_full(False)
            slot.disk_full(False, mid_write=True)
            slot.set_clock(0)
        for slot in self._world.api.slots if self._world.api else ():
            slot.withdraw_order()
        if self.errors:
            raise self.errors[0]

    def _attempts_are_left(self) -> bool:
        """A job must be left an attempt beyond those that faults may cost it at once."""
        doomed = {
            job.record_id
            for job in tuple(self._jobs.published)
            if job.destiny in (Destiny.GIVEN_UP, Destiny.GIVEN_UP_REDRIVEN)
        }
        live = [
            one
            for name, one in self._world.records().items()
            if one["state"] == "live" and name not in doomed
        ]
        return all(one["attempts"] <= MAX_ATTEMPTS - ATTEMPTS_TO_SPARE for one in live)

    def _two_workers_are_idle(self) -> bool:
        return sum(slot.diary.is_idle() for slot in self._fleet.slots) >= 2

    def _restart_broker(self, fault: Fault) -> None:
        with self._world.broker_turn:
            links = sum(way.broker.links for way in self._world.ways)
            self._world.hits.struck(fault.kind, links)
            if self._world.queue_type == "quorum":
                self._world.declare_own_queues("quorum")
                time.sleep(YOUNG_QUEUE_SECONDS)
            if fault.kind is Kind.BROKER_RESTARTED:
                self._world.broker.restart()
            else:
                self._world.broker.kill()
                time.sleep(fault.seconds)
                self._world.broker.start()
        self._line.note(f"{fault.number:3}  … the broker is back")

    def _alarm(self, fault: Fault) -> None:
        """Make the broker accept nothing from publishers for a while."""
        with self._world.broker_turn:
            self._world.broker.ctl("set_vm_memory_high_watermark", "0.000001")
            try:
                time.sleep(2 * fault.seconds)
            finally:
                self._world.broker.ctl("set_vm_memory_high_watermark", "0.4")
        self._line.note(f"{fault.number:3}  … the broker has memory again")

    def _delete_queue(self, fault: Fault) -> None:
        with self._world.broker_turn:
            name = self._queue_to_delete(fault)
            unsettled = self._jobs.unsettled() | self._jobs.damaged()
            held, is_all = self._world.delete_queue(name)
            self._world.declare()
            if name == DEAD_QUEUE:
                self._keep(held)
            # If the content is unknown, it may have been any message.
            lost = {task_of(message) for message in held} if is_all else unsettled
            self._world.allow_sweep(lost)
            self._world.hits.struck(fault.kind, len(lost) if name == QUEUE else len(held))
            again = self._jobs.publish_unclaimed({body for _, body in held} if is_all else None)
            if name == DEAD_QUEUE:
                self._jobs.publish(
                    destiny=Destiny.INVALID
                )  # the worker that takes it finds no queue
        self._line.note(f"{fault.number:3}  … {name}; published again: {again or 'none'}")

    def _queue_to_delete(self, fault: Fault) -> str:
        """One of a worker's own queues is one that holds something, if any does in time."""
        if fault.kind is Kind.TRAINING_QUEUE_DELETED:
            return QUEUE
        if fault.kind is Kind.DEAD_QUEUE_DELETED:
            in_time(lambda: bool(self._world.waiting().get(DEAD_QUEUE)))
            return DEAD_QUEUE
        own = [name for name in self._world.queues() if name not in (*QUEUES.values(), DEAD_QUEUE)]
        holding: list[str] = []

        def holds() -> bool:
            waiting = self._world.waiting()
            holding[:] = [name for name in own if waiting.get(name)]
            return bool(holding)

        in_time(holds)
        return random.Random(fault.seed).choice(holding or own)

    def _keep(self, held: list[Message]) -> None:
        """Keep dead letters; those of jobs that will be sent back are published again."""
        waits = {job.task_id for job in self._jobs.published if job.destiny in REDRIVEN}
        for message in held:
            if message[0].get("x-task-id") in waits:
                self._world.publish_to(DEAD_QUEUE, message)
            else:
                self.dead.append(message)

    def _publish_twice(self, fault: Fault) -> None:
        if fault.detail % 2:
            self._jobs.publish_again(fault.detail)
        else:
            self._jobs.publish(times=2, destiny=Destiny.PLAIN)  # two workers get it at once
