"""This code takes over what the commit before the rooms wrote: `tests.fixtures.before_rooms`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pika
import pytest

from jobs.hold import decode, encode
from jobs.record import JobRecord
from sandbox.worker_process import ROOT
from tests.acceptance.world import World, log_lines, until
from tests.fixtures.before_rooms.write import (
    EPOCHS,
    FOLDER,
    LIVE,
    PENDING,
    REFUSED,
    SETTLED,
    STYLES,
    world_of,
)

OBJECTS = FOLDER / "objects"
RECORDS = sorted((OBJECTS / "state" / "jobs").rglob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem[:8])
def test_a_record_is_read_and_written_back_without_a_change(path: Path) -> None:
    content = path.read_bytes()
    assert encode(decode(JobRecord, content, path.name)) == content


@pytest.fixture(name="old")
def _old(world: World) -> World:
    """A world with the objects and messages of the fixtures."""
    old = world_of(world.broker, world.s3_server, world.backend, world.base_model, world.folder)
    metadata = _kept("metadata.json")
    for name, bucket in (("state", old.state), ("media", old.media)):
        for path in (OBJECTS / name).rglob("*"):
            if path.is_file():
                old.s3.put_object(
                    Bucket=bucket,
                    Key=str(path.relative_to(OBJECTS / name)),
                    Body=_here(path.read_bytes(), old),
                    Metadata=metadata.get(str(path.relative_to(OBJECTS)), {}),
                )
    old.photographs = tuple(
        f"s3://{old.media}/training/{path.name}"
        for path in sorted((OBJECTS / "media" / "training").iterdir())
    )
    with old.channel() as channel:
        for message in _kept("messages.json"):
            queue = old.queue + message["queue"]
            channel.queue_declare(queue, durable=True, arguments=_arguments(queue))
            properties = pika.BasicProperties(
                content_type=message["content_type"],
                message_id=message["message_id"],
                headers=message["headers"],
                delivery_mode=2,
            )
            body = _here(json.dumps(message["body"]).encode(), old)
            channel.basic_publish("", queue, body, properties, mandatory=True)
    return old


def _arguments(queue: str) -> dict[str, Any] | None:
    """The arguments with which the old code declared the queue."""
    target, delay, milliseconds = queue.partition(".delay.")
    if not delay:
        return None
    return {
        "x-message-ttl": int(milliseconds),
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": target,
    }


def _here(content: bytes, world: World) -> bytes:
    """The content with the address of this world's backend."""
    backend: str = _kept("world.json")["backend"]
    return content.replace(backend.encode(), world.backend.url.encode())


def _kept(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_jobs_of_the_commit_before_the_rooms_are_finished(old: World) -> None:
    """Checkpoint, parked ending and duplicate are taken over.

    The put-off copy resumes its checkpoint, the parked ending is delivered under its own id,
    and a duplicate of a settled job is acknowledged.
    """
    pending = old.record(PENDING)["ending"]
    (checkpoint,) = old.record(LIVE)["checkpoints"]
    duplicate = old.envelope(style_id=STYLES[SETTLED]) | {"task_id": SETTLED}
    with old.worker_of(ROOT, CHECKPOINT_INTERVAL=str(EPOCHS)) as worker:
        old.publish(duplicate)
        kind, ending = old.ending(PENDING)
        assert (kind, ending) == (pending["kind"], pending["body"])
        (delivered,) = old.backend.endings(PENDING)
        assert delivered.webhook_id == pending["webhook_id"]
        kind, ending = old.ending(LIVE)
        assert (kind, ending["training_metric"]["epochs"]) == ("complete", EPOCHS)
        started = [
            (each["task_id"], each["epoch"]) for each in log_lines(worker, "training_started")
        ]
        assert started == [(LIVE, checkpoint["epoch"])]
        until(lambda: old.record(LIVE)["delivery"] == "delivered")
        until(lambda: old.waiting(old.queue) == old.waiting(f"{old.queue}.endings") == 0)
        _assert_redriven(old)
        assert worker.stop() == 0
    ended_before = {each["task_id"] for each in log_lines(worker, "job_ended_before")}
    assert SETTLED in ended_before
    assert not old.backend.endings(SETTLED)
    _assert_reports_agree(old)


def _assert_redriven(world: World) -> None:
    """The ending that the backend refused is sent again, the same under its own id."""
    record = world.record(REFUSED)
    assert record["delivery"] == "set_aside"
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "redrive", REFUSED],
        env=world.settings() | {"PATH": os.environ["PATH"]},
        cwd=world.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert world.ending(REFUSED) == (record["ending"]["kind"], record["ending"]["body"])
    (delivered,) = world.backend.endings(REFUSED)
    assert delivered.webhook_id == record["ending"]["webhook_id"]
    until(lambda: world.record(REFUSED)["delivery"] == "delivered")


def test_the_fixtures_have_a_message_in_each_sort_of_queue_and_a_record_in_each_state() -> None:
    queues = {message["queue"].partition(".delay.")[:2] for message in _kept("messages.json")}
    assert queues == {("", ".delay."), (".endings", ".delay."), (".dead", "")}
    states = {(each["state"], each["delivery"]) for each in map(_json, RECORDS)}
    assert states == {
        ("live", "none"),
        *(("ended", delivery) for delivery in ("pending", "delivered", "set_aside")),
    }


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _assert_reports_agree(world: World) -> None:
    """The report of the present code has every field of the old one."""
    old, new = (
        json.loads(world.read(world.media, f"models/style_{STYLES[task]}/training_report.json"))
        for task in (SETTLED, LIVE)
    )
    assert set(old) <= set(new)
