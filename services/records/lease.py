"""Renews the hold on a record, and notices its loss at once.

The holder writes the record at least every quarter of its lease. It has lost the lease if a
conditional write finds another process's write, or if the last successful write *began* so long ago
that another worker may consider the lease expired. From then on nothing more is written under this
claim.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable
from typing import Generic, Self

from jobs.hold import R, stamped
from services.records.record_object import RecordObject
from utils.errors import LeaseLost, MachineError, PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

RENEWALS_PER_LEASE = 4
SAFE_PART = 0.9
"""The holder gives up at this part of its lease, so that its work is over when another begins."""

_LONGEST_PAUSE_SECONDS = 2.0
_LONGEST_JOIN_SECONDS = 0.5


class Lease(Generic[R]):
    """A hold on a record; a context manager that renews it while the block runs.

    Leaving the block only ends the renewals. A record that was neither released nor settled by then
    is free when its lease expires, as after a crash.

    Args:
        target: The record's object.
        record: The record that the claim wrote.
        etag: The version of that write.
        began_at: This process's monotonic clock before that write began.

    Attributes:
        lost: Set once the claim is lost; long work watches it.
    """

    def __init__(self, target: RecordObject[R], record: R, etag: str, began_at: float) -> None:
        self.lost = threading.Event()
        self._target = target
        self._record = record
        self._etag = etag
        self._began_at = began_at
        self._reason = ""
        self._writing = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def record(self) -> R:
        """The record of this holder's last write."""
        return self._record

    @property
    def claim_number(self) -> int:
        """The number of this claim, which every write under this lease carries."""
        return self._record.hold.claim

    @property
    def remaining(self) -> float:
        """Seconds for which the hold is still certain; negative if it is not."""
        safe = self._record.hold.lease_seconds * SAFE_PART
        return self._began_at + safe - time.monotonic()

    def __enter__(self) -> Self:
        key = self._target.location.key
        for job in (self._keep_renewing, self._watch_clock):
            thread = threading.Thread(target=job, name=f"lease {key}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the renewals, without waiting for one that hangs in the network."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=_LONGEST_JOIN_SECONDS)
        self._threads.clear()

    def check(self) -> None:
        """Make sure that the hold is certain at this moment.

        Raises:
            LeaseLost: It is not. Stop, and write nothing more.
        """
        if self._record.hold.released:
            raise LeaseLost(
                "The record has been given back; nothing more is written under this claim."
            )
        if self.remaining <= 0:
            self._lose("It could not be renewed in time.")
        if self.lost.is_set():
            raise LeaseLost(f"The hold on {self._target.location.key} is lost. {self._reason}")

    def update(self, change: Callable[[R], R], *, within: float | None = None) -> R:
        """Change the record by one conditional write, tried until it succeeds or the lease is lost.

        Args:
            change: Makes the new record from the present one. Returning it as it is writes nothing.
            within: Give up after this many seconds. It is then unknown whether the write took
                place, so the lease is lost.

        Returns:
            The record as it is now.

        Raises:
            LeaseLost: Another worker has it, or the time is over.
        """
        deadline = math.inf if within is None else time.monotonic() + within
        self._wait_for_turn(deadline)
        try:
            self.check()
            changed = change(self._record)
            if changed is not self._record:
                self._write(self._stamped(changed), deadline)
            return self._record
        finally:
            self._writing.release()

    def renew(self) -> None:
        """Prove the hold by a write, before an act that cannot be undone.

        Raises:
            LeaseLost: See `update`.
        """
        self.update(_anew)

    def after_renewal(self) -> None:
        """Hook for subclasses: called in the renewing thread whenever a renewal was due.

        It is also called if another change had already renewed the lease.
        """

    def _stamped(self, record: R) -> R:
        """Hook for subclasses: the record that is about to be written."""
        return stamped(record)

    def _wait_for_turn(self, deadline: float) -> None:
        # The write in hand may hang in the network, so it is waited for while the hold is certain,
        # and no longer; while others write, that is prolonged.
        # pylint: disable-next=consider-using-with
        while not self._writing.acquire(
            timeout=max(0.0, min(self.remaining, deadline - time.monotonic()))
        ):
            if time.monotonic() >= deadline:
                self._lose("An earlier write has not come back in the time that was left.")
            self.check()

    def _write(self, record: R, deadline: float) -> None:
        pause = min(_LONGEST_PAUSE_SECONDS, record.hold.lease_seconds / 20)
        # The first try may have been the one that S3 took, though its answer was lost: the lease
        # began then, and not with the try that finds it written.
        began_at = time.monotonic()
        while True:
            try:
                etag = self._target.write(record, self._etag)
            except PreconditionFailed as error:
                self._lose("Another worker has changed the record.")
                raise LeaseLost(str(error)) from error
            except (StorageError, MachineError) as error:
                log.warning(
                    "lease_write_failed",
                    key=self._target.location.key,
                    error=str(error),
                    remaining_seconds=round(self.remaining, 3),
                )
                if self._stopping.is_set():
                    raise LeaseLost("The lease was closed before S3 took the record.") from error
                self.lost.wait(max(0.0, min(pause, deadline - time.monotonic())))
                if time.monotonic() >= deadline:
                    self._lose("S3 did not take the record in the time that was left.")
                self.check()
                continue
            self._record, self._etag, self._began_at = record, etag, began_at
            if record.hold.released:
                self._stopping.set()
            return

    def _lose(self, reason: str) -> None:
        if not self.lost.is_set():
            self._reason = reason
            log.warning(
                "lease_lost",
                key=self._target.location.key,
                claim=self.claim_number,
                reason=reason,
            )
            self.lost.set()

    def _keep_renewing(self) -> None:
        while not self._stopping.wait(self._until_renewal()):
            try:
                if self._until_renewal() <= 0:  # else some other change has renewed it meanwhile
                    self.renew()
                self.after_renewal()
            except LeaseLost:
                return

    def _until_renewal(self) -> float:
        interval = self._record.hold.lease_seconds / RENEWALS_PER_LEASE
        return max(0.0, self._began_at + interval - time.monotonic())

    def _watch_clock(self) -> None:
        # The renewing thread may sit in a write that never comes back; this one only looks at the
        # clock.
        while not self._stopping.wait(max(0.0, self.remaining)):
            if self.remaining <= 0:
                self._lose("It could not be renewed in time.")
            if self.lost.is_set():
                return


def _anew(record: R) -> R:
    """The same record as a new value, so that it is written."""
    return dataclasses.replace(record)
