"""One record on S3: read whole, changed by conditional writes; and whether its lease ran out.

S3 compares and writes as one act (`If-None-Match: *` to create, `If-Match` to change), so of
several workers that change the same version exactly one succeeds.
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
    """A record as it was read.

    Attributes:
        age_seconds: From its last write to this read, both by S3's own dates.
        asked_at: This process's monotonic clock before the read.
        seen_at: The same clock after it.
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
        """The record as it is now; None where there is none.

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
        """Write the record where the object is still at `etag`, or does not exist (None).

        Safe to repeat with the same record: one's own write, whose answer was lost, is recognised
        by its nonce.

        Args:
            record: Stamped (`jobs.hold.stamped`).
            etag: The version that the change was made from.

        Returns:
            The new version's ETag.

        Raises:
            PreconditionFailed: Somebody else changed, made or removed the object.
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
                # S3 answers 409 while another write of the same key is in flight; that write may
                # yet fail.
                raise StorageError(
                    f"S3 refused to write {self.location.key} though nobody has changed it; "
                    "it can be tried again."
                ) from error
            raise PreconditionFailed(
                f"The record {self.location.key} was changed by somebody else."
            ) from error


class Expiry:
    """Judges whether a lease has run out, without trusting any other machine's clock.

    A lease is over when S3's own dates say so, or when this process has seen the same ETag for a
    whole lease of its own monotonic clock: a holder that lives would have written meanwhile.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def wait_seconds(self, key: str, version: Version[R]) -> float:
        """How long the record is its holder's if nothing more is written; 0.0: it may be taken."""
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
                # The oldest goes first; forgetting only means that its lease is judged by the dates
                # alone for a while.
                self._seen.pop(next(iter(self._seen)))
            return since
