"""A paused job: saved, released, left alone, and continued or cancelled later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from consumer.life.endings import training_copy
from jobs.addresses import S3Location
from jobs.layout import cancel_file_at, pause_file_at
from jobs.message import from_understood
from jobs.record import PAUSED_SECONDS, State
from services.broker.settlement import Action, Publication, Queue, Settlement
from services.records.job_records import Claimed
from services.records.requests import Requests
from tests.memory_s3 import works
from tests.unit.consumer.job_world import STATE, World, checkpoint, delivery, order, redelivery_of
from utils.errors import StopReason, StorageError, WorkerCrashed

HOUR = 3600.0
DAY = 24 * HOUR


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> World:
    return World(tmp_path / "one")


def ask(world: World) -> None:
    """Write the pause file, as an operator does."""
    Requests(world.s3, STATE).pause("task-1")


def is_asked(world: World) -> bool:
    return Requests(world.s3, STATE).wants_pause("task-1")


def resume(world: World) -> Publication:
    """Resume as `main.py resume` does; returns the message that it publishes."""
    record = Requests(world.s3, STATE).resume("task-1")
    assert record is not None
    kind = world.settings.kinds().of(record.kind)
    return training_copy(record, from_understood(kind, record.message).body)


def pausing(run: Any, tell: Any, stop: Any) -> None:
    """The trainer makes a checkpoint, and is asked to pause."""
    checkpoint(run, tell)
    stop.request(StopReason.PAUSED)


def paused_in_training(world: World) -> None:
    """A job that was paused after its first checkpoint."""
    world.trainer.does = pausing
    ask(world)
    _claim_before_it_is_seen(world)
    assert world.pipeline.handle(delivery()) == Settlement.ack()
    world.s3.before = works
    world.trainer.does = lambda run, tell, stop: None


def _claim_before_it_is_seen(world: World) -> None:
    """The first look for a pause file fails, so that the job begins."""
    looks = iter([True])

    def before(method: str, bucket: str, key: str) -> None:
        if key.endswith(".pause") and method == "HEAD" and next(looks, False):
            raise StorageError("away for a moment")
        del bucket

    world.s3.before = before


def published(world: World) -> list[Publication]:
    return world.broker.in_queue(Queue.TRAINING)


def test_a_paused_job_is_saved_released_and_its_message_acknowledged(world: World) -> None:
    world.trainer.does = pausing  # the backend's answer asks for it
    assert world.pipeline.handle(delivery()) == Settlement.ack()
    record = world.record()
    assert (record.state, record.hold.released, record.is_paused) == (State.LIVE, True, True)
    assert (record.attempts, record.hold.quiet_seconds) == (0, PAUSED_SECONDS)
    assert record.checkpoint is not None and record.checkpoint.epoch == 10
    assert is_asked(world)
    assert not world.backend.endings and not world.publisher.published
    assert world.counted("jobs_given_back_total", reason="paused") == 1


def test_the_backend_hears_once_that_the_job_is_paused(world: World) -> None:
    world.trainer.does = pausing
    world.pipeline.handle(delivery())
    told = [each["progress"]["stage"] for each in world.backend.reports]
    assert told == ["paused"]
    assert world.backend.reports[0]["sequence"] > 1_000_000


def test_a_pause_file_before_the_first_claim_leaves_a_record_and_trains_nothing(
    world: World,
) -> None:
    ask(world)
    assert world.pipeline.handle(delivery()) == Settlement.ack()
    assert world.record().is_paused and not world.trainer.runs
    assert json.dumps(world.record().message)  # enough to publish it again


def test_the_sweep_leaves_a_paused_job_alone_for_years(world: World) -> None:
    paused_in_training(world)
    for seconds in (HOUR, 30 * DAY, 365 * DAY):
        world.s3.pass_seconds(seconds)
        world.sweeper().sweep_once()
    assert not published(world) and world.record().is_paused


def test_a_duplicate_and_a_redelivery_leave_a_paused_job_alone(world: World) -> None:
    paused_in_training(world)
    runs = len(world.trainer.runs)
    for one in (delivery(), delivery(redelivered=True)):
        world.s3.pass_seconds(HOUR)
        assert world.pipeline.handle(one) == Settlement.ack()
        assert world.record().is_paused and world.record().attempts == 0
    assert len(world.trainer.runs) == runs and not world.backend.endings


def test_another_worker_after_a_restart_leaves_a_paused_job_alone(world: World) -> None:
    paused_in_training(world)
    other = world.worker("two")
    world.s3.pass_seconds(HOUR)
    other.sweeper().sweep_once()
    assert other.pipeline.handle(delivery(redelivered=True)) == Settlement.ack()
    assert not published(other) and not other.trainer.runs and world.record().is_paused


def test_a_parked_copy_of_a_paused_job_goes_until_the_job_is_resumed(world: World) -> None:
    paused_in_training(world)
    copy = world.endings.watched(world.record(), order())
    assert world.endings.handle(redelivery_of(copy)) == Settlement.ack()
    Requests(world.s3, STATE).forget_pause("task-1")
    (again,) = world.endings.handle(redelivery_of(copy)).publish
    assert again.queue is Queue.TRAINING


def test_a_resumed_job_keeps_its_checkpoint_and_ends_once(world: World) -> None:
    paused_in_training(world)
    world.s3.pass_seconds(30 * DAY)
    message = resume(world)
    assert not world.record().is_paused and world.record().checkpoints
    assert world.pipeline.handle(redelivery_of(message)) == Settlement.ack()
    (ending,) = world.backend.endings
    assert ending.kind == "complete" and world.record().is_settled


def test_the_sweep_publishes_a_resumed_job_whose_message_was_lost(world: World) -> None:
    paused_in_training(world)
    resume(world)  # the message is never published
    world.sweeper().sweep_once()
    assert not published(world), "it may be waiting in the queue"
    world.s3.pass_seconds(HOUR)
    world.sweeper().sweep_once()
    assert [one.message_id for one in published(world)] == ["task-1"]


def test_a_job_is_resumed_by_the_removal_of_the_file(world: World) -> None:
    paused_in_training(world)
    place = pause_file_at(STATE, "task-1")
    world.s3.delete(place.bucket, [place.key])
    world.sweeper().sweep_once()
    (copy,) = published(world)
    assert world.pipeline.handle(redelivery_of(copy)) == Settlement.ack()
    assert world.record().is_settled


def test_a_job_that_is_resumed_while_its_worker_saves_it_returns_to_the_queue(
    world: World,
) -> None:
    def resumed_meanwhile(run: Any, tell: Any, stop: Any) -> None:
        pausing(run, tell, stop)
        Requests(world.s3, STATE).forget_pause("task-1")

    world.trainer.does = resumed_meanwhile
    world.s3.write(pause_file_at(STATE, "task-1"), b"")
    _claim_before_it_is_seen(world)
    lease_saw_it(world)
    settlement = world.pipeline.handle(delivery())
    assert settlement.action is Action.REQUEUE
    assert not world.record().is_paused and world.record().hold.released


def lease_saw_it(world: World) -> None:
    """Each lease of the worker has seen the pause file from its second look on."""
    claim = world.records.claim

    def seen(*given: Any, **named: Any) -> Any:
        claimed = claim(*given, **named)
        assert isinstance(claimed, Claimed)
        world_trainer_does = world.trainer.does

        def does(run: Any, tell: Any, stop: Any) -> None:
            claimed.lease.look_for_pause()
            assert claimed.lease.paused.is_set()
            world_trainer_does(run, tell, stop)

        world.trainer.does = does
        return claimed

    world.records.claim = seen  # type: ignore[method-assign]


def test_a_paused_job_is_cancelled_without_being_resumed(world: World) -> None:
    paused_in_training(world)
    runs = len(world.trainer.runs)
    world.s3.write(cancel_file_at(STATE, "task-1"), b"")
    world.sweeper().sweep_once()
    (copy,) = published(world)
    assert world.pipeline.handle(redelivery_of(copy)) == Settlement.ack()
    (ending,) = world.backend.endings
    assert ending.body["error_code"] == "CANCELLED" and len(world.trainer.runs) == runs
    assert not world.s3.keys(STATE, "jobs/task-1.pause")


def test_paused_time_counts_in_no_limit(tmp_path: Path) -> None:
    world = World(tmp_path / "one", max_wait_seconds="60", max_job_seconds="3600")
    ask(world)
    message = order(created_at="2020-01-20T10:00:00.000Z")  # it has waited for years
    assert world.pipeline.handle(delivery(message)) == Settlement.ack()
    assert world.record().is_paused
    world.s3.pass_seconds(365 * DAY)
    assert world.pipeline.handle(redelivery_of(resume(world))) == Settlement.ack()
    assert world.record().seconds_run < 60
    assert [each.kind for each in world.backend.endings] == ["complete"]


def test_a_paused_job_without_attempts_left_is_left_alone(world: World) -> None:
    def dies(*_: Any) -> None:
        raise WorkerCrashed("it died")

    world.trainer.does = dies
    copies = []
    for _ in range(2):
        (copy,) = world.pipeline.handle(delivery(redelivered=True)).publish
        copies.append(copy)
    dead = world.worker("dead")
    dead.trainer.does = killed
    with pytest.raises(KeyboardInterrupt):
        dead.pipeline.handle(redelivery_of(copies[-1]))
    world.s3.pass_seconds(HOUR)
    ask(world)
    assert world.pipeline.handle(redelivery_of(copies[-1])) == Settlement.ack()
    assert world.record().is_paused and not world.backend.endings


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_pause_that_s3_does_not_take_returns_the_job_to_the_queue(world: World) -> None:
    def before(method: str, bucket: str, key: str) -> None:
        del bucket
        if method == "PUT" and key.endswith(".pause"):
            raise StorageError("S3 is away")

    world.trainer.does = pausing
    world.s3.before = before
    assert world.pipeline.handle(delivery()) == Settlement.requeue()
    assert not world.record().is_paused


def test_a_shutdown_during_a_pause_leaves_the_job_paused(world: World) -> None:
    def both(run: Any, tell: Any, stop: Any) -> None:
        pausing(run, tell, stop)
        world.shutdown.request()

    world.trainer.does = both
    assert world.pipeline.handle(delivery()) == Settlement.ack()
    assert world.record().is_paused and not world.backend.reports


def test_files_of_a_dead_publisher_are_repaired_before_a_job_is_paused(world: World) -> None:
    ask(world)
    world.pipeline.handle(delivery())
    assert world.publisher.repaired == ["task-1"]


def test_a_pause_file_of_an_ended_job_is_removed(world: World) -> None:
    world.backend.on_ending = lambda: None

    def late(run: Any, tell: Any, stop: Any) -> None:
        del run, tell, stop
        world.s3.write(S3Location(STATE, "jobs/task-1.pause"), b"")

    world.trainer.does = late
    world.pipeline.handle(delivery())
    assert world.record().state is State.ENDED and not is_asked(world)
