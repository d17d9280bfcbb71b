"""One record on S3: reads, conditional writes, and the test of its lease's expiry.

S3 compares and writes in one step (`If-None-Match: *` to create, `If-Match` to change). If several
workers change the same version, exactly one succeeds.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Generic

from jobs.addresses import S3Location
from jobs.hold import R, decode, encode, values_beside
from services.s3.s3_service import S3Service
from utils.errors import ObjectNotFound, PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

DATE_SLACK_SECONDS = 2.0
"""`Last-Modified` and `Date` have whole seconds, and S3's own machines differ a little."""

_REMEMBERED = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Version(Generic[R]):
    """A record and the times of its reading.

    Attributes:
        age_seconds: Seconds from its last write to this read, both by S3's own dates.
        asked_at: This process's monotonic clock before the read.
        seen_at: The same clock after the read.
    """

    record: R
    etag: str
    age_seconds: float
    asked_at: float
    seen_at: float


class RecordObject(Generic[R]):
    """The object that holds one record."""

    def __init__(self, s3: S3Service, location: S3Location, kind: type[R]) -> None:
        self.location = location
        self._s3 = s3
        self._kind = kind

    def read(self) -> Version[R] | None:
        """The present record; None if there is none.

        Raises:
            DamagedRecord, NewerRecord: The object is not a record that this worker can use.
            StorageError: S3 cannot be used.
        """
        asked_at = time.monotonic()
        try:
            stored = self._s3.read(self.location)
        except ObjectNotFound:
            return None
        return Version(
            record=decode(self._kind, stored.body, self.location.key, stored.metadata),
            etag=stored.etag,
            age_seconds=(stored.server_date - stored.last_modified).total_seconds(),
            asked_at=asked_at,
            seen_at=time.monotonic(),
        )

    def write(self, record: R, etag: str | None) -> str:
        """Write the record if the object is still at `etag`, or does not exist (None).

        The call can be repeated with the same record: if S3's answer was lost, the write is
        recognised by its nonce.

        Args:
            record: The record, stamped (`jobs.hold.stamped`).
            etag: The version that was changed.

        Returns:
            The new version's ETag.

        Raises:
            PreconditionFailed: Another process changed, made or removed the object.
            StorageError: It is not known whether the record was written; the same call may be made
                again.
        """
        body, beside = encode(record), values_beside(record)
        try:
            if etag is None:
                return self._s3.create(self.location, body, metadata=beside)
            return self._s3.replace(self.location, body, etag, metadata=beside)
        except (PreconditionFailed, ObjectNotFound) as error:
            if etag is None and isinstance(error, ObjectNotFound):
                raise  # there is no such bucket
            found = self.read()
            if found and found.record.hold.nonce == record.hold.nonce:
                log.info("own_write_recognised", key=self.location.key, claim=record.hold.claim)
                return found.etag
            if (found.etag if found else None) == etag:
                # S3 answers 409 while another write of the same key is under way; that write may
                # still fail.
                raise StorageError(
                    f"S3 refused to write {self.location.key}, although no other write changed it. "
                    "Try again."
                ) from error
            raise PreconditionFailed(
                f"The record {self.location.key} was changed by another process."
            ) from error


class Expiry:
    """Judges whether a lease has expired, without trusting another machine's clock.

    A lease has expired if S3's own dates show it, or if this process has seen the same ETag for a
    whole lease on its monotonic clock: a live holder would have written in that time.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def wait_seconds(self, key: str, version: Version[R]) -> float:
        """Seconds for which the holder keeps the record without a further write.

        0.0 means that it is free.
        """
        hold = version.record.hold
        if hold.released:
            return 0.0
        unchanged = version.asked_at - self._first_seen(key, version.etag, version.seen_at)
        by_dates = hold.lease_seconds + DATE_SLACK_SECONDS - version.age_seconds
        return max(0.0, min(by_dates, hold.lease_seconds - max(0.0, unchanged)))

    def _first_seen(self, key: str, etag: str, now: float) -> float:
        with self._lock:
            known, since = self._seen.pop(key, ("", now))
            if known != etag:
                since = now
            self._seen[key] = (etag, since)
            while len(self._seen) > _REMEMBERED:
                # The oldest is forgotten first; its lease is then judged only by the dates for a
                # while.
                self._seen.pop(next(iter(self._seen)))
            return since
