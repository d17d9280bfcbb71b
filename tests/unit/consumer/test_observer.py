"""A worker's counts of a job: useful time and wasted time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from consumer.life.put_offs import Why
from consumer.pages import job_watch
from consumer.pages.observer import Observer
from jobs.record import Ending, EndingKind, JobRecord, JobRequest
from services.broker.settlement import Delivery, Queue
from services.records.job_lease import JobLease
from tests.unit.jobs.message_samples import envelope, read, style_kind
from utils.errors import ErrorCode, StopReason
from utils.events import CheckpointSaved, Progress, Stage, Started
from utils.gpu_monitor import GpuReading
from utils.metrics import PREFIX


class Clock:
    """Moves by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """As of the module `time`."""
        return self.now


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(job_watch, "time", clock)
    return clock


@pytest.fixture(name="observer")
def _observer(clock: Clock) -> Iterator[Observer]:
    """An observer with a job whose trainer has worked for 60 seconds.

    The last checkpoint came after 40 of them.
    """
    observer = Observer()
    record = JobRecord.new(JobRequest("t-1", "style", "10", "identity", {}), "me", 120.0)
    target: Any = None
    lease = JobLease(target, record, "etag", time.monotonic(), target)
    with observer.holding(style_kind(), read(envelope()), lease):
        with observer.training():
            observer.saw(Started("t-1", 0, 30))
            clock.now += 40
            observer.saw(progress(4, 12))
            observer.saw(CheckpointSaved("t-1", "epoch-0004", 4, 12, "/tmp/x", 0.5))
            observer.uploaded("epoch-0004", 1.5)
            clock.now += 15
            observer.saw(progress(5, 16))
            observer.saw(CheckpointSaved("t-1", "epoch-0005", 5, 16, "/tmp/y", 0.5))
            clock.now += 5
        clock.now += 100  # uploads, which cost the GPU nothing
        yield observer


def progress(epoch: int, step: int) -> Progress:
    """A run's progress."""
    return Progress(
        "t-1",
        Stage.TRAINING,
        step,
        30,
        per_second=2.0,
        gpu_memory_allocated=2**30,
        facts={"epoch": epoch, "total_epochs": 10, "loss": 0.5},
    )


def value(observer: Observer, name: str, **labels: str) -> float | None:
    """One series."""
    return observer.metrics.registry.get_sample_value(f"{PREFIX}_{name}", labels)


def failure(code: ErrorCode) -> Ending:
    """A job's failure."""
    return Ending(EndingKind.FAILED, {}, code=str(code))


def test_trainer_time_epochs_and_steps_are_counted_once(observer: Observer) -> None:
    assert value(observer, "training_seconds_total") == 60
    assert (value(observer, "epochs_total"), value(observer, "steps_total")) == (5, 16)
    assert value(observer, "checkpoint_save_seconds_count") == 2
    assert value(observer, "checkpoint_upload_seconds_sum") == 1.5
    assert value(observer, "job_progress_ratio") == 16 / 30
    assert value(observer, "job_remaining_seconds") == 7
    assert value(observer, "trainer_gpu_memory_allocated_bytes") == 2**30


def test_an_attempt_that_breaks_off_wastes_the_time_after_its_last_registered_checkpoint(
    observer: Observer,
) -> None:
    observer.tried_again(ErrorCode.WORKER_CRASHED)
    assert value(observer, "wasted_gpu_seconds_total", reason="retry") == 20
    assert value(observer, "job_retries_total", code="WORKER_CRASHED") == 1


def test_a_stop_wastes_only_the_time_after_the_last_checkpoint(observer: Observer) -> None:
    observer.given_back(StopReason.SHUTDOWN)
    assert value(observer, "wasted_gpu_seconds_total", reason="shutdown") == 20
    assert value(observer, "jobs_given_back_total", reason="shutdown") == 1


def test_a_failed_job_wastes_all_of_its_run(observer: Observer) -> None:
    observer.ended(failure(ErrorCode.TRAINING_DIVERGED))
    assert value(observer, "wasted_gpu_seconds_total", reason="failed") == 60
    assert value(observer, "jobs_total", ending="failed", code="TRAINING_DIVERGED") == 1


def test_a_completed_job_wastes_nothing_and_its_time_is_counted(observer: Observer) -> None:
    observer.ended(Ending(EndingKind.COMPLETE, {}))
    assert value(observer, "jobs_total", ending="complete", code="none") == 1
    assert value(observer, "job_duration_seconds_sum", ending="complete") == 160
    for reason in ("failed", "cancelled", "retry"):
        assert value(observer, "wasted_gpu_seconds_total", reason=reason) == 0


def stage(observer: Observer) -> str:
    """The stage that `/status` shows."""
    assert observer.job
    return str(observer.job.facts()["stage"])


def test_the_stage_follows_the_job_after_the_trainers_last_event(observer: Observer) -> None:
    assert stage(observer) == "training"
    with observer.training():
        observer.saw(
            Progress("t-1", Stage.EXPORTING, 30, 30, facts={"epoch": 10, "total_epochs": 10})
        )
        assert stage(observer) == "exporting"
    assert stage(observer) == "uploading"
    observer.ended(Ending(EndingKind.COMPLETE, {}))
    assert stage(observer) == "delivering"


def test_a_failed_job_whose_ending_is_retried_is_delivering_too(observer: Observer) -> None:
    observer.ended(failure(ErrorCode.TRAINING_DIVERGED))
    assert stage(observer) == "delivering"


def test_training_that_starts_over_counts_its_epochs_again(observer: Observer) -> None:
    with observer.training():
        observer.saw(progress(2, 6))
        observer.saw(progress(4, 12))
    assert value(observer, "epochs_total") == 7


def test_without_a_job_the_gauges_of_a_job_are_zero() -> None:
    observer = Observer()
    observer.saw(progress(1, 3))
    observer.given_back(StopReason.SHUTDOWN)
    assert value(observer, "job_in_hand") == value(observer, "job_remaining_seconds") == 0
    assert value(observer, "epochs_total") is None  # no kind has declared it


def test_messages_and_redeliveries_are_counted_by_queue() -> None:
    observer = Observer()
    observer.took(Delivery(b""))
    observer.took(Delivery(b"", redelivered=True))
    observer.took(Delivery(b"", queue=Queue.ENDINGS))
    assert value(observer, "messages_total", queue="training") == 2
    assert value(observer, "redeliveries_total", queue="training") == 1
    assert value(observer, "messages_total", queue="endings") == 1


def test_the_readings_of_a_gpu_are_in_base_units_and_disappear_when_it_is_lost() -> None:
    observer = Observer()
    observer.gpus([GpuReading(0, "H200", 5, 10, 97, 61, 250.5, ("heat",))])
    assert value(observer, "gpu_utilisation_ratio", gpu="0") == 0.97
    assert value(observer, "gpu_throttled", gpu="0", reason="heat") == 1
    assert value(observer, "gpu_throttled", gpu="0", reason="power") == 0
    observer.gpus([])
    assert value(observer, "gpu_temperature_celsius", gpu="0") is None


# ---- messages, leases and endings ----------------------------------------------------------------


def _values(observer: Observer, name: str) -> dict[str, float]:
    """A metric's values by the only label that it has, or by "" if it has none."""
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for family in observer.metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"{PREFIX}_{name}"
    }


def test_each_way_of_putting_a_message_off_is_counted_by_its_reason() -> None:
    observer = Observer()
    none = dict.fromkeys((*Why, "crash"), 0.0)
    assert _values(observer, "messages_put_off_total") == none
    observer.put_off(Why.STORAGE)
    observer.put_off(Why.STORAGE)
    observer.put_off(Why.NEWER_MESSAGE)
    counted = _values(observer, "messages_put_off_total")
    assert counted == none | {"storage": 2, "newer_message": 1}


def test_a_message_that_is_given_up_is_counted_by_its_code() -> None:
    observer = Observer()
    assert _values(observer, "messages_dead_lettered_total") == dict.fromkeys(ErrorCode, 0)
    observer.dead_lettered(ErrorCode.STORAGE_FAILED)
    assert _values(observer, "messages_dead_lettered_total")["STORAGE_FAILED"] == 1


def test_lost_leases_and_jobs_found_by_the_sweep_are_counted() -> None:
    observer = Observer()
    for name in ("leases_lost_total", "records_swept_total"):
        assert _values(observer, name) == {"": 0}
    observer.lease_lost()
    observer.swept()
    observer.swept()
    assert _values(observer, "leases_lost_total") == {"": 1}
    assert _values(observer, "records_swept_total") == {"": 2}


def test_endings_that_wait_for_the_backend_show_how_many_and_for_how_long() -> None:
    observer = Observer()
    observer.endings_pending(3, 7200.5)
    assert _values(observer, "endings_pending") == {"": 3}
    assert _values(observer, "oldest_pending_ending_age_seconds") == {"": 7200.5}
    observer.endings_pending(0, 0.0)
    assert _values(observer, "endings_pending") == {"": 0}
    assert _values(observer, "oldest_pending_ending_age_seconds") == {"": 0}
