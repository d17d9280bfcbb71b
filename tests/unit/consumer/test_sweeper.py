"""The sweep, fast: its publications, its cost, and its deletions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from consumer.life.endings import parked
from consumer.pages.observer import Observer
from jobs.addresses import S3Location
from jobs.layout import live_mark_at
from jobs.record import PROTOCOL_LEVEL
from services.broker.settlement import MIN_LEVEL, OWN_COPY, Queue, Settlement
from services.records.index import INVENTORY_SECONDS
from services.records.sweep import RecordSweep
from tests.memory_s3 import away, works
from tests.unit.consumer.job_world import (
    AWAY,
    STATE,
    World,
    delivery,
    order,
    parked_body,
    redelivery_of,
)
from utils.errors import LowQualityData, WorkerCrashed

DAY = 86_400.0


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> World:
    return World(tmp_path / "one")


def fails(*_: Any) -> None:
    raise LowQualityData()


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


def abandon(world: World, task_id: str = "task-1") -> None:
    """A worker claims a job and is killed; its message is lost."""
    dead = world.worker(f"dead-{task_id}")
    dead.trainer.does = killed
    with pytest.raises(KeyboardInterrupt):
        dead.pipeline.handle(delivery(order(task_id)))


def test_a_job_without_a_message_is_published_again_and_completes(world: World) -> None:
    abandon(world)
    sweeper = world.sweeper()
    sweeper.sweep_once()
    assert not world.broker.published  # its holder may live
    world.s3.pass_seconds(400.0)
    world.sweeper().sweep_once()
    (copy,) = world.broker.published
    assert (copy.queue, copy.message_id, copy.headers) == (
        Queue.TRAINING,
        "task-1",
        {OWN_COPY: True},
    )
    assert world.pipeline.handle(redelivery_of(copy)) == Settlement.ack()
    assert world.publisher.published == ["task-1"]
    assert world.record().attempts == 1  # the dead worker's
    assert world.counted("records_swept_total") == 1


def test_an_ending_without_a_message_is_parked_again(world: World) -> None:
    world.backend.answers = [AWAY]
    world.pipeline.handle(delivery())  # its parked ending is lost
    world.s3.pass_seconds(60.0 + 2 * 120.0 + 1)
    world.sweeper().sweep_once()
    (copy,) = world.broker.published
    assert copy.queue is Queue.ENDINGS
    assert parked_body(copy)["tries"] == 0
    assert world.endings.handle(redelivery_of(copy)) == Settlement.ack()
    assert world.record().is_settled


def test_a_copy_that_a_dead_worker_owed_is_sent(world: World) -> None:
    dead = world.worker("dead", max_attempts=1)
    dead.broker.on_publish = killed

    def crashes(*_: Any) -> None:
        raise WorkerCrashed("it died")

    dead.trainer.does = crashes
    with pytest.raises(KeyboardInterrupt):
        dead.pipeline.handle(delivery())
    world.s3.pass_seconds(400.0)
    world.sweeper().sweep_once()
    (parking,) = world.broker.published
    world.endings.handle(redelivery_of(parking))
    assert [one.headers["x-error-code"] for one in world.broker.in_queue(Queue.DEAD)] == [
        "WORKER_CRASHED"
    ]
    assert world.record().is_settled


def test_a_released_job_whose_message_is_lost_is_published_again(
    world: World,
) -> None:
    world.trainer.does = lambda *_: world.shutdown.request()
    assert world.pipeline.handle(delivery()) == Settlement.requeue()
    world.s3.pass_seconds(400.0)
    world.sweeper().sweep_once()
    assert [one.message_id for one in world.broker.published] == ["task-1"]


def test_only_one_of_two_sweeps_publishes(world: World) -> None:
    abandon(world)
    world.s3.pass_seconds(400.0)
    other = world.worker("two")
    other.sweeper().sweep_once()
    world.sweeper().sweep_once()
    assert len(world.broker.published) + len(other.broker.published) == 1


def test_a_job_that_waits_behind_others_is_not_published_while_the_queue_is_not_empty(
    world: World,
) -> None:
    world.trainer.does = lambda *_: world.shutdown.request()
    assert world.pipeline.handle(delivery()) == Settlement.requeue()
    waiting = [True]
    sweep = RecordSweep(
        cast(Any, world.s3), STATE, lease_seconds=120.0, may_wait=lambda record: waiting[0]
    )
    world.s3.pass_seconds(6 * 3600.0)
    assert not list(sweep.abandoned())
    waiting[0] = False
    sweep = RecordSweep(
        cast(Any, world.s3), STATE, lease_seconds=120.0, may_wait=lambda record: False
    )
    assert [record.task_id for record in sweep.abandoned()] == ["task-1"]


def test_a_queue_that_is_never_empty_hides_a_lost_message_for_a_day_only(world: World) -> None:
    world.trainer.does = lambda *_: world.shutdown.request()
    world.pipeline.handle(delivery())
    world.s3.pass_seconds(DAY + 1)
    sweep = RecordSweep(
        cast(Any, world.s3), STATE, lease_seconds=120.0, may_wait=lambda record: True
    )
    assert [record.task_id for record in sweep.abandoned()] == ["task-1"]


def test_a_holder_that_died_is_found_though_other_messages_wait(world: World) -> None:
    abandon(world)
    world.s3.pass_seconds(400.0)
    sweep = RecordSweep(
        cast(Any, world.s3), STATE, lease_seconds=120.0, may_wait=lambda record: True
    )
    assert [record.task_id for record in sweep.abandoned()] == ["task-1"]


def test_the_sweep_reads_live_jobs_and_not_the_history(world: World) -> None:
    for number in range(50):
        world.pipeline.handle(delivery(order(f"old-{number}")))
    world.sweeper().sweep_once()  # takes the inventory
    abandon(world, "live")
    world.s3.requests.clear()
    world.sweeper().sweep_once()
    touched = [key for operation, key in world.s3.requests if operation in ("GET", "LIST")]
    assert touched == ["jobs/inventory", "jobs/live/", "jobs/live.json"]


def test_the_inventory_is_taken_once_a_day_by_one_worker(world: World) -> None:
    def listings() -> int:
        return world.s3.requests.count(("LIST", "jobs/"))

    world.sweeper().sweep_once()
    world.worker("two").sweeper().sweep_once()
    assert listings() == 1
    world.s3.pass_seconds(INVENTORY_SECONDS - 1)
    world.sweeper().sweep_once()
    assert listings() == 1
    world.s3.pass_seconds(2)
    world.sweeper().sweep_once()
    assert listings() == 2


def test_records_that_an_older_worker_left_off_the_index_are_found_by_the_inventory(
    world: World,
) -> None:
    abandon(world)
    mark = live_mark_at(STATE, "task-1")
    world.s3.delete(mark.bucket, [mark.key])
    world.s3.pass_seconds(400.0)
    world.sweeper().sweep_once()
    assert [one.message_id for one in world.broker.published] == ["task-1"]


def test_settled_records_are_kept_unless_a_retention_is_set(world: World, tmp_path: Path) -> None:
    world.pipeline.handle(delivery())
    checkpoint = S3Location(STATE, "checkpoints/style_10/task-1/epoch-0010/lora.safetensors")
    world.s3.write(checkpoint, b"weights")
    world.s3.write(S3Location(STATE, "jobs/task-1.cancel"), b"")
    world.s3.pass_seconds(31 * DAY)
    world.sweeper().sweep_once()
    assert world.s3.exists(S3Location(STATE, "jobs/task-1.json"))
    brief = World(tmp_path / "brief", world.s3, record_retention_days=30)
    world.s3.pass_seconds(DAY + 1)
    brief.sweeper().sweep_once()
    assert world.s3.keys(STATE) == ["jobs/inventory"]


def test_a_record_that_is_not_settled_is_kept_beyond_every_retention(tmp_path: Path) -> None:
    world = World(tmp_path / "one", record_retention_days=1)
    world.backend.answers = [AWAY]
    world.pipeline.handle(delivery())
    world.s3.pass_seconds(100 * DAY)
    world.sweeper().sweep_once()
    assert world.s3.exists(S3Location(STATE, "jobs/task-1.json"))


def test_the_inventory_keeps_a_young_settled_record(tmp_path: Path) -> None:
    world = World(tmp_path / "one", record_retention_days=30)
    world.pipeline.handle(delivery())
    world.s3.pass_seconds(29 * DAY)
    world.sweeper().sweep_once()
    assert world.s3.exists(S3Location(STATE, "jobs/task-1.json"))


def test_the_sweep_clears_up_files_that_remained_after_the_ending(
    world: World,
) -> None:
    leftover = S3Location(STATE, "staging/task-1/1/samples.png")

    def publishes() -> None:
        world.s3.write(leftover, b"x")

        def no_listing(method: str, bucket: str, key: str) -> None:
            if method == "LIST":
                away(method, bucket, key)

        world.s3.before = no_listing

    world.publisher.does = publishes
    assert world.pipeline.handle(delivery()) == Settlement.ack()
    world.s3.before = works
    assert world.s3.exists(leftover)
    assert world.s3.keys(STATE, "jobs/live/") == ["jobs/live/task-1"]
    world.sweeper().sweep_once()
    assert not world.s3.exists(leftover)
    assert not world.s3.keys(STATE, "jobs/live/")
    assert world.s3.exists(S3Location(STATE, "jobs/task-1.settled"))


def test_an_id_on_the_index_without_a_record_is_removed_after_a_while(world: World) -> None:
    world.s3.write(live_mark_at(STATE, "never"), b"")
    world.sweeper().sweep_once()
    assert world.s3.keys(STATE, "jobs/live/") == ["jobs/live/never"]
    world.s3.change(STATE, "jobs/live/never", written_at=world.s3.now.replace(year=2020))
    world.sweeper().sweep_once()
    assert not world.s3.keys(STATE, "jobs/live/")


def test_a_job_for_a_newer_worker_is_left_to_that_workers_sweep(world: World) -> None:
    dead = world.worker("dead")
    dead.trainer.does = killed
    with pytest.raises(KeyboardInterrupt):
        dead.pipeline.handle(delivery(headers={MIN_LEVEL: PROTOCOL_LEVEL}))
    body = world.s3.objects[STATE, "jobs/task-1.json"].body
    newer = body.replace(b'"min_level": 1', b'"min_level": 2')
    world.s3.change(STATE, "jobs/task-1.json", body=newer)
    world.s3.pass_seconds(DAY)
    for _ in range(3):
        world.sweeper().sweep_once()
    assert not world.broker.published
    left = world.s3.objects[STATE, "jobs/task-1.json"].body
    assert left == newer, "the newer worker finds it as it was, and not a day later"
    world.s3.change(STATE, "jobs/task-1.json", body=body)
    world.sweeper().sweep_once()
    assert world.broker.published[0].headers == {MIN_LEVEL: PROTOCOL_LEVEL, OWN_COPY: True}


def test_an_interrupted_inventory_is_repeated_soon(world: World) -> None:
    def no_listing(method: str, bucket: str, key: str) -> None:
        if (method, key) == ("LIST", "jobs/"):
            away(method, bucket, key)

    abandon(world)
    mark = live_mark_at(STATE, "task-1")
    world.s3.delete(mark.bucket, [mark.key])
    world.s3.pass_seconds(400.0)
    world.s3.before = no_listing
    world.sweeper().sweep_once()
    world.s3.before = works
    world.s3.pass_seconds(300.0)
    world.sweeper().sweep_once()
    assert not world.broker.published, "another worker may be at it"
    world.s3.pass_seconds(301.0)
    world.sweeper().sweep_once()
    assert [one.message_id for one in world.broker.published] == ["task-1"]


def test_a_job_that_an_older_worker_made_is_on_the_index_once_it_is_taken_over(
    world: World,
) -> None:
    abandon(world)
    mark = live_mark_at(STATE, "task-1")
    world.s3.delete(mark.bucket, [mark.key])
    world.s3.pass_seconds(400.0)
    world.trainer.does = killed
    with pytest.raises(KeyboardInterrupt):
        world.pipeline.handle(delivery(redelivered=True))
    assert world.s3.exists(mark)


def test_a_record_that_is_sent_back_while_it_leaves_the_index_stays_on_it(world: World) -> None:
    index = RecordSweep(world.s3, STATE, lease_seconds=120.0).index
    world.pipeline.handle(delivery())
    live = world.s3.objects[STATE, "jobs/task-1.json"].body.replace(
        b'"delivery": "delivered"', b'"delivery": "pending"'
    )
    index.add("task-1")

    def sent_back(method: str, _bucket: str, key: str) -> None:
        if method == "DELETE" and key == "jobs/live/task-1":
            world.s3.change(STATE, "jobs/task-1.json", body=live)

    world.s3.before = sent_back
    index.remove("task-1")
    assert world.s3.keys(STATE, "jobs/live/") == ["jobs/live/task-1"]
    assert not world.s3.exists(S3Location(STATE, "jobs/task-1.settled"))


@pytest.mark.parametrize("when", ["before it is read", "before it is deleted"])
def test_a_record_that_is_sent_back_at_the_end_of_its_retention_is_kept(
    tmp_path: Path, when: str
) -> None:
    world = World(tmp_path / "one", record_retention_days=1)
    world.trainer.does = fails
    world.pipeline.handle(delivery())
    world.s3.pass_seconds(3 * DAY)
    body = world.s3.objects[STATE, "jobs/task-1.json"].body
    live = body.replace(b'"delivery": "delivered"', b'"delivery": "pending"')
    method = "GET" if when == "before it is read" else "DELETE"

    def sent_back(asked: str, bucket: str, key: str) -> None:
        del bucket
        if (asked, key) == (method, "jobs/task-1.json"):
            world.s3.change(STATE, key, body=live)

    world.s3.before = sent_back
    world.sweeper().sweep_once()
    assert world.s3.objects[STATE, "jobs/task-1.json"].body == live


def test_a_damaged_record_is_logged_once_and_not_at_each_sweep(world: World) -> None:
    world.s3.write(live_mark_at(STATE, "damaged"), b"")
    world.s3.write(S3Location(STATE, "jobs/damaged.json"), b"{")
    sweeper = world.sweeper()
    with capture_logs() as lines:
        sweeper.sweep_once()
        sweeper.sweep_once()
    assert [line["event"] for line in lines].count("record_not_swept") == 1


def test_a_queue_whose_length_is_unknown_may_hold_messages() -> None:
    watch = Observer().queues
    assert watch.may_hold_messages()
    watch.looked(Queue.TRAINING, 2, 1)
    assert watch.may_hold_messages()
    watch.looked(Queue.TRAINING, 0, 1)
    assert not watch.may_hold_messages()
    watch.lost_sight()
    assert watch.may_hold_messages()


def test_a_record_whose_message_cannot_be_read_is_not_published(world: World) -> None:
    abandon(world)
    body = world.s3.objects[STATE, "jobs/task-1.json"].body
    values = json.loads(body) | {"message": {"nonsense": True}}
    world.s3.change(STATE, "jobs/task-1.json", body=json.dumps(values).encode())
    abandon(world, "task-2")
    world.s3.pass_seconds(400.0)
    world.sweeper().sweep_once()
    assert [one.message_id for one in world.broker.published] == ["task-2"]


def test_the_sweep_runs_at_the_start_and_then_once_per_lease_until_its_end(tmp_path: Path) -> None:
    world = World(tmp_path / "one", lease_ttl_seconds=1)

    def sweeps() -> int:
        return world.s3.requests.count(("LIST", "jobs/live/"))

    with world.sweeper():
        deadline = time.monotonic() + 20
        while sweeps() < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sweeps() == 2
    time.sleep(1.3)
    assert sweeps() == 2


def test_an_unreadable_record_does_not_affect_the_others(world: World) -> None:
    world.s3.write(live_mark_at(STATE, "a-damaged-one"), b"")
    world.s3.write(S3Location(STATE, "jobs/a-damaged-one.json"), b"{")
    abandon(world)
    world.s3.pass_seconds(400.0)
    world.sweeper().sweep_once()
    assert [one.message_id for one in world.broker.published] == ["task-1"]


def test_an_outage_of_the_storage_does_not_end_the_sweeper(world: World) -> None:
    world.s3.before = away
    world.sweeper().sweep_once()
    assert not world.broker.published


def test_pending_endings_are_counted_with_the_age_of_the_oldest(world: World) -> None:
    world.backend.answers = [AWAY, AWAY]
    world.pipeline.handle(delivery(order("first")))
    world.pipeline.handle(delivery(order("second")))
    world.sweeper().sweep_once()
    assert world.counted("endings_pending") == 2
    assert world.counted("oldest_pending_ending_age_seconds") >= 0
    for task_id in ("first", "second"):
        world.endings.handle(redelivery_of(parked(task_id, order(task_id), tries=1, delay=None)))
    world.sweeper().sweep_once()
    assert world.counted("endings_pending") == 0
