"""This code takes over what the commit before the rooms wrote: `tests.fixtures.before_rooms`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pika
import pytest

from jobs.record import JobRecord
from sandbox.worker_process import ROOT
from tests.acceptance.world import World, log_lines, until
from tests.fixtures.before_rooms.write import FOLDER, INVALID, LIVE, PENDING, SETTLED, STYLES

OBJECTS = FOLDER / "objects"
RECORDS = sorted((OBJECTS / "state").rglob("*.json"))


@pytest.mark.parametrize("path", [each for each in RECORDS if "/jobs/" in str(each)], ids=str)
def test_a_record_is_read_and_written_back_without_a_change(path: Path) -> None:
    content = path.read_bytes()
    assert JobRecord.from_json(content).to_json() == content


@pytest.fixture(name="old")
def _old(apart: World) -> World:
    """A world with the objects and messages of the fixtures."""
    for name, bucket in (("state", apart.state), ("media", apart.media)):
        for path in (OBJECTS / name).rglob("*"):
            if path.is_file():
                key = str(path.relative_to(OBJECTS / name))
                apart.s3.put_object(Bucket=bucket, Key=key, Body=_here(path.read_bytes(), apart))
    messages: list[dict[str, Any]] = json.loads((FOLDER / "messages.json").read_text("utf-8"))
    with apart.channel() as channel:
        for message in messages:
            queue = apart.queue + message["queue"]
            channel.queue_declare(queue, durable=True)
            properties = pika.BasicProperties(
                content_type=message["content_type"],
                message_id=message["message_id"],
                headers=message["headers"],
                delivery_mode=2,
            )
            body = _here(json.dumps(message["body"]).encode(), apart)
            channel.basic_publish("", queue, body, properties, mandatory=True)
    return apart


def _here(content: bytes, world: World) -> bytes:
    """The content with the names of this world's buckets and the address of its backend."""
    names: dict[str, str] = json.loads((FOLDER / "world.json").read_text("utf-8"))
    here = {"media": world.media, "state": world.state, "backend": world.backend.url}
    for name, value in here.items():
        content = content.replace(names[name].encode(), value.encode())
    return content


def test_jobs_of_the_commit_before_the_rooms_are_finished(old: World) -> None:
    """The put-off copy resumes its checkpoint, the parked ending is delivered under its own id, and
    a duplicate of a settled job is acknowledged."""
    pending = old.record(PENDING)["ending"]
    (checkpoint,) = old.record(LIVE)["checkpoints"]
    duplicate = old.envelope(style_id=STYLES[SETTLED]) | {"task_id": SETTLED}
    with old.worker_of(ROOT, CHECKPOINT_INTERVAL="30") as worker:
        old.publish(duplicate)
        kind, ending = old.ending(PENDING)
        assert (kind, ending) == (pending["kind"], pending["body"])
        (delivered,) = old.backend.endings(PENDING)
        assert delivered.webhook_id == pending["webhook_id"]
        kind, ending = old.ending(LIVE)
        assert (kind, ending["training_metric"]["epochs"]) == ("complete", 400)
        (started,) = log_lines(worker, "training_started")
        assert (started["task_id"], started["epoch"]) == (LIVE, checkpoint["epoch"])
        until(lambda: old.record(LIVE)["delivery"] == "delivered")
        until(lambda: old.waiting(old.queue) == old.waiting(f"{old.queue}.endings") == 0)
        assert worker.stop() == 0
    ended_before = {each["task_id"] for each in log_lines(worker, "job_ended_before")}
    assert SETTLED in ended_before
    assert not old.backend.endings(SETTLED)
    _assert_reports_agree(old)


def _assert_reports_agree(world: World) -> None:
    """The report of the present code has every field of the old one."""
    old, new = (
        json.loads(world.read(world.media, f"models/style_{STYLES[task]}/training_report.json"))
        for task in (SETTLED, LIVE)
    )
    assert set(old) <= set(new)


def test_a_dead_letter_of_the_commit_before_the_rooms_is_refused_again_once(old: World) -> None:
    _, body = until(lambda: old.take(f"{old.queue}.dead"))
    record = JobRecord.from_json(next(_invalid_records(old)))
    with old.worker_of(ROOT) as worker:
        old.publish(body)
        until(lambda: log_lines(worker, "job_ended_before"))
        assert worker.stop() == 0
    assert record.ending and record.ending.body["task_id"] == INVALID
    assert not old.backend.endings(INVALID)


def _invalid_records(world: World) -> Any:
    keys = world.keys(world.state, "jobs/invalid/")
    return (world.read(world.state, key) for key in keys if key.endswith(".json"))
