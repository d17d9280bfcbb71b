"""Requests about a job: files next to its record, which workers look for.

jobs/{task_id}.cancel   the job ends as cancelled
jobs/{task_id}.pause    the job is saved and released, and waits until the file goes
"""

from __future__ import annotations

import dataclasses

from jobs.hold import stamped
from jobs.layout import cancel_file_at, pause_file_at, record_at
from jobs.record import JobRecord
from services.records.record_object import RecordObject
from services.s3.s3_service import S3Service
from utils.errors import PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

_RACES = 10


class Requests:
    """The files that steer the jobs of a state bucket.

    Args:
        s3: The storage.
        bucket: The state bucket.

    Raises:
        StorageError: From every method: S3 cannot be used. The call can be repeated.
    """

    def __init__(self, s3: S3Service, bucket: str) -> None:
        self._s3 = s3
        self._bucket = bucket

    def wants_cancel(self, task_id: str) -> bool:
        """Whether the job is to be cancelled."""
        return self._s3.exists(cancel_file_at(self._bucket, task_id))

    def wants_pause(self, task_id: str) -> bool:
        """Whether the job is to be paused."""
        return self._s3.exists(pause_file_at(self._bucket, task_id))

    def keeps_paused(self, task_id: str) -> bool:
        """Whether a paused job stays paused: it was neither resumed nor cancelled."""
        return self.wants_pause(task_id) and not self.wants_cancel(task_id)

    def cancel(self, task_id: str) -> None:
        """Cancel the job: at its holder's next renewal, or when its message is taken."""
        self._s3.write(cancel_file_at(self._bucket, task_id), b"")

    def pause(self, task_id: str) -> None:
        """Pause the job: at its holder's next renewal, or when its message is taken."""
        self._s3.write(pause_file_at(self._bucket, task_id), b"")

    def resume(self, task_id: str) -> JobRecord | None:
        """Take a request to pause back.

        The caller publishes the job's message afterwards. If it cannot, a worker's sweep does.

        Returns:
            The job's record; None if no worker has seen the job yet.
        """
        self.forget_pause(task_id)
        target = RecordObject(self._s3, record_at(self._bucket, task_id), JobRecord)
        for _ in range(_RACES):
            version = target.read()
            if version is None:
                return None
            if not version.record.is_paused:
                return version.record
            free = version.record.hold.dropped()
            record = dataclasses.replace(version.record, hold=free, sweeps=0)
            try:
                target.write(stamped(record), version.etag)
            except PreconditionFailed:
                continue  # a worker was faster; read its record
            log.info("job_resumed", task_id=task_id)
            return record
        raise StorageError(f"The record {target.location.key} changes too fast; try again.")

    def forget_pause(self, task_id: str) -> None:
        """Delete a request to pause."""
        place = pause_file_at(self._bucket, task_id)
        self._s3.delete(place.bucket, [place.key])
