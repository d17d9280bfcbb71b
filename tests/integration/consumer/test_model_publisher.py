"""Publishing: all files are of one run despite other writers, and the replaced files are kept."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

import pytest

from consumer.life.stop_signal import StopSignal
from consumer.publishing.model_publisher import ModelPublisher
from jobs.addresses import S3Location
from jobs.layout import WEIGHTS, Place, place_of
from jobs.message import Job
from jobs.record import JobRequest
from jobs.style import HyperParameters, StyleSpec
from services.records.job_lease import JobLease
from services.records.job_records import Claimed, JobRecords
from services.records.turns import Turns
from services.s3.s3_service import S3Service
from utils.errors import LeaseLost, PreconditionFailed, Stopped, StopReason

FILES = ("samples.png", "adapter_model.safetensors", WEIGHTS)
ORDERED = "2025-01-20T10:00:00.000Z"


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    return tmp_path


def _publisher(s3: S3Service, bucket: str) -> ModelPublisher:
    turns = Turns(s3, bucket, owner=secrets.token_hex(2), lease_seconds=5)
    return ModelPublisher(
        s3, s3, model_bucket=bucket, state_bucket=bucket, url_scheme="gs", turns=turns
    )


def _job(task_id: str, style_id: int = 7) -> Job:
    return Job("style", task_id, StyleSpec(style_id, (), (), (), {}, HyperParameters()))


def _place(job: Job) -> Place:
    return place_of(job.kind, job.subject, job.task_id)


def _claimed(s3: S3Service, bucket: str, job: Job, lease_seconds: float = 5) -> JobLease:
    records = JobRecords(s3, bucket, owner="test", lease_seconds=lease_seconds)
    claim = records.claim(
        JobRequest(job.task_id, job.kind, job.subject, job.identity, job.understood())
    )
    assert isinstance(claim, Claimed)
    return claim.lease


def _files_of(job: Job, folder: Path) -> Path:
    """A run's files; their content names the run."""
    ours = folder / job.task_id
    ours.mkdir(exist_ok=True)
    for name in FILES:
        (ours / name).write_text(f"{name} of {job.task_id}")
    return ours


def _publish(s3: S3Service, bucket: str, job: Job, lease: JobLease, folder: Path) -> str:
    ours = _files_of(job, folder)
    return (
        _publisher(s3, bucket)
        .publish(ours, FILES, _place(job), lease, StopSignal(), ordered_at=ORDERED)
        .model_url
    )


def _published(s3: S3Service, bucket: str) -> dict[str, tuple[str, str | None]]:
    """Name -> content, and the task in the object's metadata."""
    found = {}
    for info in s3.list_objects(bucket, "models/style_7/"):
        location = S3Location(bucket, info.key)
        content = s3.read(location).body.decode()
        name = info.key.rsplit("/", 1)[1]
        found[name] = (content, s3.head(location).metadata.get("task_id"))
    return found


def _all_of(task_id: str) -> dict[str, tuple[str, str | None]]:
    return {name: (f"{name} of {task_id}", task_id) for name in FILES}


def test_the_files_of_a_model_are_under_its_style_and_nothing_remains_in_staging(
    s3: S3Service, bucket: str, folder: Path
) -> None:
    job = _job("a")
    with _claimed(s3, bucket, job) as lease:
        url = _publish(s3, bucket, job, lease, folder)
    assert url == f"gs://{bucket}/models/style_7/{WEIGHTS}"
    assert _published(s3, bucket) == _all_of("a")
    assert list(s3.list_objects(bucket, "staging/")) == []


def test_a_newer_run_replaces_the_older_whose_files_are_kept_in_the_archive(
    s3: S3Service, bucket: str, folder: Path
) -> None:
    for job in (_job("older"), _job("newer")):
        with _claimed(s3, bucket, job) as lease:
            _publish(s3, bucket, job, lease, folder)
    assert _published(s3, bucket) == _all_of("newer")
    archived = s3.read(S3Location(bucket, f"archive/style_7/older/{WEIGHTS}"))
    assert archived.body.decode() == f"{WEIGHTS} of older"


def test_two_runs_of_one_style_take_turns(s3: S3Service, bucket: str, folder: Path) -> None:
    jobs = [_job(f"run-{number}") for number in range(4)]
    errors: list[BaseException] = []

    def publish(job: Job) -> None:
        try:
            with _claimed(s3, bucket, job) as lease:
                _publish(s3, bucket, job, lease, folder)
        except BaseException as error:  # pylint: disable=broad-exception-caught
            errors.append(error)

    threads = [threading.Thread(target=publish, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert _published(s3, bucket) in [_all_of(job.task_id) for job in jobs]


def test_a_worker_without_the_lease_publishes_nothing(
    s3: S3Service, bucket: str, folder: Path
) -> None:
    job = _job("slept")
    lease = _claimed(s3, bucket, job)
    lease.lost.set()
    with pytest.raises(LeaseLost):
        _publish(s3, bucket, job, lease, folder)
    assert list(s3.list_objects(bucket, "models/")) == []
    assert list(s3.list_objects(bucket, "staging/")) == []


def test_a_write_that_was_in_flight_when_another_run_published_fails(
    s3: S3Service, bucket: str, folder: Path
) -> None:
    older, newer = _job("older"), _job("newer")
    with _claimed(s3, bucket, older) as lease:
        _publish(s3, bucket, older, lease, folder)
    weights = S3Location(bucket, f"models/style_7/{WEIGHTS}")
    seen_before_it_slept = s3.head(weights).etag
    with _claimed(s3, bucket, newer) as lease:
        _publish(s3, bucket, newer, lease, folder)
    with pytest.raises(PreconditionFailed):
        s3.upload_file(_files_of(older, folder) / WEIGHTS, weights, only_over=seen_before_it_slept)
    assert _published(s3, bucket) == _all_of("newer")


def test_a_shutdown_is_noticed_between_two_files(s3: S3Service, bucket: str, folder: Path) -> None:
    job = _job("stopped")
    stop = StopSignal()
    stop.request(StopReason.SHUTDOWN)
    with _claimed(s3, bucket, job) as lease, pytest.raises(Stopped):
        _publisher(s3, bucket).publish(
            _files_of(job, folder), FILES, _place(job), lease, stop, ordered_at=ORDERED
        )
