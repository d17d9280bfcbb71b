"""Job records for people to look at: read side by side, and never written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from services.job_record import JobRecord
from services.record_index import FOLDER, RECORD_SUFFIX, SETTLED_SUFFIX, record_at
from services.record_object import RecordObject, Version
from services.s3_service import S3Service
from utils.errors import StorageError

_SIDE_BY_SIDE = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What lies under a job's id.

    Attributes:
        version: The record and its age; None where there is none that can be read.
        problem: Why there is none.
    """

    task_id: str
    version: Version[JobRecord] | None
    problem: str = ""


def look_up(s3: S3Service, bucket: str, task_ids: Iterable[str]) -> list[Found]:
    """The records of these tasks, in their order.

    One that cannot be read is told as such, and costs the others nothing.
    """

    def read(task_id: str) -> Found:
        try:
            version = RecordObject(s3, record_at(bucket, task_id), JobRecord).read()
        except StorageError as error:
            return Found(task_id, None, str(error))
        return Found(task_id, version, "" if version else "there is no such record")

    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        return list(pool.map(read, task_ids))


def newest(
    s3: S3Service, bucket: str, *, limit: int, unsettled_only: bool = False
) -> tuple[list[Found], int]:
    """The records that were written last, newest first, and how many more there are.

    Args:
        s3: The storage.
        bucket: The state bucket.
        limit: No more than so many are read.
        unsettled_only: Leave out those that the sweep has found settled.

    Raises:
        StorageError: The records cannot be listed.
    """
    listing = {info.key: info for info in s3.list_objects(bucket, FOLDER)}
    records = [
        info
        for key, info in listing.items()
        if key.endswith(RECORD_SUFFIX)
        and not (unsettled_only and key.removesuffix(RECORD_SUFFIX) + SETTLED_SUFFIX in listing)
    ]
    records.sort(key=lambda info: info.last_modified, reverse=True)
    names = [info.key.removeprefix(FOLDER).removesuffix(RECORD_SUFFIX) for info in records]
    return look_up(s3, bucket, names[:limit]), max(0, len(names) - limit)
