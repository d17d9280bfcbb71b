"""Finding jobs that no message points to any more.

Their queue was deleted or purged, or the broker gave up on them.

A record that has been silent for much longer than its holder promised, and is not settled, is
handed to the caller, who publishes it again: a live one to the training queue, an undelivered
ending to the endings' queue. A message too many does no harm, since it is only a hint to look at
the record.

Settled records stay for years and must not be read at each sweep. So whoever finds one settled
clears up after it, since the worker that ended it may have died or met a broken S3 before it could,
and then puts an empty `jobs/{task_id}.settled` beside it, once: the listing alone tells from then
on. Only a person who sends the job back changes a settled record. That removes the mark after its
write, and the sweep looks at the record once more after making the mark: whichever comes last, none
stays beside a record that lives again. Where the mark is missing, the record is read once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from services.hold import stamped
from services.job_record import JobRecord
from services.job_records import FOLDER
from services.record_object import RecordObject, Version
from services.s3_service import ObjectInfo, S3Location, S3Service
from utils.errors import PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

RECORD_SUFFIX = ".json"
SETTLED_SUFFIX = ".settled"

_PATIENCE_LEASES = 2
"""Beyond the promised silence: a redelivered message gets to another worker first, as it should."""


class RecordSweep:
    """Looks through all records of a state bucket.

    Args:
        s3: As for `JobRecords`.
        bucket: The state bucket.
        lease_seconds: This worker's lease; a younger record is not even read.
        clear_up: Removes what a settled job needs no more; False where it must be tried again.
    """

    def __init__(
        self,
        s3: S3Service,
        bucket: str,
        *,
        lease_seconds: float,
        clear_up: Callable[[JobRecord], bool] = lambda record: True,
    ) -> None:
        self._s3 = s3
        self._bucket = bucket
        self._lease_seconds = lease_seconds
        self._clear_up = clear_up

    def abandoned(self) -> Iterator[JobRecord]:
        """The records that this worker is to publish again.

        Each is given back on its dead holder's behalf before it is handed out, by a conditional
        write: of several workers that sweep at once one gets it, and a holder that only slept finds
        that it has lost. If its message is lost once more, it turns up again, after a silence that
        doubles each time.

        Raises:
            StorageError: The records cannot be listed. One that cannot be read or written is left
                for the next sweep.
        """
        for info in self._unsettled():
            target = RecordObject(self._s3, S3Location(self._bucket, info.key), JobRecord)
            try:
                version = target.read()
                if version is None:
                    continue
                if version.record.is_settled:
                    if self._clear_up(version.record):
                        self._mark_settled(target)
                    continue
                if version.etag == info.etag and version.age_seconds < self._lease_seconds:
                    return  # the oldest come first, so all that follow are younger still
                if not is_abandoned(version):
                    continue
                record = stamped(version.record.swept())
                target.write(record, version.etag)
            except PreconditionFailed:
                continue  # it lives after all, or another worker's sweep has it
            except StorageError as error:
                log.warning("record_not_swept", key=info.key, error=str(error))
                continue
            log.warning(
                "record_abandoned",
                task_id=record.task_id,
                state=record.state,
                holder=record.hold.owner,
                claim=record.claim,
                age_seconds=version.age_seconds,
            )
            yield record

    def _unsettled(self) -> list[ObjectInfo]:
        listing = {info.key: info for info in self._s3.list_objects(self._bucket, FOLDER)}
        found = [
            info
            for key, info in listing.items()
            if key.endswith(RECORD_SUFFIX)
            and key.removesuffix(RECORD_SUFFIX) + SETTLED_SUFFIX not in listing
        ]
        return sorted(found, key=lambda info: info.last_modified)

    def _mark_settled(self, target: RecordObject[JobRecord]) -> None:
        mark = settled_mark(target.location)
        with contextlib.suppress(PreconditionFailed):  # then somebody else has marked it
            self._s3.create(mark, b"")
        again = target.read()
        if again is None or not again.record.is_settled:
            self._s3.delete(mark.bucket, [mark.key])


def settled_mark(record: S3Location) -> S3Location:
    """The empty object that says of a record that nothing is left to do."""
    return S3Location(record.bucket, record.key.removesuffix(RECORD_SUFFIX) + SETTLED_SUFFIX)


def is_abandoned(version: Version[JobRecord]) -> bool:
    """Whether an unsettled record has been silent for so long that its message must be lost."""
    hold = version.record.hold
    return version.age_seconds > hold.silence + _PATIENCE_LEASES * hold.lease_seconds
