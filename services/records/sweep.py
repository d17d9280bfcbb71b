"""Finds jobs that have no message any more.

Their queue was deleted or purged, or the broker dropped the message.

If an unsettled record has been silent for much longer than its holder promised, the caller
publishes it again: a live one to the training queue, an ended one to the endings' queue. An extra
message does no harm, since it is only a hint to look at the record.

Only the index of unsettled records is read (`services.records.index`). The sweep also does the work
that the worker that settled a record could not do: it clears up, and removes the record from the
index.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Iterator

from jobs.hold import stamped
from jobs.record import PROTOCOL_LEVEL, DeliveryState, JobRecord, State
from services.records.index import RecordIndex
from services.records.record_object import RecordObject, Version
from services.records.requests import Requests
from services.s3.s3_service import ObjectInfo, S3Service
from utils.errors import PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

_PATIENCE_LEASES = 2
"""Time after the promised silence, in which a redelivered message reaches another worker first."""
_MARK_LEASES = 10
"""After this time, an id on the index without a record is a claim that did not succeed."""
_LONGEST_WAIT_SECONDS = 86_400.0
"""A message that has not returned by then is lost, however long the queue is."""
_LONGEST_SKIP_LEASES = 10
"""The longest time until a record is read again that cannot be abandoned yet."""


@dataclasses.dataclass(frozen=True, slots=True)
class Census:
    """The counts of one sweep.

    Attributes:
        live: Jobs that have been claimed and have not ended.
        endings_pending: Endings that the backend has not accepted yet.
        oldest_ending_seconds: Age of the oldest of them; 0 if there are none.
    """

    live: int = 0
    endings_pending: int = 0
    oldest_ending_seconds: float = 0.0


class RecordSweep:
    """Sweeps the unsettled records of a state bucket.

    Args:
        s3: As for `JobRecords`.
        bucket: The state bucket.
        lease_seconds: This worker's lease.
        clear_up: Removes the files that a settled job no longer needs; False if it must be retried.
        may_wait: Whether messages wait in the training queue of the record's kind: the message of a
            live record that no worker holds may be one of them.

    Attributes:
        census: The counts of the last sweep.
    """

    def __init__(
        self,
        s3: S3Service,
        bucket: str,
        *,
        lease_seconds: float,
        clear_up: Callable[[JobRecord], bool] = lambda record: True,
        may_wait: Callable[[JobRecord], bool] = lambda record: False,
    ) -> None:
        self.index = RecordIndex(s3, bucket)
        self._requests = Requests(s3, bucket)
        self.census = Census()
        self._lease_seconds = lease_seconds
        self._clear_up = clear_up
        self._may_wait = may_wait
        self._known: dict[str, tuple[JobRecord, float]] = {}
        self._unreadable: set[str] = set()  # logged once per record, until it can be read

    def abandoned(self) -> Iterator[JobRecord]:
        """The records that this worker has to publish again.

        Each is released in place of its dead holder, by a conditional write. So of several workers
        that sweep at once only one gets it, and a holder that was only suspended finds that it has
        lost the lease. If the message is lost again, the record is found again, after a silence
        that grows each time.

        Raises:
            StorageError: The index cannot be listed. A record that cannot be read or written is
                left for the next sweep.
        """
        seen: dict[str, tuple[JobRecord, float]] = {}
        unreadable: set[str] = set()
        for task_id, mark in self.index.entries():
            known = self._known.get(task_id)
            if known and time.monotonic() < known[1]:
                seen[task_id] = known
                continue
            target = self.index.record(task_id)
            try:
                version = target.read()
                if version is None:
                    self._forget_if_old(task_id, mark)
                    continue
                if version.record.is_settled:
                    if self._clear_up(version.record):
                        self.index.remove(task_id)
                    continue
                seen[task_id] = version.record, self._look_again_at(version)
                record = self._taken_over(target, version)
            except PreconditionFailed:
                continue  # its holder is alive, or another worker's sweep has it
            except StorageError as error:
                if task_id not in self._unreadable:
                    log.warning("record_not_swept", task_id=task_id, error=str(error))
                unreadable.add(task_id)
                continue
            if record is not None:
                yield record
        self._known, self._unreadable = seen, unreadable
        self.census = _census(record for record, _ in seen.values())

    def _taken_over(
        self, target: RecordObject[JobRecord], version: Version[JobRecord]
    ) -> JobRecord | None:
        if not self._is_to_be_published(version):
            return None
        if version.record.min_level > PROTOCOL_LEVEL:
            # Only a newer worker can write this job's message, and its own sweep does.
            log.warning("record_left_to_newer_worker", task_id=version.record.task_id)
            return None
        record = stamped(version.record.swept())
        target.write(record, version.etag)
        log.warning(
            "record_abandoned",
            task_id=record.task_id,
            state=record.state,
            holder=record.hold.owner,
            claim=record.claim,
            age_seconds=version.age_seconds,
        )
        return record

    def _is_to_be_published(self, version: Version[JobRecord]) -> bool:
        if version.record.is_paused:
            # A person may have deleted the pause file, or the message of a resumed job was lost.
            return not self._requests.keeps_paused(version.record.task_id)
        return is_abandoned(version) and not self._may_still_come(version)

    def _may_still_come(self, version: Version[JobRecord]) -> bool:
        """A job that was released properly waits in the queue as long as necessary."""
        record = version.record
        return (
            record.state is State.LIVE
            and record.hold.released
            and version.age_seconds < _LONGEST_WAIT_SECONDS
            and self._may_wait(record)
        )

    def _look_again_at(self, version: Version[JobRecord]) -> float:
        wait = min(_due_at(version), _LONGEST_SKIP_LEASES * self._lease_seconds)
        return time.monotonic() + max(0.0, wait - version.age_seconds)

    def _forget_if_old(self, task_id: str, mark: ObjectInfo) -> None:
        # By this machine's clock: if a mark is removed too early, the inventory finds the record.
        now = datetime.datetime.now(datetime.UTC)
        if (now - mark.last_modified).total_seconds() > _MARK_LEASES * self._lease_seconds:
            self.index.forget(task_id)


def is_abandoned(version: Version[JobRecord]) -> bool:
    """Whether an unsettled record has been silent for so long that its message must be lost."""
    return version.age_seconds > _due_at(version)


def _due_at(version: Version[JobRecord]) -> float:
    hold = version.record.hold
    return hold.silence + _PATIENCE_LEASES * hold.lease_seconds


def _census(records: Iterator[JobRecord]) -> Census:
    live = pending = 0
    oldest = 0.0
    now = datetime.datetime.now(datetime.UTC)
    for record in records:
        live += record.state is State.LIVE
        if record.delivery is DeliveryState.PENDING:
            pending += 1
            oldest = max(oldest, _seconds_since(record.ended_at, now))
    return Census(live, pending, oldest)


def _seconds_since(moment: str | None, now: datetime.datetime) -> float:
    try:
        return (now - datetime.datetime.fromisoformat(moment or "")).total_seconds()
    except (ValueError, TypeError):
        return 0.0
