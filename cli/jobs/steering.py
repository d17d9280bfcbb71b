"""`python main.py cancel`, `pause` and `resume`: files that workers check.

A job that is resumed also gets its message again.
"""

from __future__ import annotations

import re

from cli import broker
from consumer.life.endings import training_copy
from jobs.kinds import Kinds
from jobs.layout import record_at
from jobs.message import from_understood
from jobs.record import JobRecord, State
from services.records.listing import RecordListing
from services.records.record_object import RecordObject
from services.records.requests import Requests
from services.s3.s3_service import S3Service
from utils.errors import BrokerError, ConfigurationError, NewerRecord
from utils.settings.groups import BrokerSettings

_TASK_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def unended(s3: S3Service, bucket: str, task_id: str, to_do: str) -> JobRecord | None:
    """The record of a job that has not ended.

    Args:
        s3: The storage.
        bucket: The state bucket.
        task_id: The job.
        to_do: `cancel`, `pause` or `resume`, for the error.

    Returns:
        Its record; None where no worker has seen the job yet.

    Raises:
        ConfigurationError: There can be no such job, or it is over.
        StorageError: S3 cannot be used.
    """
    if not _TASK_ID.fullmatch(task_id):
        raise ConfigurationError(f"{task_id!r} is not a task id: 1 to 128 of A-Z, a-z, 0-9, _, -")
    version = RecordObject(s3, record_at(bucket, task_id), JobRecord).read()
    if version is not None and version.record.state is State.ENDED:
        ending = version.record.ending
        raise ConfigurationError(
            f"{task_id} has ended ({ending.kind if ending else 'unknown'}): there is nothing "
            f"to {to_do}"
        )
    return version.record if version else None


def live_of(listing: RecordListing, kind: str, subject: str) -> list[JobRecord]:
    """The live jobs of a subject that a worker has seen, the newest order first.

    Raises:
        StorageError: The records cannot be listed.
    """
    found = [
        each.record
        for each in listing.unsettled
        if each.record
        and (each.record.kind, each.record.subject) == (kind, subject)
        and each.record.state is State.LIVE
    ]
    return sorted(found, key=lambda record: record.created_at, reverse=True)


class Steering:
    """Cancels, pauses and resumes jobs.

    Args:
        settings: The broker and the queue.
        kinds: Write the messages of jobs.
        s3: The storage of the state bucket.
        bucket: The state bucket.
    """

    def __init__(self, settings: BrokerSettings, kinds: Kinds, s3: S3Service, bucket: str) -> None:
        self._settings = settings
        self._kinds = kinds
        self._requests = Requests(s3, bucket)

    def cancel(self, record: JobRecord | None, task_id: str) -> str:
        """Cancel a job: at its holder's next renewal, or before it is trained next.

        No message points to a paused job, so its message is published again.

        Returns:
            Why that message could not be published; empty if it was, or if none was needed.

        Raises:
            StorageError: S3 cannot be used.
        """
        self._requests.cancel(task_id)
        return self._publish(record) if record and record.is_paused else ""

    def pause(self, task_id: str) -> None:
        """Pause a job: at its holder's next renewal, or when its message is taken.

        Raises:
            StorageError: S3 cannot be used.
        """
        self._requests.pause(task_id)

    def resume(self, task_id: str) -> str:
        """Let a paused job go on: its request to pause goes, and its message is published again.

        Returns:
            Why the message could not be published; empty if it was, or if none was needed.

        Raises:
            ConfigurationError: The job is not paused.
            StorageError: S3 cannot be used.
        """
        if not self._requests.wants_pause(task_id):
            raise ConfigurationError(f"{task_id} is not paused: there is nothing to resume")
        record = self._requests.resume(task_id)
        return self._publish(record) if record and record.state is State.LIVE else ""

    def _publish(self, record: JobRecord) -> str:
        """Publish the message of a live job; returns the reason if that fails."""
        try:
            message = from_understood(self._kinds.of(record.kind), record.message).body
            broker.publish(self._settings, training_copy(record, message))
        except (BrokerError, NewerRecord, ValueError) as error:
            return str(error)
        return ""
