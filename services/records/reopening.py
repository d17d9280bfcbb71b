"""Sends back a job that has ended, on an operator's request: the only change of a settled record.

The change is a conditional write: if a worker writes first, the record is read again. The order of
the steps is: add the record to the index, write it, remove its `.settled` mark (see
`services.records.index`), publish the message. If the process dies in between, the sweep publishes
the record, or the operator can repeat the command.
"""

from __future__ import annotations

from collections.abc import Callable

from jobs.hold import stamped
from jobs.layout import cancel_file_at, record_at
from jobs.record import DeliveryState, EndingKind, JobRecord, State
from services.records.index import RecordIndex
from services.records.record_object import RecordObject
from services.s3.s3_service import S3Service
from utils.errors import PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

_RACES = 10


class CannotReopen(Exception):
    """The job must not be sent back. The message has the reason, and the remedy if there is one."""


def reopen(s3: S3Service, bucket: str, task_id: str, *, identity: str) -> JobRecord | None:
    """Make a failed job live again, so that the next worker with its message trains it.

    Args:
        s3: The storage.
        bucket: The state bucket.
        task_id: The job's id.
        identity: Hash of the message's order, which must be that of the record.

    Returns:
        The record, live now; None if there is no record, so that the message makes a new one.

    Raises:
        CannotReopen: The job must not be sent back.
        StorageError: S3 cannot be used; the call may be repeated.
    """

    def change(record: JobRecord) -> JobRecord:
        if record.identity != identity:
            raise CannotReopen("its task id belongs to a job that asks for something else")
        if record.state is State.LIVE:
            return record
        if record.ending is not None and record.ending.kind is EndingKind.COMPLETE:
            raise CannotReopen("the job has completed since, and its model is in place")
        if record.delivery is DeliveryState.PENDING:
            raise CannotReopen(
                "the backend does not know of the failure yet; retry after its webhook"
            )
        return record.reopened()

    cancel_file = cancel_file_at(bucket, task_id)
    if s3.exists(cancel_file):
        raise CannotReopen(f"the job was cancelled: delete {cancel_file.uri()} first")
    return _change(s3, bucket, task_id, change)


def tell_again(s3: S3Service, bucket: str, task_id: str) -> JobRecord:
    """Make an ending that the backend had refused pending again, with the same webhook id.

    Raises:
        CannotReopen: The ending was not set aside.
        StorageError: S3 cannot be used; the call may be repeated.
    """

    def change(record: JobRecord) -> JobRecord:
        if record.delivery is DeliveryState.PENDING:
            return record
        if record.delivery is not DeliveryState.SET_ASIDE:
            raise CannotReopen("the backend has accepted the ending since")
        return record.to_be_told_again()

    record = _change(s3, bucket, task_id, change)
    if record is None:
        raise CannotReopen("the job has no record, so its ending is unknown")
    return record


def _change(
    s3: S3Service, bucket: str, task_id: str, change: Callable[[JobRecord], JobRecord]
) -> JobRecord | None:
    target = RecordObject(s3, record_at(bucket, task_id), JobRecord)
    index = RecordIndex(s3, bucket)
    for _ in range(_RACES):
        version = target.read()
        if version is None:
            return None
        record = change(version.record)
        if record is not version.record:
            record = stamped(record)
            index.add(task_id)
            try:
                target.write(record, version.etag)
            except PreconditionFailed:
                continue  # another process was faster: read the record again
            log.info("job_sent_back", task_id=task_id, state=record.state)
        # Also if nothing was changed: an earlier call may have died before this step.
        index.reopen(task_id)
        return record
    raise StorageError(f"The record {target.location.key} changes too fast; try again.")
