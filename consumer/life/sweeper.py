"""Publishes the messages of abandoned job records again: at the start, then at an interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from consumer.life.checkpoint_uploads import delete_all_of
from consumer.life.endings import parked, training_copy
from consumer.pages.observer import Observer
from jobs.kinds import Kinds
from jobs.message import from_understood
from jobs.record import JobRecord, State
from services.broker.settlement import Publication
from services.records.sweep import RecordSweep
from services.s3.s3_service import S3Service
from utils.errors import NewerRecord, StorageError
from utils.logger import get_logger
from utils.threads import Every

log = get_logger(__name__)

_SECONDS_PER_DAY = 86_400.0


class Sweeper:
    """Sweeps the job records in a separate thread.

    Args:
        sweep: Finds the abandoned records.
        publish: Publishes; may be called by any thread.
        kinds: Write the message of a record.
        s3: The store of the state bucket.
        bucket: The state bucket; the rest of a deleted record is deleted from it.
        every_seconds: The time between two sweeps.
        retention_days: Days after which the record of an ended job is deleted; None keeps records.
        observer: Counts the results.
    """

    def __init__(
        self,
        sweep: RecordSweep,
        publish: Callable[[Publication], object],
        kinds: Kinds,
        s3: S3Service,
        bucket: str,
        *,
        every_seconds: float,
        retention_days: float | None,
        observer: Observer,
    ) -> None:
        self._sweep = sweep
        self._publish = publish
        self._bucket = bucket
        self._retention_days = retention_days
        self._kinds = kinds
        self._s3 = s3
        self._observer = observer
        self._every = Every(every_seconds, self.sweep_once, name="sweeper")

    def __enter__(self) -> Self:
        self._every.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._every.stop(join_seconds=0)  # a sweep that hangs in the network is not waited for

    def sweep_once(self) -> None:
        """Take the inventory if it is due, and publish again what was abandoned."""
        days = self._retention_days
        try:
            self._sweep.index.take_inventory(
                None if days is None else days * _SECONDS_PER_DAY, self._delete_what_is_left
            )
            for record in self._sweep.abandoned():
                self._publish_again(record)
        except StorageError as error:
            log.warning("sweep_failed", reason=str(error))
            return
        census = self._sweep.census
        self._observer.endings_pending(census.endings_pending, census.oldest_ending_seconds)

    def _publish_again(self, record: JobRecord) -> None:
        try:
            body = self._message(record)
        except (ValueError, NewerRecord) as error:
            log.error("record_not_understood", task_id=record.task_id, reason=str(error))
            return
        self._observer.swept()
        if record.state is State.ENDED:
            self._publish(parked(record.task_id, body, tries=0, delay=None))
        else:
            self._publish(training_copy(record, body))

    def _message(self, record: JobRecord) -> bytes:
        if not record.message:
            return b""  # an invalid message: only its ending is left to deliver
        return from_understood(self._kinds.of(record.kind), record.message).body

    def _delete_what_is_left(self, record: JobRecord) -> bool:
        return delete_all_of(self._s3, self._bucket, record)
