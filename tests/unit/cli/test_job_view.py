"""The progress of a job, from its worker to its record and to the operator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from cli.jobs.job_view import view
from consumer.pages.job_watch import JobWatch
from jobs.record import Ending, EndingKind, JobRequest, StoredCheckpoint
from services.records.job_lease import JobLease
from services.records.job_records import Claimed, JobRecords
from services.records.listing import look_up
from services.s3.s3_service import S3Service
from tests.memory_s3 import MemoryS3
from tests.unit.jobs.message_samples import all_kinds, envelope, read, style_kind
from utils.errors import ErrorCode
from utils.events import Progress, Stage
from utils.metrics import Metrics

BUCKET = "state"


@pytest.fixture(name="s3")
def _s3() -> S3Service:
    return cast(S3Service, MemoryS3())


@pytest.fixture(name="lease")
def _lease(s3: S3Service) -> JobLease:
    records = JobRecords(s3, BUCKET, owner="one", lease_seconds=60)
    message = {"hyper_parameters": {"epochs": 200}, "created_at": "2026-01-20T10:00:00Z"}
    claim = records.claim(JobRequest("task", "style", "7", "abc", message))
    assert isinstance(claim, Claimed)
    return claim.lease


def _seen(s3: S3Service) -> SimpleNamespace:
    """The job's JSON values, as attributes."""
    return SimpleNamespace(**view(look_up(s3, BUCKET, ["task"])[0], all_kinds()).values())


def _trained(lease: JobLease, epoch: int) -> None:
    """The trainer reports its progress."""
    watch = JobWatch(style_kind(), read(envelope()), lease, Metrics())
    watch.saw(
        Progress(
            "task",
            Stage.TRAINING,
            epoch * 10,
            2000,
            per_second=4.0,
            facts={"epoch": epoch, "total_epochs": 200, "loss": 0.25},
        )
    )


def test_a_renewal_carries_epoch_loss_and_the_time_left(s3: S3Service, lease: JobLease) -> None:
    assert (_seen(s3).epoch, _seen(s3).loss, _seen(s3).seconds_left) == (0, None, None)
    _trained(lease, epoch=17)
    lease.renew()
    job = _seen(s3)
    assert (job.state, job.epoch, job.epochs) == ("held", 17, 200)
    assert (job.loss, job.seconds_left) == (0.25, round((2000 - 170) / 4))
    assert job.ordered_at == "2026-01-20T10:00:00Z"


def test_a_job_that_was_given_back_is_as_far_as_its_checkpoint(
    s3: S3Service, lease: JobLease
) -> None:
    _trained(lease, epoch=17)
    lease.register_checkpoint(StoredCheckpoint("epoch-0010", 10, 100, "checkpoints/x/", 1))
    assert _seen(s3).epoch == 17
    lease.release(count_attempt=False)
    job = _seen(s3)
    assert (job.state, job.epoch, job.loss, job.seconds_left) == ("waiting", 10, None, None)


def test_the_next_holder_begins_with_the_checkpoint(s3: S3Service, lease: JobLease) -> None:
    _trained(lease, epoch=17)
    lease.register_checkpoint(StoredCheckpoint("epoch-0010", 10, 100, "checkpoints/x/", 1))
    lease.release(count_attempt=False)
    again = JobRecords(s3, BUCKET, owner="two", lease_seconds=60).claim(
        JobRequest("task", "style", "7", "abc", lease.record.message)
    )
    assert isinstance(again, Claimed)
    assert (_seen(s3).state, _seen(s3).epoch, _seen(s3).loss) == ("held", 10, None)


def test_a_completed_job_has_the_values_of_its_ending(s3: S3Service, lease: JobLease) -> None:
    _trained(lease, epoch=17)
    body = {"training_metric": {"loss": 0.125, "epochs": 200}, "model_url": "s3://m/w"}
    lease.end(Ending(EndingKind.COMPLETE, body))
    job = _seen(s3)
    assert (job.state, job.epoch, job.loss, job.seconds_left) == ("ended", 200, 0.125, None)


def test_progress_values_are_no_part_of_the_record_that_older_workers_read(
    s3: S3Service, lease: JobLease
) -> None:
    _trained(lease, epoch=17)
    lease.renew()
    memory = cast(MemoryS3, s3)
    (stored,) = (found for (_, key), found in memory.objects.items() if key == "jobs/task.json")
    assert b"seen" not in stored.body and b"seconds_left" not in stored.body
    assert stored.metadata["epoch-seen"] == "17"


def test_a_refused_message_has_the_id_that_it_gave() -> None:
    ending = Ending(EndingKind.FAILED, {"task_id": "mine"}, code=str(ErrorCode.INVALID_MESSAGE))
    s3 = MemoryS3()
    records = JobRecords(cast(S3Service, s3), BUCKET, owner="one", lease_seconds=60)
    records.claim_invalid("ab", ending, kind="style", subject="7")
    job = view(look_up(cast(S3Service, s3), BUCKET, ["invalid/ab"])[0], all_kinds())
    assert job.message_task_id == "mine" and job.ending == "failed INVALID_MESSAGE"
