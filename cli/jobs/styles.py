"""The state of a style for a warning before an action: its published model, and later orders.

The platform's backend knows a style, not its jobs. If a job of a style fails or is cancelled, it
marks the style as failed, even if an earlier job has published a model that is sold.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Iterable

from consumer.publishing.model_folder import ORDERED_AT, TASK_ID
from consumer.publishing.order_time import instant, order_time
from jobs.addresses import S3Location
from jobs.layout import STYLE, WEIGHTS, place_of
from jobs.record import EndingKind, JobRecord, State
from services.records.listing import RecordListing, look_up
from services.s3.s3_service import S3Service
from utils.errors import StorageError
from utils.settings.storage import StorageSettings


@dataclasses.dataclass(frozen=True, slots=True)
class PublishedModel:
    """The published model of a style.

    Attributes:
        style_id: The style.
        task_id: The job that made it; empty if the files do not name it.
        ordered_at: When that job was ordered; None if the files do not name it.
    """

    style_id: int
    task_id: str
    ordered_at: datetime.datetime | None


@dataclasses.dataclass(frozen=True, slots=True)
class Later:
    """A later order of a style.

    Attributes:
        task_id: The job.
        ordered_at: When it was ordered.
        is_live: It has not ended; else it has published its model.
    """

    task_id: str
    ordered_at: datetime.datetime
    is_live: bool

    def __str__(self) -> str:
        has = "is still live" if self.is_live else "has published its model"
        return f"{self.task_id} was ordered later ({self.ordered_at:%Y-%m-%d %H:%M} UTC) and {has}"


def published(bucket: str, s3: S3Service, style_id: int) -> PublishedModel | None:
    """The model that a style has; None if it has none, or if S3 does not answer."""
    weights = S3Location(bucket, place_of(STYLE, str(style_id), "").models + WEIGHTS)
    try:
        metadata = s3.head(weights).metadata
    except StorageError:
        return None  # this is only a warning; if S3 is down, the next step fails anyway
    return PublishedModel(style_id, metadata.get(TASK_ID, ""), instant(metadata.get(ORDERED_AT)))


def at_stake(bucket: str, s3: S3Service, style_id: int, what: str) -> str:
    """A warning if a style has a published model; otherwise empty.

    Args:
        bucket: The bucket of the models.
        s3: The storage of the models.
        style_id: The style.
        what: The condition under which the backend marks the style as failed: "If this job
            fails".
    """
    model = published(bucket, s3, style_id)
    if model is None:
        return ""
    of_job = f" (of job {model.task_id})" if model.task_id else ""
    return (
        f"Style {style_id} has a published model{of_job}. {what}, the platform's backend marks the "
        "whole style as failed, although that model stays in place."
    )


class LaterOrders:
    """Finds the orders of a style that are later than a job.

    The publisher lets the later order win: the model of an older one goes into the archive only.

    Args:
        storage: The buckets.
        models: The storage of the models.
        state: The storage of the state bucket.
        listing: The records.
    """

    def __init__(
        self,
        storage: StorageSettings,
        models: S3Service,
        state: S3Service,
        listing: RecordListing,
    ) -> None:
        self._storage = storage
        self._models = models
        self._state = state
        self._of_style = functools.cache(self._read)
        self._listing = listing

    def after(self, record: JobRecord) -> Later | None:
        """The latest order of the record's style that is later than its own and will win over it.

        Raises:
            StorageError: The records cannot be listed.
        """
        own = order_time(record.ordered_at, record.created_at)
        later = [
            each
            for each in (self._of_style(record.style_id) if record.style_id else ())
            if each.task_id != record.task_id and each.ordered_at > own
        ]
        return max(later, key=lambda each: each.ordered_at, default=None)

    def _read(self, style_id: int) -> tuple[Later, ...]:
        found, _ = self._listing.of_subject(STYLE, str(style_id))
        known = {each.task_id: each.record for each in found if each.record}
        model = published(self._storage.model_bucket_name, self._models, style_id)
        if model and model.task_id and model.task_id not in known and not model.ordered_at:
            (maker,) = look_up(self._state, self._storage.state_bucket_name, [model.task_id])
            if maker.record:
                known[model.task_id] = maker.record
        later = list(_winners(known.values()))
        if model and model.ordered_at:
            later.append(Later(model.task_id or "another job", model.ordered_at, False))
        return tuple(later)


def _winners(records: Iterable[JobRecord]) -> Iterable[Later]:
    for record in records:
        ordered_at = order_time(record.ordered_at, record.created_at)
        live = record.state is State.LIVE
        completed = record.ending is not None and record.ending.kind is EndingKind.COMPLETE
        if live or completed:
            yield Later(record.task_id, ordered_at, live)
