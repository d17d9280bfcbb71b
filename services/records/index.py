"""The index of the job records that are not settled, and the daily inventory of all records.

The records are `jobs/{task_id}.json`. A record that is not settled has an entry in the index: an
empty object `jobs/live/{task_id}`, made before the record and removed after the record is settled.
The sweep lists only the index, so its cost depends on the live jobs and not on the history.

A settled record gets an empty object `jobs/{task_id}.settled`, so that the inventory need not read
it. The inventory lists every record, once a day and on one worker. It adds records to the index
that an older worker did not add, and deletes records that ended longer ago than the retention.
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
"""An inventory that began longer ago than this is taken to be abandoned."""


class RecordIndex:
    """The index of the unsettled records of a state bucket.

    Args:
        s3: As for `JobRecords`.
        bucket: The state bucket.
    """

    def __init__(self, s3: S3Service, bucket: str) -> None:
        self._s3 = s3
        self._bucket = bucket

    def add(self, task_id: str) -> None:
        """Add a record to the index, before it is made, or made live again.

        Raises:
            StorageError: S3 cannot be used.
        """
        self._s3.write(live_mark_at(self._bucket, task_id), b"")

    def remove(self, task_id: str) -> None:
        """Remove a settled record from the index.

        An operator may send the job back at this moment, so the record is read once more. In either
        order, a record that is live again is on the index.

        Raises:
            StorageError: S3 cannot be used.
        """
        settled = settled_mark_at(self._bucket, task_id)
        with contextlib.suppress(PreconditionFailed):  # then another process has marked it
            self._s3.create(settled, b"")
        self._delete(live_mark_at(self._bucket, task_id))
        version = self.record(task_id).read()
        if version is not None and not version.record.is_settled:
            self.add(task_id)
            self._delete(settled)

    def reopen(self, task_id: str) -> None:
        """Add a formerly settled record to the index, after it was made live again.

        Raises:
            StorageError: S3 cannot be used.
        """
        self.add(task_id)
        self._delete(settled_mark_at(self._bucket, task_id))

    def forget(self, task_id: str) -> None:
        """Remove an id from the index that has no record.

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
        """Take the inventory of all records, if no worker has within a day.

        Args:
            retention_seconds: Records that were settled longer ago are deleted; None keeps all.
            expired: Deletes the other objects of a record; returns False if that failed.

        Returns:
            Whether this call took it.

        Raises:
            StorageError: S3 cannot be used. The inventory begins again after ten minutes, also if
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
            # The record is deleted first: a mark without a record is harmless. Only this version
            # is deleted: an operator may send the job back at this moment.
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
    # A different body each time, so that each inventory has its own ETag.
    return datetime.datetime.now(datetime.UTC).isoformat().encode()


def _seconds(now: datetime.datetime, info: ObjectInfo) -> float:
    return (now - info.last_modified).total_seconds()
