"""The job records of all workers: claiming a job, and taking over an ending for delivery.

Records are `jobs/{task_id}.json` in the state bucket, changed only by S3's conditional writes.
There is no other lock, and a worker trusts no clock except its own monotonic one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time

from jobs.hold import stamped
from jobs.layout import INVALID_PREFIX, cancel_file_at, record_at
from jobs.record import PROTOCOL_LEVEL, Ending, JobRecord, JobRequest, State
from services.records.index import RecordIndex
from services.records.job_lease import JobLease
from services.records.record_object import Expiry, RecordObject, Version
from services.records.requests import Requests
from services.s3.s3_service import S3Service
from utils.errors import NewerRecord, PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

__all__ = [
    "Claim",
    "Claimed",
    "Ended",
    "HeldElsewhere",
    "JobRecords",
    "OtherBody",
    "Unclaimed",
    "cancel_file_at",
    "record_at",
]

_RACES = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Claimed:
    """This worker has the job; enter the lease at once, because its time already runs."""

    lease: JobLease


@dataclasses.dataclass(frozen=True, slots=True)
class HeldElsewhere:
    """Another worker has the job; check again in `wait_seconds`, which is at most a lease."""

    record: JobRecord
    wait_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Unclaimed:
    """The job is live and no worker holds it. `seconds_silent`: since the last write, by S3."""

    record: JobRecord
    seconds_silent: float


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """The job has ended; its delivery may be open. `seconds_ago`: since the last write, by S3."""

    record: JobRecord
    seconds_ago: float


@dataclasses.dataclass(frozen=True, slots=True)
class OtherBody:
    """The id belongs to a job that asks for something else."""

    record: JobRecord


Claim = Claimed | HeldElsewhere | Ended | OtherBody


class JobRecords:
    """All records of one state bucket, as one worker sees them. Safe to share between threads.

    Args:
        s3: The storage. Its time-outs let a request fail and be repeated well within a quarter of
            the lease.
        bucket: The state bucket.
        owner: This process's unique name: a holder that finds its own name on a record knows that
            it was not dead. The nonce protects a claim.
        lease_seconds: The lease of this worker's claims.

    Attributes:
        requests: The files that cancel and pause jobs.
    """

    def __init__(self, s3: S3Service, bucket: str, *, owner: str, lease_seconds: float) -> None:
        self._s3 = s3
        self._bucket = bucket
        self._owner = owner
        self._lease_seconds = lease_seconds
        self._expiry = Expiry()
        self._index = RecordIndex(s3, bucket)
        self.requests = Requests(s3, bucket)
        # Claims of this process that S3 did not answer: key -> nonce. A record with one of them
        # is this process's own and not worked on.
        self._unanswered: dict[str, str] = {}
        self._lock = threading.Lock()

    def read(self, task_id: str) -> JobRecord | None:
        """The job's present record; None if there is none.

        Raises:
            StorageError: S3 cannot be used, or the record cannot be read.
        """
        version = self._target(task_id).read()
        return version.record if version else None

    def claim(self, request: JobRequest, *, new_run_after: float | None = None) -> Claim:
        """Claim the job that a message orders, if it is free.

        A job whose id was derived from its body may have been ordered before. Each of its runs has
        a separate id (docs/protocol.md, section 2); the message means the newest one.

        Args:
            request: The order of the message.
            new_run_after: The deduplication window in seconds; a derived id whose newest run ended
                longer ago is a new job then. None for a message that was redelivered or is a
                worker's own copy: never.

        Raises:
            DamagedRecord, NewerRecord: The record cannot be used.
            StorageError: S3 cannot be used. Nothing is lost: the job can be claimed again, by this
                worker at once.
        """
        outcome = self._claim_one(request, create=True)
        assert outcome is not None
        if not request.id_is_derived:
            return outcome
        for count in itertools.count(1):
            if not isinstance(outcome, Ended):
                break
            is_new = new_run_after is not None and outcome.seconds_ago > new_run_after
            newer = self._claim_one(request.run(count), create=is_new)
            if newer is None:
                break
            outcome = newer
        return outcome

    def claim_invalid(
        self,
        body_sha256: str,
        ending: Ending,
        *,
        kind: str,
        subject: str,
        webhook_url: str | None = None,
        new_run_after: float | None = None,
    ) -> Claim:
        """Make the `failed` ending of an invalid message durable, and claim it for delivery.

        The record is named after the body's hash, since the message's task id may be unreadable or
        another job's. Its `task_id` is `invalid/{sha256}`, which no message can carry.

        Args:
            body_sha256: The body's hash, in hexadecimal.
            ending: Its ending; one that the record already has stays.
            kind, subject: The kind and the subject, for the webhook.
            webhook_url: As for a job.
            new_run_after: As for `claim`: the same body published again later is reported again.

        Raises:
            StorageError: S3 cannot be used.
        """
        request = JobRequest(
            task_id=INVALID_PREFIX + body_sha256,
            kind=kind,
            subject=subject,
            identity=body_sha256,
            message={},
            webhook_url=webhook_url,
            id_is_derived=True,
            ending=ending,
        )
        outcome = self.claim(request, new_run_after=new_run_after)
        if isinstance(outcome, Ended):
            adopted = self.adopt_ending(outcome.record.task_id)
            return adopted if isinstance(adopted, (Claimed, HeldElsewhere)) else outcome
        return outcome

    def adopt_ending(self, task_id: str) -> Claimed | HeldElsewhere | Unclaimed | None:
        """Claim an ended job, to deliver its unchanged ending and the copy that it owes.

        Returns:
            `Claimed` for an ended job that is not settled. `HeldElsewhere` and `Unclaimed` also for
            a live job, which is not claimed. None if there is nothing to do: no record, or a
            settled one.

        Raises:
            DamagedRecord, NewerRecord: The record cannot be used.
            StorageError: S3 cannot be used.
        """
        target = self._target(task_id)
        for _ in range(_RACES):
            version = target.read()
            if not version or version.record.is_settled:
                return None
            if version.record.state is State.LIVE:
                if wait_seconds := self._expiry.wait_seconds(target.location.key, version):
                    return HeldElsewhere(version.record, wait_seconds)
                return Unclaimed(version.record, version.age_seconds)
            outcome = self._take(target, version)
            if outcome is not None:
                return outcome
        raise StorageError(f"The record {target.location.key} changes too fast; try again.")

    def forget(self, task_id: str) -> None:
        """Remove a settled record from the index; if that fails, the sweep does it."""
        with contextlib.suppress(StorageError):
            self._index.remove(task_id)

    def _claim_one(self, request: JobRequest, *, create: bool) -> Claim | None:
        target = self._target(request.task_id)
        for _ in range(_RACES):
            version = target.read()
            if version is None:
                if not create:
                    return None
                self._index.add(request.task_id)
                fresh = JobRecord.new(request, self._owner, self._lease_seconds)
                outcome: Claim | None = self._write_claim(target, fresh, None)
            elif version.record.identity != request.identity:
                return OtherBody(version.record)
            elif version.record.state is State.ENDED:
                return Ended(version.record, version.age_seconds)
            elif version.record.min_level > PROTOCOL_LEVEL:
                raise NewerRecord(
                    f"Job {request.task_id} needs a worker of protocol level "
                    f"{version.record.min_level} and this one has level {PROTOCOL_LEVEL}. "
                    "Update the worker."
                )
            else:
                outcome = self._take(target, version)
            if outcome is not None:
                return outcome
        raise StorageError(f"The record {target.location.key} changes too fast; try again.")

    def _take(
        self, target: RecordObject[JobRecord], version: Version[JobRecord]
    ) -> Claimed | HeldElsewhere | None:
        key = target.location.key
        record = version.record
        with self._lock:
            ours = record.hold.nonce == self._unanswered.get(key)
        if ours:
            record = record.released(count_attempt=False)
        elif wait_seconds := self._expiry.wait_seconds(key, version):
            return HeldElsewhere(record, wait_seconds)
        elif not record.hold.released:
            log.warning(
                "silent_holder_replaced",
                task_id=record.task_id,
                holder=record.hold.owner,
                claim=record.claim,
                age_seconds=version.age_seconds,
            )
        # The record may be from a worker of the first release, which has no index.
        self._index.add(record.task_id)
        return self._write_claim(
            target, record.claimed(self._owner, self._lease_seconds), version.etag
        )

    def _write_claim(
        self, target: RecordObject[JobRecord], record: JobRecord, etag: str | None
    ) -> Claimed | None:
        key = target.location.key
        record = stamped(record)
        began_at = time.monotonic()
        try:
            written = target.write(record, etag)
        except PreconditionFailed:
            return None  # another worker was faster; the record names it
        except StorageError:
            with self._lock:
                self._unanswered[key] = record.hold.nonce
            raise
        with self._lock:
            self._unanswered.pop(key, None)
        log.info("job_claimed", task_id=record.task_id, claim=record.claim, state=record.state)
        lease = JobLease(target, record, written, began_at, self.requests)
        lease.look_for_cancel()
        lease.look_for_pause()
        return Claimed(lease)

    def _target(self, task_id: str) -> RecordObject[JobRecord]:
        return RecordObject(self._s3, record_at(self._bucket, task_id), JobRecord)
