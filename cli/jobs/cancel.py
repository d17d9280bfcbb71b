"""`python main.py cancel`: the file that asks for it, where workers look."""

from __future__ import annotations

import re

from jobs.layout import cancel_file_at, record_at
from jobs.record import JobRecord, State
from services.records.listing import RecordListing
from services.records.record_object import RecordObject
from services.s3.s3_service import S3Service
from utils.errors import ConfigurationError

_TASK_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def cancellable(s3: S3Service, bucket: str, task_id: str) -> JobRecord | None:
    """The record of a job that can be cancelled.

    Returns:
        Its record; None where no worker has seen the job yet.

    Raises:
        ConfigurationError: There can be no such job, or it is over.
        StorageError: S3 cannot be used.
    """
    if not _TASK_ID.fullmatch(task_id):
        raise ConfigurationError(f"{task_id!r} is not a task id: 1 to 128 of A-Z, a-z, 0-9, _, -")
    version = RecordObject(s3, record_at(bucket, task_id), JobRecord).read()
    if version is not None and version.record.state is State.ENDED:
        ending = version.record.ending
        raise ConfigurationError(
            f"{task_id} has ended ({ending.kind if ending else 'unknown'}): there is nothing "
            "to cancel"
        )
    return version.record if version else None


def live_of_style(listing: RecordListing, style_id: int) -> list[JobRecord]:
    """The live jobs of a style that a worker has seen, the newest order first.

    Raises:
        StorageError: The records cannot be listed.
    """
    found = [
        each.record
        for each in listing.unsettled
        if each.record and each.record.style_id == style_id and each.record.state is State.LIVE
    ]
    return sorted(found, key=lambda record: record.created_at, reverse=True)


def ask_to_cancel(s3: S3Service, bucket: str, task_id: str) -> None:
    """Have a job cancelled: at its holder's next renewal, or before it is first trained.

    Raises:
        StorageError: S3 cannot be used.
    """
    s3.write(cancel_file_at(bucket, task_id), b"")
