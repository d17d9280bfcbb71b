"""Publishes again what no message points to any more: at start, and now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

from config import Settings
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

log = get_logger(__name__)

_SECONDS_PER_DAY = 86_400.0


class Sweeper:
    """Looks through the job records in a thread of its own.

    Args:
        sweep: Finds the abandoned records.
        publish: Publishes; may be called by any thread.
        settings: Interval and retention.
        kinds: Write the message of a record.
        s3: Holds what a record that is deleted has left.
        observer: Is told what was found.
    """

    def __init__(
        self,
        sweep: RecordSweep,
        publish: Callable[[Publication], object],
        settings: Settings,
        kinds: Kinds,
        s3: S3Service,
        observer: Observer,
    ) -> None:
        self._sweep = sweep
        self._publish = publish
        self._settings = settings
        self._kinds = kinds
        self._s3 = s3
        self._observer = observer
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="sweeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()

    def sweep_once(self) -> None:
        """Take the inventory if it is due, and publish again what was abandoned."""
        days = self._settings.record_retention_days
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

    def _loop(self) -> None:
        while True:
            self.sweep_once()
            if self._stopping.wait(self._settings.lease_ttl_seconds):
                return

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
            return b""  # an invalid message: only its ending is left to tell
        return from_understood(self._kinds.of(record.kind), record.message).body

    def _delete_what_is_left(self, record: JobRecord) -> bool:
        return delete_all_of(self._s3, self._settings.state_bucket_name, record)
