"""A worker's hold on a job: durable changes of its record under one claim."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping
from typing import Any

from jobs.hold import stamped, utc_now
from jobs.record import (
    SEQUENCES_PER_CLAIM,
    DeliveryState,
    Ending,
    JobRecord,
    LastError,
    OwedCopy,
    State,
    StoredCheckpoint,
)
from services.records.lease import Lease
from services.records.record_object import RecordObject
from services.records.requests import Requests
from utils.errors import StorageError
from utils.logger import get_logger

log = get_logger(__name__)


class JobLease(Lease[JobRecord]):
    """A hold on a job, renewed while the block runs, also after its ending until that is settled.

    Every method that changes the record retries while S3 fails, and raises `LeaseLost` once another
    worker holds the job.

    Attributes:
        cancelled: Set once `jobs/{task_id}.cancel` exists, which is checked by the claim and at
            each renewal.
        paused: The same for `jobs/{task_id}.pause`.
    """

    def __init__(
        self,
        target: RecordObject[JobRecord],
        record: JobRecord,
        etag: str,
        began_at: float,
        requests: Requests,
    ) -> None:
        super().__init__(target, record, etag, began_at)
        self.cancelled = threading.Event()
        self.paused = threading.Event()
        self._requests = requests
        self._sequence = 0
        self._counting = threading.Lock()
        self._claimed_at = began_at
        self._run_before = record.seconds_run
        self._seen: Mapping[str, Any] = {}

    @property
    def seconds_run(self) -> float:
        """Seconds that workers have held the job, in this claim and all earlier ones."""
        return self._run_before + time.monotonic() - self._claimed_at

    def saw(self, fields: Mapping[str, Any], *, seconds_left: float | None) -> None:
        """Note the job's progress for operators; the next write of the record includes it.

        Args:
            fields: Fields of the record that belong to the job's kind.
            seconds_left: The remaining time; None before it can be measured.
        """
        self._seen = {**fields, "seconds_left": round(seconds_left or 0.0, 1)}

    def next_sequence(self) -> int:
        """The next number of this job's reports.

        It rises within a claim and from claim to claim.
        """
        with self._counting:
            self._sequence += 1
            return self.claim_number * SEQUENCES_PER_CLAIM + self._sequence

    def register_checkpoint(self, checkpoint: StoredCheckpoint) -> JobRecord:
        """Register a checkpoint, from which the job resumes. All of its files must be on S3."""
        return self.update(lambda record: record.with_checkpoint(checkpoint))

    def end(self, ending: Ending, owed: OwedCopy | None = None) -> Ending:
        """Make the ending durable and its delivery pending, in one write, before it is sent.

        Args:
            ending: The job's ending.
            owed: The copy of the message that the dead queue will get.

        Returns:
            The job's ending: this one, or the one that it already had.
        """
        kept = self.update(lambda record: record.ended(ending, owed)).ending
        assert kept is not None  # an ended record has one
        return kept

    def mark_delivered(self, detail: str | None = None) -> None:
        """Note that the backend has the ending, or no longer wants it; the job is settled."""
        self.update(lambda record: record.settled(DeliveryState.DELIVERED, detail))

    def set_aside(self, detail: str, owed: OwedCopy) -> None:
        """Note that the backend refuses the ending for good; the dead queue will keep the message.

        Args:
            detail: The backend's answer.
            owed: The copy that the dead queue will get.
        """
        self.update(lambda record: record.settled(DeliveryState.SET_ASIDE, detail, owed))

    def paid(self) -> None:
        """Note that the broker has confirmed the copy that the record owed."""
        self.update(lambda record: record.paid())

    def release(
        self,
        *,
        count_attempt: bool,
        error: tuple[str, str] | None = None,
        quiet_seconds: float = 0.0,
        rejected: bool = False,
        within: float | None = None,
    ) -> None:
        """Release the job: it may be claimed at once, and this claim writes nothing more.

        Args:
            count_attempt: The attempt failed. False for a shutdown and for errors that are the
                machine's own.
            error: The reason, as (code, message).
            quiet_seconds: Delay before the message returns; the sweep does not publish the record
                before that.
            rejected: The machine could not do the job and leaves it to another.
            within: Give up after this many seconds (a shutdown's grace); then the lease expires.
        """
        last = LastError(*error, claim=self.claim_number, at=utc_now()) if error else None
        self.update(
            lambda record: record.released(
                count_attempt=count_attempt,
                error=last,
                quiet_seconds=quiet_seconds,
                rejected=rejected,
            ),
            within=within,
        )

    def _stamped(self, record: JobRecord) -> JobRecord:
        if self.record.state is State.LIVE:
            seconds_run = round(self.seconds_run, 3)
            record = dataclasses.replace(record, seconds_run=seconds_run, **self._seen)
        return stamped(record)

    def after_renewal(self) -> None:
        """Check whether the job is to be cancelled or paused."""
        self.look_for_cancel()
        self.look_for_pause()

    def look_for_cancel(self) -> None:
        """Set `cancelled` if the cancel file exists. If S3 fails, the next renewal checks again."""
        if self.cancelled.is_set():
            return
        try:
            if self._requests.wants_cancel(self.record.task_id):
                log.info("cancel_file_seen", task_id=self.record.task_id)
                self.cancelled.set()
        except StorageError as error:
            log.warning("cancel_not_looked_for", task_id=self.record.task_id, error=str(error))

    def look_for_pause(self) -> None:
        """Set `paused` if the pause file is there; S3's troubles put it off to a renewal."""
        if self.paused.is_set() or self.record.state is not State.LIVE:
            return
        try:
            if self._requests.wants_pause(self.record.task_id):
                log.info("pause_file_seen", task_id=self.record.task_id)
                self.paused.set()
        except StorageError as error:
            log.warning("pause_not_looked_for", task_id=self.record.task_id, error=str(error))
