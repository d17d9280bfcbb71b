"""Tools of the tests of job records: workers, changes by others, and faults."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any

from jobs.addresses import S3Location
from jobs.hold import decode, encode, stamped
from jobs.record import Ending, EndingKind, JobRecord, JobRequest, OwedCopy
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY
from services.records.job_lease import JobLease
from services.records.job_records import Claimed, JobRecords
from services.s3.s3_service import S3Service, StoredObject
from utils.errors import StorageError

BUCKET = "state"
LEASE = 1.0


def access(endpoint: str) -> dict[str, Any]:
    """How `S3Service` reaches the server."""
    return {
        "region": REGION,
        "endpoint_url": endpoint,
        "access_key_id": ACCESS_KEY_ID,
        "secret_access_key": SECRET_ACCESS_KEY,
    }


def worker(s3: S3Service, name: str = "one", lease: float = LEASE) -> JobRecords:
    """The records as one worker sees them."""
    return JobRecords(s3, BUCKET, owner=name, lease_seconds=lease)


def request(task_id: str | None = None, identity: str = "abc") -> JobRequest:
    """A new job, unless the id is given."""
    message = {"images": ["s3://media/a.jpg"]}
    return JobRequest(task_id or str(uuid.uuid4()), "style", "7", identity, message)


def derived() -> JobRequest:
    """A job whose id was derived from its body."""
    return dataclasses.replace(request(), id_is_derived=True)


def claimed(records: JobRecords, job: JobRequest, **how: Any) -> JobLease:
    """The lease of a claim that must succeed."""
    outcome = records.claim(job, **how)
    assert isinstance(outcome, Claimed), outcome
    return outcome.lease


def adopted(records: JobRecords, task_id: str) -> JobLease:
    """The lease of an adoption that must succeed."""
    outcome = records.adopt_ending(task_id)
    assert isinstance(outcome, Claimed), outcome
    return outcome.lease


def stored(s3: S3Service, task_id: str) -> JobRecord:
    """The record as it is stored on S3."""
    record = worker(s3).read(task_id)
    assert record is not None
    return record


def where(task_id: str) -> S3Location:
    """The record's object."""
    return S3Location(BUCKET, f"jobs/{task_id}.json")


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def ending(kind: EndingKind = EndingKind.COMPLETE) -> Ending:
    """An ending with a new webhook id."""
    return Ending(kind, {"style_id": 7, "sequence": 1_000_001})


def overwrite(s3: S3Service, task_id: str, change: Callable[[JobRecord], JobRecord]) -> None:
    """Do to the record what another worker would."""
    found = s3.read(where(task_id))
    record = change(decode(JobRecord, found.body, task_id))
    s3.replace(where(task_id), encode(stamped(record)), found.etag)


def owed(code: str = "WEBHOOK_REJECTED") -> OwedCopy:
    """A copy that the dead queue will get."""
    return OwedCopy(code, "the backend answered 400", attempts=0)


def settle(lease: JobLease) -> None:
    """End the job and have its ending delivered."""
    lease.end(ending())
    lease.mark_delivered()


class Faulty(S3Service):
    """S3 with faults: `fault` runs before or after each conditional write really takes place."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(**access(endpoint))
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None
        self.reads: list[str] = []

    def read(self, location: S3Location, **how: Any) -> StoredObject:
        self.reads.append(location.key)
        return super().read(location, **how)

    def create(self, location: S3Location, body: bytes, **how: Any) -> str:
        self.before()
        etag = super().create(location, body, **how)
        self.after()
        return etag

    def replace(self, location: S3Location, body: bytes, etag: str, **how: Any) -> str:
        self.before()
        etag = super().replace(location, body, etag, **how)
        self.after()
        return etag


def away() -> None:
    """The fault of a store that cannot be reached."""
    raise StorageError("S3 is away")


def times(count: int) -> Callable[[], None]:
    """The fault of a store that does not answer this many writes."""
    left = [count]

    def fault() -> None:
        left[0] -= 1
        if left[0] >= 0:
            away()

    return fault
