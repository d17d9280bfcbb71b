"""Jobs that publish into one folder take turns: a lease for each folder.

A folder of several files cannot be replaced in one act, so two publishers at once would mix their
files. The turn is a record like a job's (`jobs.hold`), at the key `jobs.layout.Place.turn`. From
before a publisher's first write into the folder until after its last one, the turn also holds a
note about that publication, by which the folder can be restored if the publisher dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator

from jobs.addresses import S3Location
from jobs.hold import HeldRecord, Hold, later, stamped
from services.records.lease import Lease
from services.records.record_object import Expiry, RecordObject
from services.s3.s3_service import S3Service
from utils.errors import LeaseLost, PreconditionFailed
from utils.logger import get_logger

log = get_logger(__name__)

_PAUSE_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class ReplacedFile:
    """A file that the folder had before a publication.

    Attributes:
        name: Its name in the folder.
        archived: Key of its copy in the state bucket.
        etag: Its version in the folder.
        task_id: The job that published it; None if the file names no job.
        claim: The claim that published it; None if the file names no claim.
    """

    name: str
    archived: str
    etag: str
    task_id: str | None = None
    claim: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Replacement:
    """A publication that has begun, and whose job has not ended yet.

    Attributes:
        task_id: The job that publishes.
        claim: The claim that publishes.
        files: Names of the files that it writes.
        before: The files that the folder had before.
        done: All files are written. The previous files are kept until the job's ending is
            durable: until then the job may still be cancelled or fail.
    """

    task_id: str
    claim: int
    files: tuple[str, ...]
    before: tuple[ReplacedFile, ...] = ()
    done: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PublishingTurn(HeldRecord):
    """The job that publishes into a folder.

    Attributes:
        task_id: The job that publishes, or published last; for people.
        replacement: The publication that is under way, or that its publisher left unfinished, or
            whose job has not ended yet; else None.
    """

    task_id: str
    replacement: Replacement | None = later(None)


class Turns:
    """Every folder's turn, as one worker sees them.

    Args:
        s3: The storage. Its time-outs are well within the lease.
        bucket: The state bucket.
        owner: This worker's name, for people.
        lease_seconds: The time for which a dead publisher delays the others.
    """

    def __init__(self, s3: S3Service, bucket: str, *, owner: str, lease_seconds: float) -> None:
        self._s3 = s3
        self._bucket = bucket
        self._owner = owner
        self._lease_seconds = lease_seconds
        self._expiry = Expiry()

    def read(self, key: str) -> PublishingTurn | None:
        """The folder's present turn, by one request; None if nothing was published into it.

        Raises:
            StorageError: S3 cannot be used.
        """
        version = self._target(key).read()
        return version.record if version else None

    @contextlib.contextmanager
    def take(
        self, key: str, task_id: str, check: Callable[[], None]
    ) -> Iterator[Lease[PublishingTurn]]:
        """Wait for the turn and hold it while the block runs.

        A note that a dead publisher left in the turn is still there when the block begins.

        Args:
            key: The turn of the folder (see `jobs.layout.Place`).
            task_id: The job that wants to publish.
            check: Called while waiting; ends it by raising.

        Raises:
            StorageError: S3 cannot be used.
        """
        with self._wait_for(self._target(key), task_id, check) as lease:
            try:
                yield lease
            finally:
                with contextlib.suppress(LeaseLost):
                    lease.update(
                        lambda turn: dataclasses.replace(turn, hold=turn.hold.dropped()),
                        within=self._lease_seconds / 2,
                    )

    def _target(self, key: str) -> RecordObject[PublishingTurn]:
        return RecordObject(self._s3, S3Location(self._bucket, key), PublishingTurn)

    def _wait_for(
        self, target: RecordObject[PublishingTurn], task_id: str, check: Callable[[], None]
    ) -> Lease[PublishingTurn]:
        waiting = False
        while True:
            check()
            version = target.read()
            if version is None or not self._expiry.wait_seconds(target.location.key, version):
                turn = stamped(self._taken(version.record if version else None, task_id))
                began_at = time.monotonic()
                with contextlib.suppress(PreconditionFailed):  # another publisher was faster
                    etag = target.write(turn, version.etag if version else None)
                    return Lease(target, turn, etag, began_at)
            elif not waiting:
                waiting = True
                log.info("waiting_for_turn", publisher=version.record.task_id)
            time.sleep(_PAUSE_SECONDS * random.uniform(0.5, 1.0))

    def _taken(self, turn: PublishingTurn | None, task_id: str) -> PublishingTurn:
        if turn is None:
            hold = Hold(owner=self._owner, claim=1, lease_seconds=self._lease_seconds)
            return PublishingTurn(hold=hold, task_id=task_id)
        hold = turn.hold.taken(self._owner, self._lease_seconds)
        return dataclasses.replace(turn, hold=hold, task_id=task_id)
