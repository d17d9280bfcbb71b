"""Finds job records for operators by id, by the beginning of an id or by subject; writes nothing.

S3 finds objects only by the beginning of their key. So a subject's records are searched among the
unsettled ones, those that its checkpoints and archived models name, and the newest others.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from jobs.layout import (
    INVALID_PREFIX,
    RECORD_SUFFIX,
    RECORDS,
    SETTLED_SUFFIX,
    jobs_folders_of,
    record_at,
)
from jobs.record import JobRecord, State
from services.records.record_object import RecordObject, Version
from services.records.requests import Requests
from services.s3.s3_service import S3Service
from utils.errors import StorageError

MOST_MATCHES = 20
"""Ids that `beginning_with` returns at most."""
SETTLED_LOOKED_AT = 500
"""The number of settled records, newest first, that a search reads."""

_SIDE_BY_SIDE = 8
_REFUSALS_LOOKED_AT = 500
_KEYS_LOOKED_AT = 5000


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """The result of reading a job's record.

    Attributes:
        version: The record and its age; None if there is no readable record.
        problem: The reason if there is none.
        pause_requested: The job is live, and it is to be paused.
    """

    task_id: str
    version: Version[JobRecord] | None
    problem: str = ""
    pause_requested: bool = False

    @property
    def record(self) -> JobRecord | None:
        """The record; None if there is no readable record."""
        return self.version.record if self.version else None


def look_up(s3: S3Service, bucket: str, task_ids: Iterable[str]) -> list[Found]:
    """The records of these tasks, in their order.

    A record that cannot be read is reported with its problem; the others are still returned.
    """
    requests = Requests(s3, bucket)

    def read(task_id: str) -> Found:
        try:
            version = RecordObject(s3, record_at(bucket, task_id), JobRecord).read()
            if version is None:
                return Found(task_id, None, "there is no such record")
            live = version.record.state is State.LIVE
            return Found(task_id, version, pause_requested=live and requests.wants_pause(task_id))
        except StorageError as error:
            return Found(task_id, None, str(error))

    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        return list(pool.map(read, task_ids))


def beginning_with(s3: S3Service, bucket: str, beginning: str) -> list[str]:
    """The ids of jobs and of refused messages that begin like this, at most `MOST_MATCHES`.

    A refused message's id is `invalid/` and a hash; its beginning may be given with or without the
    `invalid/`.

    Raises:
        StorageError: The records cannot be listed.
    """
    prefixes = [beginning]
    if not beginning.startswith(INVALID_PREFIX):
        prefixes.append(INVALID_PREFIX + beginning)
    found = []
    for prefix in prefixes:
        keys = itertools.islice(s3.list_objects(bucket, RECORDS + prefix), _KEYS_LOOKED_AT)
        ids = (_task_id(info.key) for info in keys if info.key.endswith(RECORD_SUFFIX))
        # `in` lists all of `invalid/`, which is not meant.
        found += [each for each in ids if each.count("/") == prefix.count("/")]
    return found[:MOST_MATCHES]


def refusals_of(s3: S3Service, bucket: str, task_id: str) -> list[Found]:
    """The records of refused messages that gave a task id that begins like this, newest first.

    Such a record is named after the message's hash, since the id may belong to a valid job. The
    newest 500 of them are read.

    Raises:
        StorageError: The records cannot be listed.
    """
    listed = [
        info
        for info in s3.list_objects(bucket, RECORDS + INVALID_PREFIX)
        if info.key.endswith(RECORD_SUFFIX)
    ]
    listed.sort(key=lambda info: info.last_modified, reverse=True)
    names = [_task_id(info.key) for info in listed[:_REFUSALS_LOOKED_AT]]
    return [
        each
        for each in look_up(s3, bucket, names)
        if each.record
        and each.record.ending
        and str(each.record.ending.body.get("task_id", "")).startswith(task_id)
    ]


class RecordListing:
    """All records of a state bucket, as one listing shows them, newest first.

    Args:
        s3: The storage.
        bucket: The state bucket.

    Raises:
        StorageError: From every method: the records cannot be listed.
    """

    def __init__(self, s3: S3Service, bucket: str) -> None:
        self._s3 = s3
        self._bucket = bucket

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """The ids of all records, the one that was written last first."""
        return tuple(self._settled_by_id)

    @functools.cached_property
    def unsettled(self) -> tuple[Found, ...]:
        """All records that are not settled, by the sweep's index."""
        names = [name for name, settled in self._settled_by_id.items() if not settled]
        return tuple(look_up(self._s3, self._bucket, names))

    def newest(self, limit: int, *, unsettled_only: bool = False) -> tuple[list[Found], int]:
        """The records that were written last, and how many more there are.

        Args:
            limit: The most that are read.
            unsettled_only: Leave out those that the sweep has found settled.
        """
        names = [
            name
            for name, settled in self._settled_by_id.items()
            if not (unsettled_only and settled)
        ]
        return look_up(self._s3, self._bucket, names[:limit]), max(0, len(names) - limit)

    def settled(self, limit: int = SETTLED_LOOKED_AT) -> list[Found]:
        """The newest of the settled records."""
        names = (name for name, settled in self._settled_by_id.items() if settled)
        return look_up(self._s3, self._bucket, itertools.islice(names, limit))

    def of_subject(
        self, kind: str, subject: str, *, limit: int = SETTLED_LOOKED_AT
    ) -> tuple[list[Found], int]:
        """A subject's records, and the number of records that were not read and may belong to it.

        Args:
            kind: The kind of the subject's jobs.
            subject: The subject.
            limit: The most settled records to read, in addition to those that the subject's
                checkpoints and archived models name.
        """
        named = self._named_by(kind, subject)
        settled = [name for name, is_settled in self._settled_by_id.items() if is_settled]
        others = [name for name in settled if name not in named]
        wanted = named.intersection(settled).union(others[:limit])
        read = look_up(self._s3, self._bucket, (name for name in settled if name in wanted))
        found = {
            each.task_id: each
            for each in (*self.unsettled, *read)
            if each.record and (each.record.kind, each.record.subject) == (kind, subject)
        }
        in_order = [found[name] for name in self._settled_by_id if name in found]
        return in_order, max(0, len(others) - limit)

    @functools.cached_property
    def _settled_by_id(self) -> dict[str, bool]:
        listing = {info.key: info for info in self._s3.list_objects(self._bucket, RECORDS)}
        records = [info for key, info in listing.items() if key.endswith(RECORD_SUFFIX)]
        records.sort(key=lambda info: info.last_modified, reverse=True)
        return {
            _task_id(info.key): info.key.removesuffix(RECORD_SUFFIX) + SETTLED_SUFFIX in listing
            for info in records
        }

    def _named_by(self, kind: str, subject: str) -> set[str]:
        """The ids of the jobs that have checkpoints or archived models under a subject."""
        names = set()
        for prefix in jobs_folders_of(kind, subject):
            for info in self._s3.list_objects(self._bucket, prefix):
                names.add(info.key.removeprefix(prefix).partition("/")[0])
        return names


def _task_id(key: str) -> str:
    return key.removeprefix(RECORDS).removesuffix(RECORD_SUFFIX)
