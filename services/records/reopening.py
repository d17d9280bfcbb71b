"""A person sends back a job that has ended: the only change that a settled record ever sees.

By conditional writes, as everything that changes a record: a worker that comes in between wins, and
the record is read again. The record is put on the index of live ones and written, and its
`.settled` mark removed after it (see `services.records.index`), the message published last: whoever
dies in between leaves a record that the sweep publishes, or one that can be sent back again.
"""

from __future__ import annotations

from collections.abc import Callable

from jobs.hold import stamped
from jobs.layout import cancel_file_at, record_at
from jobs.record import Delivery, EndingKind, JobRecord, State
from services.records.index import RecordIndex
from services.records.record_object import RecordObject
from services.s3.s3_service import S3Service
from utils.errors import PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

_RACES = 10


class CannotReopen(Exception):
    """The record says that the job must not be sent back; the text says why, and what to do."""


def reopen(s3: S3Service, bucket: str, task_id: str, *, identity: str) -> JobRecord | None:
    """Have a failed job trained again by whoever gets its message next.

    Args:
        s3: The storage.
        bucket: The state bucket.
        task_id: The job's id.
        identity: What the message asks for, which must be what the record asks for.

    Returns:
        The record, live now; None where there is none, and the message makes a new one.

    Raises:
        CannotReopen: It must not be.
        StorageError: S3 cannot be used; the same call may be made again.
    """

    def change(record: JobRecord) -> JobRecord:
        if record.identity != identity:
            raise CannotReopen("its task id belongs to a job that asks for something else")
        if record.state is State.LIVE:
            return record
        if record.ending is not None and record.ending.kind is EndingKind.COMPLETE:
            raise CannotReopen("it has completed since, and its model is in place")
        if record.delivery is Delivery.PENDING:
            raise CannotReopen("the backend has not heard yet that it failed; wait until it has")
        return record.reopened()

    cancel_file = cancel_file_at(bucket, task_id)
    if s3.exists(cancel_file):
        raise CannotReopen(f"somebody has cancelled it: delete {cancel_file.uri()} first")
    return _change(s3, bucket, task_id, change)


def tell_again(s3: S3Service, bucket: str, task_id: str) -> JobRecord:
    """Have an ending delivered that the backend had refused: the same one, under the same id.

    Raises:
        CannotReopen: It was not set aside.
        StorageError: S3 cannot be used; the same call may be made again.
    """

    def change(record: JobRecord) -> JobRecord:
        if record.delivery is Delivery.PENDING:
            return record
        if record.delivery is not Delivery.SET_ASIDE:
            raise CannotReopen("the backend has taken its ending since")
        return record.to_be_told_again()

    record = _change(s3, bucket, task_id, change)
    if record is None:
        raise CannotReopen("it has no record, so nobody knows its ending")
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
                continue  # somebody was faster: the record says what is so now
            log.info("job_sent_back", task_id=task_id, state=record.state)
        # Also where there was nothing to change: an earlier call may have died before this.
        index.reopen(task_id)
        return record
    raise StorageError(f"The record {target.location.key} changes too fast; try again.")
