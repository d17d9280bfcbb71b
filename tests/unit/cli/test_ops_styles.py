"""The warnings about a style before an operator acts on one of its jobs."""

from __future__ import annotations

from typing import Any, cast

import pytest

from cli.jobs.styles import LaterOrders, at_stake
from jobs.addresses import S3Location
from jobs.hold import encode
from jobs.layout import record_at
from jobs.record import JobRecord, JobRequest
from services.records.listing import RecordListing
from services.s3.s3_service import S3Service
from tests.memory_s3 import MemoryS3, away
from utils.settings.storage import StorageSettings

BUCKETS = StorageSettings(aws_storage_bucket_name="media", state_bucket_name="state")
WEIGHTS = S3Location("media", "models/style_7/lora_weights.safetensors")
MORNING, NOON = "2026-01-20T08:00:00Z", "2026-01-20T12:00:00Z"


@pytest.fixture(name="models")
def _models() -> MemoryS3:
    return MemoryS3()


def _record(task_id: str, ordered_at: str) -> JobRecord:
    request = JobRequest(task_id, "style", "7", "abc", {"created_at": ordered_at})
    return JobRecord.new(request, "one", 60.0)


class _NothingNew:
    """A listing that has too many records to find those of the style."""

    def of_subject(self, *_: str) -> tuple[list[Any], int]:
        """No record, of many that were not read."""
        return [], 90_000


def _later(models: MemoryS3, state: MemoryS3) -> LaterOrders:
    listing = cast(RecordListing, _NothingNew())
    return LaterOrders(BUCKETS, cast(S3Service, models), cast(S3Service, state), listing)


def _publish(models: MemoryS3, **metadata: str) -> None:
    models.create(WEIGHTS, b"weights", metadata=metadata)


def test_a_model_without_an_order_time_is_dated_by_its_jobs_record(
    models: MemoryS3,
) -> None:
    """The last release wrote no order time into the model's metadata."""
    state = MemoryS3()
    state.write(record_at("state", "sold"), encode(_record("sold", NOON)))
    _publish(models, task_id="sold", claim="1")
    later = _later(models, state).after(_record("older", MORNING))
    assert later is not None and later.task_id == "sold"
    assert _later(models, state).after(_record("newer", "2026-01-20T13:00:00Z")) is None


def test_a_model_of_unknown_time_supersedes_no_job(models: MemoryS3) -> None:
    _publish(models, task_id="unknown")
    assert _later(models, MemoryS3()).after(_record("older", MORNING)) is None


def test_a_job_is_not_later_than_itself(models: MemoryS3) -> None:
    _publish(models, **{"task_id": "same", "ordered-at": NOON})
    assert _later(models, MemoryS3()).after(_record("same", MORNING)) is None


def test_a_style_without_a_model_supersedes_nothing(models: MemoryS3) -> None:
    s3 = cast(S3Service, models)
    assert at_stake("media", s3, 7, "If this job fails") == ""
    _publish(models, task_id="sold")
    told = at_stake("media", s3, 7, "If this job fails")
    assert told.startswith("Style 7 has a published model (of job sold). If this job fails, the")
    models.before = away
    assert at_stake("media", s3, 7, "If this job fails") == "", "a warning stops nothing"
