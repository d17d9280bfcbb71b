"""Does this store honour conditional writes? Every promise about claims stands on it: try it."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable

from services.s3_service import S3Location, S3Service
from utils.errors import PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class ConditionalSupport:
    """What the store was seen to do.

    Attributes:
        create: `If-None-Match: *` refuses to overwrite.
        replace: `If-Match` refuses a version that is not the present one.
    """

    create: bool
    replace: bool

    @property
    def complete(self) -> bool:
        """Whether records are safe here."""
        return self.create and self.replace

    def explain(self) -> str:
        """What follows from it, in a sentence for ops."""
        if self.complete:
            return "The store honours conditional writes: no job is trained by two workers at once."
        missing = [
            name
            for name, works in (("If-None-Match", self.create), ("If-Match", self.replace))
            if not works
        ]
        return (
            f"The store ignores {' and '.join(missing)}. With more than one worker a job may be "
            "trained twice, and a worker that slept may overwrite another's record. Run a single "
            "worker, or use a store that honours conditional writes, as AWS S3 does."
        )


def probe(s3: S3Service, bucket: str, prefix: str = "jobs/") -> ConditionalSupport:
    """Try the conditions on an object of the probe's own, and remove it.

    Args:
        s3: The storage.
        bucket: Where.
        prefix: Under which the worker may write there.

    Raises:
        StorageError: The bucket cannot be read and written at all.
    """
    # No task id begins with a dot, and the sweep looks at `.json` alone.
    location = S3Location(bucket, f"{prefix}.probe-{uuid.uuid4()}")
    first = s3.create(location, b"first")
    try:
        create = _is_refused(lambda: s3.create(location, b"second"))
        present = s3.read(location).etag
        s3.replace(location, b"third", present)
        replace = _is_refused(lambda: s3.replace(location, b"fourth", first))
        return ConditionalSupport(create=create, replace=replace)
    finally:
        try:
            s3.delete(bucket, [location.key])
        except StorageError as error:
            log.warning("probe_not_removed", key=location.key, error=str(error))


def _is_refused(write: Callable[[], str]) -> bool:
    try:
        write()
    except PreconditionFailed:
        return True
    return False
