"""Where job records lie, and which of them still have something to do.

Beside the records, `jobs/{task_id}.json`, lies an index of those that are not settled: an empty
object `jobs/live/{task_id}`, made before the record and removed after the record is settled. The
sweep lists the index alone, so that its cost follows the live jobs and not the history.

A record that is settled gets an empty `jobs/{task_id}.settled`, by which the inventory knows it
without reading it. The inventory lists every record, once a day and by one worker: it puts on the
index what an older worker left off it, and deletes what has ended longer ago than the retention.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator

from jobs.addresses import S3Location
from jobs.layout import (
    INVENTORY,
    LIVE,
    RECORD_SUFFIX,
    RECORDS,
    cancel_file_at,
    live_mark_at,
    pause_file_at,
    record_at,
    settled_mark_at,
)
from jobs.record import JobRecord
from services.records.record_object import RecordObject
from services.s3.s3_service import ObjectInfo, S3Service
from utils.errors import ObjectNotFound, PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

INVENTORY_SECONDS = 86_400.0

_DONE = b"done "
_UNFINISHED_SECONDS = 600.0
"""An inventory that was begun so long ago is not going to be finished."""


class RecordIndex:
    """Which records of a state bucket are not settled.

    Args:
        s3: As for `JobRecords`.
        bucket: The state bucket.
    """

    def __init__(self, s3: S3Service, bucket: str) -> None:
        self._s3 = s3
        self._bucket = bucket

    def add(self, task_id: str) -> None:
        """Put a record on the index; before it is made, or made live again.

        Raises:
            StorageError: S3 cannot be used.
        """
        self._s3.write(live_mark_at(self._bucket, task_id), b"")

    def remove(self, task_id: str) -> None:
        """Take a settled record off the index.

        A person may send the job back at this moment, so the record is read once more: whichever
        comes last, a record that lives again is on the index.

        Raises:
            StorageError: S3 cannot be used.
        """
        settled = settled_mark_at(self._bucket, task_id)
        with contextlib.suppress(PreconditionFailed):  # then somebody else has marked it
            self._s3.create(settled, b"")
        self._delete(live_mark_at(self._bucket, task_id))
        version = self.record(task_id).read()
        if version is not None and not version.record.is_settled:
            self.add(task_id)
            self._delete(settled)

    def reopen(self, task_id: str) -> None:
        """Put a record on the index that was settled; after it was made live again.

        Raises:
            StorageError: S3 cannot be used.
        """
        self.add(task_id)
        self._delete(settled_mark_at(self._bucket, task_id))

    def forget(self, task_id: str) -> None:
        """Take a name off the index that has no record.

        Raises:
            StorageError: S3 cannot be used.
        """
        self._delete(live_mark_at(self._bucket, task_id))

    def entries(self) -> Iterator[tuple[str, ObjectInfo]]:
        """The ids of the records that are not settled, each with its mark.

        Raises:
            StorageError: S3 cannot be used.
        """
        for info in self._s3.list_objects(self._bucket, LIVE):
            yield info.key.removeprefix(LIVE), info

    def record(self, task_id: str) -> RecordObject[JobRecord]:
        """The object of a record."""
        return RecordObject(self._s3, record_at(self._bucket, task_id), JobRecord)

    def take_inventory(
        self, retention_seconds: float | None, expired: Callable[[JobRecord], bool]
    ) -> bool:
        """Look through all records, if nobody has for a day.

        Args:
            retention_seconds: Records that were settled longer ago are deleted; None keeps all.
            expired: Deletes what else a record that goes has left; False where that failed.

        Returns:
            Whether this call did it.

        Raises:
            StorageError: S3 cannot be used. The inventory is begun anew after ten minutes, also if
                this process ends before it is done.
        """
        begun = self._begin_inventory()
        if begun is None:
            return False
        listing = {info.key: info for info in self._s3.list_objects(self._bucket, RECORDS)}
        added = deleted = 0
        now = self._s3.head(S3Location(self._bucket, INVENTORY)).last_modified
        for key, info in listing.items():
            if not key.endswith(RECORD_SUFFIX) or key.startswith(LIVE):
                continue
            task_id = key.removeprefix(RECORDS).removesuffix(RECORD_SUFFIX)
            if live_mark_at(self._bucket, task_id).key in listing:
                continue
            if settled_mark_at(self._bucket, task_id).key not in listing:
                self.add(task_id)  # live, or settled and not cleared up: the sweep finds out
                added += 1
            elif retention_seconds is not None and _seconds(now, info) > retention_seconds:
                deleted += self._delete_record(task_id, expired)
        with contextlib.suppress(PreconditionFailed):  # another worker has begun it meanwhile
            self._s3.replace(S3Location(self._bucket, INVENTORY), _DONE + _now(), begun)
        log.info("inventory_taken", objects=len(listing), added=added, deleted=deleted)
        return True

    def _begin_inventory(self) -> str | None:
        """Begin an inventory if it is due, by a conditional write; its version, else None."""
        location = S3Location(self._bucket, INVENTORY)
        try:
            stored = self._s3.read(location)
        except ObjectNotFound:
            stored = None
        try:
            if stored is None:
                return self._s3.create(location, _now())
            age = (stored.server_date - stored.last_modified).total_seconds()
            pause = INVENTORY_SECONDS if stored.body.startswith(_DONE) else _UNFINISHED_SECONDS
            if age < pause:
                return None
            return self._s3.replace(location, _now(), stored.etag)
        except PreconditionFailed:
            return None  # another worker takes it

    def _delete_record(self, task_id: str, expired: Callable[[JobRecord], bool]) -> bool:
        try:
            version = self.record(task_id).read()
            if version is None or not version.record.is_settled or not expired(version.record):
                return False
            # The record goes first: a mark without a record harms nobody. Only this version goes:
            # a person may send the job back at this moment.
            self._s3.delete_version(record_at(self._bucket, task_id), version.etag)
            self._delete(cancel_file_at(self._bucket, task_id))
            self._delete(pause_file_at(self._bucket, task_id))
            self._delete(settled_mark_at(self._bucket, task_id))
        except StorageError as error:
            log.warning("record_not_deleted", task_id=task_id, reason=str(error))
            return False
        return True

    def _delete(self, location: S3Location) -> None:
        self._s3.delete(location.bucket, [location.key])


def _now() -> bytes:
    # A body of its own each time, so that each inventory has an ETag of its own.
    return datetime.datetime.now(datetime.UTC).isoformat().encode()


def _seconds(now: datetime.datetime, info: ObjectInfo) -> float:
    return (now - info.last_modified).total_seconds()
