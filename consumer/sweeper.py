"""Publishes again what no message points to any more: at start, and now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

from config import Settings
from consumer.endings import parked
from consumer.settlement import OWN_COPY, Publication, Queue
from consumer.training_job import from_understood, to_message
from services.job_record import JobRecord, State
from services.record_sweep import RecordSweep
from utils.errors import StorageError
from utils.logger import get_logger

log = get_logger(__name__)


class Sweeper:
    """Looks through the job records in a thread of its own.

    Args:
        sweep: Finds the abandoned records.
        publish: Publishes; may be called by any thread.
        settings: Interval and defaults.
    """

    def __init__(
        self, sweep: RecordSweep, publish: Callable[[Publication], object], settings: Settings
    ) -> None:
        self._sweep = sweep
        self._publish = publish
        self._settings = settings
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="sweeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()

    def _loop(self) -> None:
        while True:
            try:
                for record in self._sweep.abandoned():
                    self._publish_again(record)
            except StorageError as error:
                log.warning("sweep_failed", reason=str(error))
            if self._stopping.wait(self._settings.lease_ttl_seconds):
                return

    def _publish_again(self, record: JobRecord) -> None:
        try:
            body = self._message(record)
        except ValueError as error:
            log.error("record_not_understood", task_id=record.task_id, reason=str(error))
            return
        if record.state is State.ENDED:
            self._publish(parked(record.task_id, body, tries=0, delay=None))
        else:
            self._publish(Publication(Queue.TRAINING, body, record.task_id, {OWN_COPY: True}))

    def _message(self, record: JobRecord) -> bytes:
        if not record.message:
            return b""  # an invalid message: only its ending is left to tell
        return to_message(from_understood(record.message, self._settings))
