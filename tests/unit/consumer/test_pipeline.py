"""The steps of a job, fast: the fate of a message, a record and an ending in every case."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobs.addresses import S3Location
from jobs.hold import encode, values_beside
from jobs.record import PROTOCOL_LEVEL, DeliveryState, State
from services.broker.settlement import (
    MIN_LEVEL,
    OWN_COPY,
    PUT_OFF_REASON,
    PUT_OFFS,
    Action,
    Queue,
    Settlement,
)
from tests.memory_s3 import away, works
from tests.unit.consumer.job_world import (
    AWAY,
    REFUSED,
    STATE,
    World,
    checkpoint,
    delivery,
    order,
    parked_body,
    redelivery_of,
)
from tests.unit.jobs.message_samples import BUCKET
from utils.errors import (
    REPORTABLE,
    DiskFull,
    ErrorCode,
    GpuBroken,
    GpuOutOfMemory,
    LowQualityData,
    MachineError,
    NoRoomForJob,
    StopReason,
    StorageError,
    TrainingServerError,
    WorkerCrashed,
)


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> World:
    return World(tmp_path / "one")


def raising(error: BaseException) -> Any:
    """A run that ends with this error."""

    def run(*_: Any) -> None:
        raise error

    return run


def only(settlement: Settlement) -> Any:
    """The one publication of a settlement that acknowledges its delivery."""
    assert settlement.action is Action.ACK
    (publication,) = settlement.publish
    return publication


def test_a_job_is_trained_published_and_reported_and_only_then_acknowledged(world: World) -> None:
    assert world.pipeline.handle(delivery()) == Settlement.ack()
    record = world.record()
    assert (record.state, record.delivery, record.is_settled) == (
        State.ENDED,
        DeliveryState.DELIVERED,
        True,
    )
    assert world.publisher.published == ["task-1"]
    (ending,) = world.backend.endings
    assert ending.kind == "complete"
    assert ending.body["training_metric"] == {
        "loss": 0.1,
        "epochs": 10,
        "images_used": 3,
        "images_left_out": 1,
        "report_url": "s3://models/models/style_10/training_report.html",
    }
    assert not world.s3.keys(STATE, "jobs/live/")


def test_the_ending_is_durable_before_it_is_sent_to_the_backend(world: World) -> None:
    seen: list[tuple[State, DeliveryState]] = []
    world.backend.on_ending = lambda: seen.append((world.record().state, world.record().delivery))
    world.pipeline.handle(delivery())
    assert seen == [(State.ENDED, DeliveryState.PENDING)]


def test_a_job_that_has_ended_is_neither_trained_nor_reported_again(world: World) -> None:
    world.pipeline.handle(delivery())
    assert world.pipeline.handle(delivery(redelivered=True)) == Settlement.ack()
    assert len(world.trainer.runs) == 1
    assert len(world.backend.endings) == 1


def test_a_passing_fault_is_tried_again_after_a_delay_and_counted(world: World) -> None:
    world.trainer.does = raising(WorkerCrashed("it died"))
    copy = only(world.pipeline.handle(delivery()))
    assert (copy.queue, copy.delay_seconds, copy.message_id) == (Queue.TRAINING, 10.0, "task-1")
    assert copy.headers == {OWN_COPY: True}
    record = world.record()
    assert (record.attempts, record.hold.released, record.hold.quiet_seconds) == (1, True, 10.0)
    assert record.last_error is not None and record.last_error.code == "WORKER_CRASHED"
    assert not world.backend.endings


def test_each_further_attempt_waits_longer_and_the_last_one_fails_the_job(world: World) -> None:
    world.trainer.does = raising(WorkerCrashed("it died"))
    first = only(world.pipeline.handle(delivery()))
    second = only(world.pipeline.handle(redelivery_of(first)))
    assert second.delay_seconds == 60.0
    assert world.pipeline.handle(redelivery_of(second)) == Settlement.ack()
    (ending,) = world.backend.endings
    assert (ending.kind, ending.body["error_code"]) == ("failed", "WORKER_CRASHED")
    assert (ending.body["attempts"], ending.body["retryable"]) == (3, True)


def test_a_checkpoint_resets_the_count_of_attempts(world: World) -> None:
    world.trainer.does = raising(WorkerCrashed("it died"))
    first = only(world.pipeline.handle(delivery()))

    def further(run: Any, tell: Any, stop: Any) -> None:
        del stop
        checkpoint(run, tell)
        raise WorkerCrashed("it died later")

    world.trainer.does = further
    again = only(world.pipeline.handle(redelivery_of(first)))
    assert again.delay_seconds == 10.0
    record = world.record()
    assert (record.attempts, record.checkpoint and record.checkpoint.epoch) == (0, 10)


def test_a_job_whose_workers_were_all_killed_is_given_up(world: World) -> None:
    for number in range(3):
        other = world.worker(f"dead-{number}")
        # A killed worker leaves only its claim.
        other.trainer.does = raising(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            other.pipeline.handle(delivery(redelivered=number > 0))
        world.s3.pass_seconds(1000.0)
    assert world.pipeline.handle(delivery(redelivered=True)) == Settlement.ack()
    (ending,) = world.backend.endings
    assert ending.body["error_code"] == "WORKER_CRASHED"
    assert "given up after 3 attempts" in ending.body["error_message"]
    assert not world.trainer.runs


# ---- copies for the dead queue -----------------------------------------------------------------


def test_the_dead_queue_gets_its_copy_of_a_job_that_might_have_succeeded(world: World) -> None:
    world.trainer.does = raising(WorkerCrashed("it died"))
    world.settings.limits.__dict__["max_attempts"] = 1
    assert world.pipeline.handle(delivery()) == Settlement.ack()
    (dead,) = world.broker.in_queue(Queue.DEAD)
    assert (dead.body, dead.message_id) == (order(), "task-1")
    assert dead.headers["x-error-code"] == "WORKER_CRASHED"
    assert dead.headers["x-attempts"] == 1
    assert world.record().owed is None
    assert world.record().is_settled


def test_a_worker_that_dies_before_the_copy_is_confirmed_leaves_it_owed(world: World) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    world.settings.limits.__dict__["max_attempts"] = 1
    world.trainer.does = raising(WorkerCrashed("it died"))
    world.broker.on_publish = killed
    with pytest.raises(KeyboardInterrupt):
        world.pipeline.handle(delivery())
    owed = world.record().owed
    assert owed is not None and owed.code == "WORKER_CRASHED"
    world.s3.pass_seconds(1000.0)

    other = world.worker("two")
    assert other.pipeline.handle(delivery(redelivered=True)) == Settlement.ack()
    (dead,) = other.broker.in_queue(Queue.DEAD)
    assert dead.headers["x-error-code"] == "WORKER_CRASHED"
    assert other.record().is_settled
    assert len(other.backend.endings) == 1


def test_the_copy_is_confirmed_before_the_record_stops_owing_it(world: World) -> None:
    world.settings.limits.__dict__["max_attempts"] = 1
    world.trainer.does = raising(WorkerCrashed("it died"))
    owed: list[bool] = []
    world.broker.on_publish = lambda: owed.append(world.record().owed is not None)
    world.pipeline.handle(delivery())
    assert owed == [True]


def test_a_copy_that_is_not_confirmed_stays_owed_and_the_ending_is_parked(world: World) -> None:
    world.settings.limits.__dict__["max_attempts"] = 1
    world.trainer.does = raising(WorkerCrashed("it died"))
    world.broker.confirms = False
    parked = only(world.pipeline.handle(delivery()))
    assert (parked.queue, parked.delay_seconds) == (Queue.ENDINGS, 60.0)
    record = world.record()
    assert (record.delivery, record.is_settled) == (DeliveryState.DELIVERED, False)

    world.broker.confirms = True
    assert world.endings.handle(redelivery_of(parked)) == Settlement.ack()
    assert len(world.broker.in_queue(Queue.DEAD)) == 1
    assert world.record().is_settled
    assert len(world.backend.endings) == 1


def test_an_ending_that_the_backend_refuses_is_set_aside_with_its_copy(world: World) -> None:
    world.backend.answers = [REFUSED]
    assert world.pipeline.handle(delivery()) == Settlement.ack()
    (dead,) = world.broker.in_queue(Queue.DEAD)
    assert dead.headers["x-error-code"] == "WEBHOOK_REJECTED"
    assert "no such style" in str(dead.headers["x-error-message"])
    record = world.record()
    assert (record.delivery, record.owed, record.is_settled) == (
        DeliveryState.SET_ASIDE,
        None,
        True,
    )


def test_a_job_that_another_attempt_cannot_help_owes_no_copy(world: World) -> None:
    world.trainer.does = raising(LowQualityData("only 1 of 3 images can be used"))
    assert world.pipeline.handle(delivery()) == Settlement.ack()
    assert not world.broker.published
    assert world.backend.endings[0].body["error_code"] == "LOW_QUALITY_DATA"


# ---- orders, duplicates and other workers -------------------------------------------------------


def test_a_second_order_that_was_never_claimed_is_not_treated_as_a_duplicate(world: World) -> None:
    world.pipeline.handle(delivery(order(None)))
    world.s3.pass_seconds(601.0)

    def records_are_away(method: str, bucket: str, key: str) -> None:
        if method == "PUT" and key.endswith(".json"):
            away(method, bucket, key)

    world.s3.before = records_are_away
    copy = only(world.pipeline.handle(delivery(order(None))))
    assert copy.message_id is None
    assert OWN_COPY not in copy.headers
    world.s3.before = works
    assert world.pipeline.handle(redelivery_of(copy)) == Settlement.ack()
    assert len(world.backend.endings) == 2
    assert len({ending.body["task_id"] for ending in world.backend.endings}) == 2


def test_the_lost_message_of_a_later_run_returns_as_that_run(world: World) -> None:
    world.pipeline.handle(delivery(order(None)))
    world.s3.pass_seconds(601.0)

    def lose(run: Any, tell: Any, stop: Any) -> None:
        del run, tell
        stop.request(StopReason.LEASE_LOST)

    world.trainer.does = lose
    parked = only(world.pipeline.handle(delivery(order(None))))
    first, second = (run.task_id for run in world.trainer.runs)
    assert first != second
    assert parked_body(parked)["task_id"] == second


def test_the_copy_of_a_later_run_means_that_run(world: World) -> None:
    world.pipeline.handle(delivery(order(None)))
    world.s3.pass_seconds(601.0)
    world.trainer.does = raising(WorkerCrashed("it died"))
    copy = only(world.pipeline.handle(delivery(order(None))))
    world.trainer.does = lambda run, tell, stop: None
    assert world.pipeline.handle(redelivery_of(copy)) == Settlement.ack()
    assert [run.task_id for run in world.trainer.runs[1:]] == [copy.message_id] * 2


def test_the_same_body_again_soon_after_its_end_is_a_duplicate(world: World) -> None:
    world.pipeline.handle(delivery(order(None)))
    world.s3.pass_seconds(500.0)
    assert world.pipeline.handle(delivery(order(None))) == Settlement.ack()
    assert len(world.trainer.runs) == 1


def test_a_redelivered_body_without_an_id_is_not_a_new_order(world: World) -> None:
    world.pipeline.handle(delivery(order(None)))
    world.s3.pass_seconds(5000.0)
    assert world.pipeline.handle(delivery(order(None), redelivered=True)) == Settlement.ack()
    assert len(world.trainer.runs) == 1


def test_a_redelivery_that_is_put_off_does_not_become_a_new_order(world: World) -> None:
    world.s3.before = away
    copy = only(world.pipeline.handle(delivery(order(None), redelivered=True)))
    assert copy.headers[OWN_COPY] is True


def test_the_same_id_with_another_body_is_refused(world: World) -> None:
    world.pipeline.handle(delivery())
    other = only(world.pipeline.handle(delivery(order(tags=["another"]))))
    assert (other.queue, other.headers["x-error-code"]) == (Queue.DEAD, "INVALID_MESSAGE")
    assert len(world.backend.endings) == 1  # the id is another job's, whose style may be finished


def test_a_duplicate_of_a_running_job_costs_a_few_messages_and_no_further_worker(
    world: World,
) -> None:
    hours = 3 * 3600.0
    published = []

    def run(*_: Any) -> None:
        other = world.worker("two")
        watched = only(other.pipeline.handle(delivery()))
        waited = 0.0
        while (waited := waited + watched.delay_seconds) < hours:
            published.append(watched)
            watched = only(other.endings.handle(redelivery_of(watched)))
        published.append(watched)

    world.trainer.does = run
    world.pipeline.handle(delivery())
    assert {one.queue for one in published} == {Queue.ENDINGS}
    assert len(published) <= 9
    assert world.worker("three").endings.handle(redelivery_of(published[-1])) == Settlement.ack()
    assert len(world.backend.endings) == 1


def test_a_watched_message_is_published_again_when_its_holder_vanishes(world: World) -> None:
    kept = []

    def killed(*_: Any) -> None:
        kept.append(only(world.worker("two").pipeline.handle(delivery())))
        raise KeyboardInterrupt

    world.trainer.does = killed
    with pytest.raises(KeyboardInterrupt):
        world.pipeline.handle(delivery())
    world.s3.pass_seconds(1000.0)
    other = world.worker("three")
    copy = only(other.endings.handle(redelivery_of(kept[0])))
    assert (copy.queue, copy.message_id, copy.delay_seconds) == (Queue.TRAINING, "task-1", None)
    assert copy.headers == {OWN_COPY: True}
    assert other.pipeline.handle(redelivery_of(copy)) == Settlement.ack()
    assert other.publisher.published == ["task-1"]


def test_a_watched_message_waits_on_while_the_jobs_own_copy_is_on_its_way(world: World) -> None:
    kept = []

    def fails_while_a_duplicate_arrives(*_: Any) -> None:
        kept.append(only(world.worker("two").pipeline.handle(delivery())))
        raise WorkerCrashed("it died")

    world.trainer.does = fails_while_a_duplicate_arrives
    world.pipeline.handle(delivery())
    again = only(world.endings.handle(redelivery_of(kept[0])))
    assert again.queue is Queue.ENDINGS
    assert parked_body(again)["looks"] == 2


def test_after_a_lost_lease_the_job_is_not_touched_and_its_message_is_watched(world: World) -> None:
    world.trainer.does = lambda run, tell, stop: stop.request(StopReason.LEASE_LOST)
    watched = only(world.pipeline.handle(delivery()))
    assert watched.queue is Queue.ENDINGS
    assert not world.publisher.published
    assert not world.backend.endings
    assert not world.record().hold.released
    assert world.counted("leases_lost_total") == 1


def test_a_lease_that_is_found_lost_at_the_ending_leaves_everything_to_its_new_holder(
    world: World,
) -> None:
    def taken_over() -> None:
        world.s3.pass_seconds(1000)
        other = world.worker("two")
        other.trainer.does = raising(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            other.pipeline.handle(delivery(redelivered=True))

    world.publisher.does = taken_over
    with capture_logs() as lines:
        watched = only(world.pipeline.handle(delivery()))
    assert watched.queue is Queue.ENDINGS
    assert not world.backend.endings
    assert (world.record().claim, world.record().state) == (2, State.LIVE)
    assert "job_left_to_another_worker" in [line["event"] for line in lines]


def test_a_shutdown_returns_the_job_without_counting_an_attempt(world: World) -> None:
    world.trainer.does = lambda run, tell, stop: world.shutdown.request()
    assert world.pipeline.handle(delivery()) == Settlement.requeue()
    record = world.record()
    assert (record.attempts, record.hold.released, record.state) == (0, True, State.LIVE)
    assert record.hold.quiet_seconds == 0, "the broker hands the message out again at once"


def test_a_job_that_is_claimed_during_a_shutdown_is_given_back_before_anything_is_touched(
    world: World,
) -> None:
    world.shutdown.request()
    assert world.pipeline.handle(delivery()) == Settlement.requeue()
    assert not world.publisher.repaired and not world.trainer.runs
    assert not [
        key for method, key in world.s3.requests if method != "PUT" and key.endswith(".jpg")
    ]


def test_the_last_checkpoint_is_registered_before_the_model_is_published(world: World) -> None:
    def slow(method: str, _bucket: str, key: str) -> None:
        if method == "PUT" and key.startswith("checkpoints/"):
            time.sleep(0.1)

    seen: list[str] = []
    world.s3.before = slow
    world.trainer.does = lambda run, tell, stop: checkpoint(run, tell)
    world.publisher.does = lambda: seen.extend(one.name for one in world.record().checkpoints)
    world.pipeline.handle(delivery())
    assert seen == ["epoch-0010"]


def test_a_cancel_file_ends_the_job_before_it_is_trained(world: World) -> None:
    world.s3.write(S3Location(STATE, "jobs/task-1.cancel"), b"")
    with capture_logs() as lines:
        assert world.pipeline.handle(delivery()) == Settlement.ack()
    assert world.backend.endings[0].body["error_code"] == "CANCELLED"
    assert not world.trainer.runs
    assert not [line for line in lines if line["log_level"] == "error"]


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (LowQualityData(), "warning"),
        (GpuOutOfMemory(), "error"),
        (ValueError("a bug of ours"), "error"),
    ],
)
def test_only_faults_of_the_service_are_logged_as_errors(
    world: World, error: Exception, level: str
) -> None:
    world.trainer.does = raising(error)
    with capture_logs() as lines:
        world.pipeline.handle(delivery())
    assert [line["log_level"] for line in lines if line["event"] == "job_failed"] == [level]


def test_a_bug_in_the_worker_still_leads_to_an_ending(world: World) -> None:
    world.trainer.does = raising(ZeroDivisionError("secret detail"))
    world.pipeline.handle(delivery())
    body = world.backend.endings[0].body
    assert body["error_code"] == "TRAINING_FAILED"
    assert "ZeroDivisionError" in body["error_message"]
    assert "secret detail" not in json.dumps(body)


# ---- the style's folder --------------------------------------------------------------------------


def test_the_folder_is_repaired_before_training_and_before_a_failure_is_reported(
    world: World,
) -> None:
    told_after: list[int] = []
    world.backend.on_ending = lambda: told_after.append(len(world.publisher.repaired))
    world.trainer.does = raising(LowQualityData())
    world.pipeline.handle(delivery())
    assert told_after == [2]


def test_a_cancelled_job_whose_folder_cannot_be_repaired_is_retried_before_it_ends(
    world: World,
) -> None:
    def fails() -> None:
        raise StorageError("S3 is away")

    world.s3.write(S3Location(STATE, "jobs/task-1.cancel"), b"")
    world.publisher.repairs = fails
    copy = only(world.pipeline.handle(delivery()))
    assert copy.queue is Queue.TRAINING
    assert not world.backend.endings
    world.publisher.repairs = lambda: None
    assert world.pipeline.handle(redelivery_of(copy)) == Settlement.ack()
    assert world.backend.endings[0].body["error_code"] == "CANCELLED"


def test_a_folder_that_can_never_be_repaired_does_not_keep_the_job_from_ending(
    world: World,
) -> None:
    def fails() -> None:
        raise StorageError("S3 refuses access")

    world.publisher.repairs = fails
    message = delivery()
    while (settlement := world.pipeline.handle(message)).publish:
        message = redelivery_of(only(settlement))
    assert world.backend.endings[0].kind == "failed"


def test_a_publication_is_confirmed_once_the_ending_is_durable_and_only_then(world: World) -> None:
    world.pipeline.handle(delivery())
    assert world.publisher.confirmed == [("task-1", "ended")]
    world.trainer.does = raising(LowQualityData())
    world.pipeline.handle(delivery(order("task-2")))
    assert len(world.publisher.confirmed) == 1


def test_an_older_order_completes_without_replacing_the_later_ones_model(world: World) -> None:
    world.publisher.superseded_by = "later-task"
    world.pipeline.handle(delivery(order(created_at="2025-01-20T10:00:00Z")))
    assert world.publisher.ordered_at == "2025-01-20T10:00:00Z"
    body = world.backend.endings[0].body
    assert body["model_url"] == "s3://models/models/style_10/lora_weights.safetensors"
    assert (body["superseded_by"], body["archived_url"]) == (
        "later-task",
        "s3://state/archive/task-1",
    )


# ---- machines -----------------------------------------------------------------------------------


def test_a_job_that_is_too_large_for_this_disk_goes_to_another_worker_and_this_one_goes_on(
    world: World,
) -> None:
    world.trainer.does = raising(NoRoomForJob("needs 900 GB, 40 GB are free"))
    copy = only(world.pipeline.handle(delivery()))
    assert (copy.queue, copy.delay_seconds) == (Queue.TRAINING, 10.0)
    assert not world.unfit
    assert (world.record().rejections, world.record().attempts) == (1, 0)


def test_a_job_above_the_limit_fails_before_any_of_its_images_is_downloaded(
    tmp_path: Path,
) -> None:
    world = World(tmp_path / "small", max_job_bytes=1024)
    keys = ("a.jpg", "b.jpg", "c.jpg")
    for key in keys:
        world.s3.write(S3Location(BUCKET, key), b"x" * 2000)
    assert world.pipeline.handle(delivery()) == Settlement.ack()
    assert world.backend.endings[0].body["error_code"] == "JOB_TOO_LARGE"
    assert not {("GET", key) for key in keys} & set(world.s3.requests)
    assert not world.trainer.runs


def test_a_job_that_no_machine_has_room_for_fails_after_three(world: World) -> None:
    world.trainer.does = raising(NoRoomForJob("needs 900 GB, 40 GB are free"))
    for name in ("two", "three"):
        other = world.worker(name)
        other.trainer.does = world.trainer.does
        copy = only(other.pipeline.handle(delivery(redelivered=True)))
        assert copy.queue is Queue.TRAINING
    assert world.pipeline.handle(delivery(redelivered=True)) == Settlement.ack()
    body = world.backend.endings[0].body
    assert body["error_code"] == "JOB_TOO_LARGE"
    assert "needs 900 GB" in body["error_message"]


def test_one_small_worker_does_not_fail_a_job_that_others_have_room_for(world: World) -> None:
    world.trainer.does = raising(NoRoomForJob("needs 900 GB, 40 GB are free"))
    message, delays = delivery(), []
    for _ in range(5):
        copy = only(world.pipeline.handle(message))
        delays.append(copy.delay_seconds)
        message = redelivery_of(copy)
    assert delays == [10.0, 60.0, 600.0, 600.0, 600.0]
    assert world.record().rejected_by == "one"
    roomy = world.worker("roomy")
    assert roomy.pipeline.handle(message) == Settlement.ack()
    assert roomy.backend.endings[0].kind == "complete"


def test_a_job_that_is_too_large_for_the_only_worker_ends(world: World) -> None:
    world.trainer.does = raising(NoRoomForJob("needs 900 GB, 40 GB are free"))
    message, rejections = delivery(), 0
    while (settlement := world.pipeline.handle(message)).publish:
        message = redelivery_of(only(settlement))
        rejections += 1
        assert rejections < 20
    assert rejections == 9
    assert world.backend.endings[0].body["error_code"] == "JOB_TOO_LARGE"


@pytest.mark.parametrize("error", [DiskFull(), OSError(errno.ENOSPC, "no space left")])
def test_a_disk_that_fills_up_makes_the_machine_unfit_and_counts_as_a_rejection(
    world: World, error: Exception
) -> None:
    world.trainer.does = raising(error)
    assert only(world.pipeline.handle(delivery())).queue is Queue.TRAINING
    assert [type(one) for one in world.unfit] == [DiskFull]
    assert (world.record().rejections, world.record().attempts) == (1, 0)


def test_if_the_gpu_computes_again_in_a_new_process_the_job_is_at_fault(world: World) -> None:
    asked: list[bool] = []
    world.test_machine = lambda: asked.append(True)
    world.trainer.does = raising(GpuBroken("a CUDA error"))
    assert only(world.pipeline.handle(delivery())).queue is Queue.TRAINING
    assert asked == [True]
    assert not world.unfit
    assert (world.record().attempts, world.record().rejections) == (1, 0)


def test_a_gpu_that_stays_broken_makes_the_machine_unfit(world: World) -> None:
    def broken() -> None:
        raise GpuBroken("no CUDA")

    world.test_machine = broken
    world.trainer.does = raising(GpuBroken("a CUDA error"))
    assert only(world.pipeline.handle(delivery())).queue is Queue.TRAINING
    assert [type(one) for one in world.unfit] == [GpuBroken]
    assert (world.record().attempts, world.record().rejections) == (0, 1)


def test_a_job_that_waits_for_another_attempt_reports_its_place_if_it_is_known(
    world: World,
) -> None:
    world.trainer.does = raising(WorkerCrashed("it died"))
    world.pipeline.handle(delivery())
    assert not [one for one in world.backend.reports if one["progress"]["stage"] == "queued"]
    world.observer.queues.looked(Queue.TRAINING, 3, 1)
    world.observer.queues.finished(100.0)
    world.pipeline.handle(delivery(order("task-2")))
    (told,) = [one for one in world.backend.reports if one["progress"]["stage"] == "queued"]
    assert told["task_id"] == "task-2"
    assert told["progress"]["queue_position"] == 4
    assert told["progress"]["estimated_seconds"] == 310
    world.shutdown.request()
    world.pipeline.handle(delivery(order("task-3")))
    queued = [one for one in world.backend.reports if one["progress"]["stage"] == "queued"]
    assert len(queued) == 1, "a shutdown has no time for it"


def test_a_job_that_breaks_every_machine_ends(world: World) -> None:
    for number in range(9):
        other = world.worker(f"broken-{number}")
        other.trainer.does = raising(MachineError("the disk answers with errors"))
        other.pipeline.handle(delivery(redelivered=True))
        assert other.unfit
    world.trainer.does = raising(MachineError("the disk answers with errors"))
    world.pipeline.handle(delivery(redelivered=True))
    assert world.backend.endings[0].body["error_code"] == "WORKER_CRASHED"
    assert not world.unfit


# ---- time ---------------------------------------------------------------------------------------


def test_the_time_limit_counts_all_that_workers_have_spent_on_the_job(world: World) -> None:
    world.trainer.does = raising(WorkerCrashed("it died"))
    copy = only(world.pipeline.handle(delivery()))
    assert world.record().seconds_run > 0
    _rewrite(world, seconds_run=6 * 3600.0 - 100.0)
    world.trainer.does = lambda run, tell, stop: None
    world.pipeline.handle(redelivery_of(copy))
    assert world.trainer.max_seconds[0] == pytest.approx(6 * 3600.0, abs=5.0)
    assert world.trainer.max_seconds[1] == pytest.approx(100.0, abs=5.0)


def test_a_job_whose_time_is_used_up_fails_without_another_attempt(world: World) -> None:
    world.trainer.does = raising(WorkerCrashed("it died"))
    copy = only(world.pipeline.handle(delivery()))
    _rewrite(world, seconds_run=6 * 3600.0)
    world.pipeline.handle(redelivery_of(copy))
    assert world.backend.endings[0].body["error_code"] == "TIME_LIMIT"
    assert len(world.trainer.runs) == 1


def test_a_job_that_waited_too_long_for_its_first_claim_fails_if_there_is_a_limit(
    tmp_path: Path,
) -> None:
    old = {"created_at": "2026-01-20T10:00:00Z"}
    patient = World(tmp_path / "patient")
    patient.pipeline.handle(delivery(order("task-2", **old)))
    assert patient.backend.endings[0].kind == "complete"
    strict = World(tmp_path / "strict", patient.s3, max_wait_seconds=60)
    strict.pipeline.handle(delivery(order("task-3")))
    assert strict.backend.endings[0].kind == "complete"
    age = _seconds_ago(120)
    strict.pipeline.handle(delivery(order("task-4", created_at=age)))
    assert strict.backend.endings[1].body["error_code"] == "TIME_LIMIT"
    assert "nothing was trained" in strict.backend.endings[1].body["error_message"]


# ---- putting off --------------------------------------------------------------------------------


def test_an_outage_of_the_storage_puts_the_message_off_with_growing_delays_and_a_limit(
    world: World,
) -> None:
    world.s3.before = away
    message = delivery()
    delays = []
    for _ in range(4):
        copy = only(world.pipeline.handle(message))
        delays.append(copy.delay_seconds)
        message = redelivery_of(copy)
    assert delays == [10.0, 60.0, 600.0, 600.0]
    assert message.put_offs == 4
    assert world.counted("messages_put_off_total", reason="storage") == 4
    last = only(world.pipeline.handle(delivery(headers={PUT_OFFS: 200})))
    assert (last.queue, last.headers["x-error-code"]) == (Queue.DEAD, "STORAGE_FAILED")


def test_a_damaged_record_puts_its_message_off_five_times_and_then_gives_it_up(
    world: World,
) -> None:
    world.s3.write(S3Location(STATE, "jobs/task-1.json"), b"{")
    message, copies = delivery(), 0
    while (copy := only(world.pipeline.handle(message))).queue is Queue.TRAINING:
        message = redelivery_of(copy)
        copies += 1
        assert copies < 10
    assert copies == 5
    assert "damaged" in str(copy.headers["x-error-message"])
    assert (copy.body, copy.headers["x-task-id"]) == (order(), "task-1")
    assert world.counted("messages_dead_lettered_total", code="STORAGE_FAILED") == 1


def test_earlier_put_offs_do_not_lower_the_limit_for_a_damaged_record(
    world: World,
) -> None:
    message = delivery()
    world.s3.before = away
    for _ in range(7):
        message = redelivery_of(only(world.pipeline.handle(message)))
    world.s3.before = works
    world.s3.write(S3Location(STATE, "jobs/task-1.json"), b"{")
    for _ in range(5):
        copy = only(world.pipeline.handle(message))
        assert copy.queue is Queue.TRAINING
        message = redelivery_of(copy)
    assert message.put_offs == 12
    assert only(world.pipeline.handle(message)).queue is Queue.DEAD


def test_an_ended_job_of_a_newer_worker_has_its_ending_delivered_by_an_older_one(
    world: World,
) -> None:
    world.backend.answers = [AWAY]
    world.pipeline.handle(delivery())
    _rewrite(world, min_level=PROTOCOL_LEVEL + 1)
    assert world.pipeline.handle(delivery(redelivered=True)) == Settlement.ack()
    assert world.record().is_settled


def test_the_message_of_a_newer_workers_record_is_kept_without_a_limit(world: World) -> None:
    world.s3.write(S3Location(STATE, "jobs/task-1.json"), b'{"version": 2}')
    copy = only(world.pipeline.handle(delivery(headers={PUT_OFFS: 100_000})))
    assert copy.queue is Queue.TRAINING
    assert world.counted("messages_put_off_total", reason="newer_record") == 1


def test_a_message_for_a_newer_worker_waits_for_one_up_to_a_limit(world: World) -> None:
    headers = {MIN_LEVEL: PROTOCOL_LEVEL + 1}
    body = order(parameters={"only_the_new_version_knows": 1})
    copy = only(world.pipeline.handle(delivery(body, headers=headers)))
    assert (copy.queue, copy.body) == (Queue.TRAINING, body)
    assert copy.headers == {
        MIN_LEVEL: PROTOCOL_LEVEL + 1,
        PUT_OFFS: 1,
        PUT_OFF_REASON: "newer_message:1",
    }
    assert not world.s3.keys(STATE)
    last = only(world.pipeline.handle(delivery(body, headers=headers | {PUT_OFFS: 200})))
    assert (last.queue, last.headers["x-error-code"]) == (Queue.DEAD, "UNKNOWN_TYPE")


def test_an_unknown_parameter_without_a_level_is_refused_at_once(world: World) -> None:
    settlement = world.pipeline.handle(delivery(order(parameters={"no_such_thing": 1})))
    dead = only(settlement)
    assert (dead.queue, dead.headers["x-error-code"]) == (Queue.DEAD, "INVALID_MESSAGE")
    assert world.backend.endings[0].body["error_code"] == "INVALID_MESSAGE"


def test_a_job_that_needs_a_newer_worker_is_not_claimed_by_an_older_one(world: World) -> None:
    world.trainer.does = raising(WorkerCrashed("it died"))
    message = delivery(headers={MIN_LEVEL: PROTOCOL_LEVEL})
    copy = only(world.pipeline.handle(message))
    assert copy.headers[MIN_LEVEL] == PROTOCOL_LEVEL
    _rewrite(world, min_level=PROTOCOL_LEVEL + 1)
    again = only(world.pipeline.handle(delivery()))
    assert again.headers[PUT_OFFS] == 1
    assert len(world.trainer.runs) == 1


def test_a_copy_for_another_attempt_starts_its_put_offs_at_zero(world: World) -> None:
    world.trainer.does = raising(WorkerCrashed("it died"))
    copy = only(world.pipeline.handle(delivery(headers={PUT_OFFS: 7, "traceparent": "00-a-b-01"})))
    assert copy.headers == {OWN_COPY: True, "traceparent": "00-a-b-01"}


def test_a_failed_upload_is_a_passing_fault(world: World) -> None:
    def fails() -> None:
        raise StorageError("S3 is away")

    world.publisher.does = fails
    assert only(world.pipeline.handle(delivery())).queue is Queue.TRAINING
    assert world.record().state is State.LIVE
    assert world.counted("job_retries_total", code=str(ErrorCode.STORAGE_FAILED)) == 1


def test_a_record_that_cannot_be_understood_is_read_from_the_message(world: World) -> None:
    world.trainer.does = raising(WorkerCrashed("it died"))
    copy = only(world.pipeline.handle(delivery()))
    _rewrite(world, message={"nonsense": True})
    world.trainer.does = lambda run, tell, stop: None
    assert world.pipeline.handle(redelivery_of(copy)) == Settlement.ack()
    assert world.publisher.published == ["task-1"]


def test_every_error_of_a_run_ends_in_an_ending_or_another_attempt(world: World) -> None:
    for number, kind in enumerate(_all_errors()):
        world.trainer.does = raising(kind())
        settlement = world.pipeline.handle(delivery(order(f"job-{number}")))
        told = any(one.body["task_id"] == f"job-{number}" for one in world.backend.endings)
        assert told != bool(settlement.publish), kind.__name__


def _all_errors() -> list[type[TrainingServerError]]:
    return [kind for name, kind in REPORTABLE.items() if name != "GpuBroken"]


def _rewrite(world: World, **values: Any) -> None:
    """Change a released record, as another worker would have left it."""
    record = dataclasses.replace(world.record(), **values)
    beside = values_beside(record)
    world.s3.change(STATE, "jobs/task-1.json", body=encode(record), metadata=beside)


def _seconds_ago(seconds: float) -> str:
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
    return then.isoformat()
