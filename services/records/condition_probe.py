"""Tests whether a store honours conditional writes, which every claim on a job depends on."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable

from jobs.addresses import S3Location
from jobs.layout import RECORDS
from services.s3.errors import NotSupported
from services.s3.s3_service import S3Service
from utils.errors import PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

PAUSE_SECONDS = 1.0
_TRIES = 3


@dataclasses.dataclass(frozen=True, slots=True)
class ConditionalSupport:
    """The conditions that the store honoured in the test.

    Attributes:
        create: `If-None-Match: *` refuses to overwrite.
        replace: `If-Match` refuses a version that is not the present one.
    """

    create: bool
    replace: bool

    @property
    def complete(self) -> bool:
        """Whether job records are safe in this store."""
        return self.create and self.replace

    @property
    def missing(self) -> str:
        """The headers of the conditions that are not honoured; empty if all are."""
        conditions = (("If-None-Match", self.create), ("If-Match", self.replace))
        return " and ".join(name for name, works in conditions if not works)

    def explain(self) -> str:
        """The consequence, in a sentence for operators."""
        if self.complete:
            return "The store honours conditional writes: no job is trained by two workers at once."
        return (
            f"The store does not honour {self.missing}. With more than one worker "
            "a job may be trained twice, and a suspended worker may overwrite another's record. "
            "Use a store that honours conditional writes (AWS S3, MinIO, Cloudflare R2, Ceph from "
            "Squid on)."
        )


def probe(s3: S3Service, bucket: str, prefix: str = RECORDS) -> ConditionalSupport:
    """Try the conditions on an object made for the test, and remove it.

    Args:
        s3: The storage.
        bucket: The bucket.
        prefix: Key prefix under which the worker may write.

    Raises:
        StorageError: The bucket cannot be read and written at all.
    """
    # No task id begins with a dot, and the sweep reads only `.json`.
    location = S3Location(bucket, f"{prefix}.probe-{uuid.uuid4()}")
    try:
        create, first = _creates(s3, location)
        present = s3.read(location).etag
        return ConditionalSupport(create=create, replace=_replaces(s3, location, present, first))
    finally:
        try:
            s3.delete(bucket, [location.key])
        except StorageError as error:
            log.warning("probe_not_removed", key=location.key, error=str(error))


def _creates(s3: S3Service, location: S3Location) -> tuple[bool, str]:
    """Whether a second `create` is refused, and the object's first version."""
    try:
        first = s3.create(location, b"first")
    except NotSupported:  # the store knows the header, and refuses it
        return False, s3.write(location, b"first")
    return _is_refused(lambda: s3.create(location, b"second")), first


def _replaces(s3: S3Service, location: S3Location, present: str, first: str) -> bool:
    """Whether `replace` writes over the present version, and over no other.

    One refusal of the present version proves nothing: a busy store may refuse without a reason.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            s3.replace(location, b"a third", present)
            break
        except NotSupported:
            return False
        except PreconditionFailed:
            if not tries_left:
                return False
            time.sleep(PAUSE_SECONDS)
            present = s3.read(location).etag
    return _is_refused(lambda: s3.replace(location, b"fourth", first))


def _is_refused(write: Callable[[], str]) -> bool:
    try:
        write()
    except PreconditionFailed:
        return True
    return False
