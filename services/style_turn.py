"""Runs of one style take turns at publishing: a lease of its own for each style's folder.

A folder of several files cannot be replaced in one act, so two publishers at once would mix theirs.
The turn is a record like a job's (`services.hold`), at `jobs/style_{style_id}.turn`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator

from services.hold import HeldRecord, Hold, stamped
from services.lease import Lease
from services.record_object import Expiry, RecordObject
from services.s3_service import S3Location, S3Service
from utils.errors import LeaseLost, PreconditionFailed
from utils.logger import get_logger

log = get_logger(__name__)

_PAUSE_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turn(HeldRecord):
    """Who publishes into a style's folder.

    Attributes:
        task_id: The job that publishes, or published last; for people.
    """

    task_id: str


class StyleTurns:
    """Every style's turn, as one worker sees them.

    Args:
        s3: With time-outs well within the lease.
        bucket: The state bucket.
        owner: This worker's name, for people.
        lease_seconds: How long a dead publisher holds up the others.
    """

    def __init__(self, s3: S3Service, bucket: str, *, owner: str, lease_seconds: float) -> None:
        self._s3 = s3
        self._bucket = bucket
        self._owner = owner
        self._lease_seconds = lease_seconds
        self._expiry = Expiry()

    @contextlib.contextmanager
    def take(self, style_id: int, task_id: str, check: Callable[[], None]) -> Iterator[Lease[Turn]]:
        """Wait for the turn and hold it while the block runs.

        Args:
            style_id: The style.
            task_id: The job that wants to publish.
            check: Called while waiting; ends it by raising.

        Raises:
            StorageError: S3 cannot be used.
        """
        key = f"jobs/style_{style_id}.turn"
        target = RecordObject(self._s3, S3Location(self._bucket, key), Turn)
        with self._wait_for(target, key, task_id, check) as lease:
            try:
                yield lease
            finally:
                with contextlib.suppress(LeaseLost):
                    lease.update(
                        lambda turn: dataclasses.replace(turn, hold=turn.hold.dropped()),
                        within=self._lease_seconds / 2,
                    )

    def _wait_for(
        self, target: RecordObject[Turn], key: str, task_id: str, check: Callable[[], None]
    ) -> Lease[Turn]:
        waiting = False
        while True:
            check()
            version = target.read()
            etag: str | None = None
            hold = Hold(owner=self._owner, claim=1, lease_seconds=self._lease_seconds)
            if version:
                etag = version.etag
                hold = version.record.hold.taken(self._owner, self._lease_seconds)
            if version is None or not self._expiry.wait_seconds(key, version):
                turn = stamped(Turn(hold=hold, task_id=task_id))
                began_at = time.monotonic()
                with contextlib.suppress(PreconditionFailed):  # somebody was faster
                    return Lease(target, turn, target.write(turn, etag), began_at)
            elif not waiting:
                waiting = True
                log.info("waiting_for_turn", publisher=version.record.task_id)
            time.sleep(_PAUSE_SECONDS * random.uniform(0.5, 1.0))
