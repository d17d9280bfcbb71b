"""Operators' commands with a running worker: order, list, cancel, send back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import config
from jobs import message as messages
from jobs.record import JobRequest
from sandbox.photographs import photographs
from sandbox.worker_process import ROOT, WorkerProcess
from services.records.job_records import Claimed, JobRecords
from services.s3.s3_service import open_store
from tests.acceptance.world import World, log_lines, until


def _main(world: World, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        env=world.settings(**changed) | {"PATH": os.environ["PATH"]},
        cwd=world.folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def _line(shown: str, task_id: str) -> str:
    """The one line of a table that is about a job."""
    (line,) = (each for each in shown.splitlines() if task_id.startswith(each.split()[0]))
    return line


def _json(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(name="images")
def _images(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for each in photographs()[:3]:
        (folder / each.name).write_bytes(each.content)
    (folder / "astronaut.txt").write_text("an astronaut", encoding="utf-8")
    (folder / "two words & more.png").write_bytes(photographs()[3].content)
    return folder


def test_a_folder_is_ordered_trained_and_waited_for(
    world: World, worker: WorkerProcess, images: Path
) -> None:
    assert worker.exit_code is None
    order = ("--style-id", "61", "--parameter", "epochs=2", "--tag", "harbour", "--wait", "--json")
    done = _main(world, "publish", str(images), *order)
    assert done.returncode == 0, done.stderr
    told = _json(done)
    assert told["epochs"] == 2 and told["job"]["ending"] == "complete"
    kind, ending = world.ending(told["task_id"])
    assert kind == "complete" and ending["style_id"] == 61
    report = json.loads(world.read(world.media, "models/style_61/training_report.json"))
    captions = {each["source"].rsplit("-", 1)[1]: each["caption"] for each in report["pictures"]}
    assert len(captions) == 4 and captions["astronaut.jpg"] == "an astronaut"
    assert captions["two_words_more.png"] == "harbour"
    (job,) = _json(_main(world, "jobs", told["task_id"], "--json"))["jobs"]
    assert (job["state"], job["ending"], job["epoch"]) == ("ended", "complete", 2)
    assert job["model_url"] == f"s3://{world.media}/models/style_61/lora_weights.safetensors"
    assert job["loss"] == report["loss"]
    line = _line(_main(world, "jobs", "--style", "61", COLUMNS="80").stdout, told["task_id"])
    assert line.split()[1:5] == ["61", "complete", "2/2", "yes"] and len(line) <= 80
    shown = _main(world, "jobs", line.split()[0], COLUMNS="80").stdout
    assert all(each in shown for each in (told["task_id"], job["owner"], "was notified", " ago"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--parameter", "epochs=100000"), "epochs"),
        (("--parameter", "epoch=2"), "epochs"),
        (("--parameter", "epochs"), "NAME=VALUE"),
        (("--parameter", "learning_rate=NaN"), "learning_rate"),
        (("--task-id", "../elsewhere"), "task_id"),
    ],
)
def test_an_order_that_no_worker_would_accept_is_refused_before_anything_is_uploaded(
    apart: World, images: Path, arguments: tuple[str, ...], named: str
) -> None:
    done = _main(apart, "publish", str(images), "--style-id", "62", *arguments)
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr
    assert not apart.keys(apart.media, "training/62/")
    assert apart.waiting(apart.queue) == 0


def test_an_order_with_auto_epochs_carries_the_level_of_workers_that_know_them(
    apart: World, images: Path
) -> None:
    order = ("publish", str(images), "--style-id", "62", "--json")
    told = _json(_main(apart, *order, "--parameter", "epochs=auto"))
    assert told["epochs"] == 500
    taken = apart.take(apart.queue)
    assert taken is not None
    properties, body = taken
    assert properties.headers == {"x-min-level": 1}
    assert json.loads(body)["data"]["parameters"] == {"epochs": "auto"}
    _json(_main(apart, *order, "--parameter", "epochs=7"))
    taken = apart.take(apart.queue)
    assert taken is not None and not taken[0].headers


def test_a_job_is_cancelled_by_its_id(world: World, worker: WorkerProcess) -> None:
    assert worker.exit_code is None
    message = world.envelope(style_id=63, parameters={"epochs": 1000})
    task_id = message["task_id"]
    world.publish(message)
    until(lambda: world.backend.progress(task_id))
    done = _main(world, "cancel", task_id, "--json")
    assert done.returncode == 0 and _json(done)["task_id"] == task_id
    assert world.ending(task_id)[1]["error_code"] == "CANCELLED"
    until(lambda: world.record(task_id)["delivery"] == "delivered")
    again = _main(world, "cancel", task_id)
    assert again.returncode == 2 and "has ended" in again.stderr


def test_a_job_is_cancelled_by_its_style_and_the_retrain_of_a_sold_style_is_a_warning(
    apart: World,
) -> None:
    first = apart.envelope(style_id=68)
    with apart.worker() as worker:
        apart.publish(first)
        assert apart.ending(first["task_id"])[0] == "complete"
        message = apart.envelope(style_id=68, parameters={"epochs": 1000})
        apart.publish(message)
        until(lambda: apart.backend.progress(message["task_id"]))
        live = _main(apart, "jobs", "--live", COLUMNS="80").stdout
        assert " held " in _line(live, message["task_id"])
        other = _main(apart, "cancel", "--style", "69")
        assert other.returncode == 1 and "No live job of style 69" in other.stderr
        done = _main(apart, "cancel", "--style", "68", COLUMNS="80")
        assert done.returncode == 0, done.stderr
        assert f"Style 68 has a published model (of job {first['task_id']})" in done.stderr
        assert apart.ending(message["task_id"])[1]["error_code"] == "CANCELLED"
        assert worker.stop() == 0


def test_of_several_live_jobs_of_a_style_none_is_cancelled_by_surprise(apart: World) -> None:
    orders = [apart.envelope(style_id=70) for _ in range(2)]
    for message in orders:
        _claim_and_die(apart, message)
    tasks = [message["task_id"] for message in orders]
    unsaid = _main(apart, "cancel", "--style", "70")
    assert unsaid.returncode == 2 and all(each in unsaid.stderr for each in tasks)
    assert not _cancel_files(apart)
    newest = _json(_main(apart, "cancel", "--style", "70", "--newest", "--json"))
    assert newest["cancelled"] == tasks[1:] and _cancel_files(apart) == tasks[1:]
    every = _json(_main(apart, "cancel", "--style", "70", "--all", "--json"))
    assert sorted(every["cancelled"]) == sorted(tasks) == _cancel_files(apart)


def test_a_refused_message_is_found_by_the_id_that_it_gave(apart: World) -> None:
    with apart.worker() as worker:
        apart.publish({"task_id": "refused-one", "style_id": 71, "image_urls": []})
        apart.publish({"task_id": "of-another-type", "type": "video_training"})
        until(lambda: len(_json(_main(apart, "redrive", "--json"))["messages"]) == 2)
        assert worker.stop() == 0
    shown = _main(apart, "jobs", "refused-one", COLUMNS="80")
    assert shown.returncode == 0 and "must have at least 1 entry" in shown.stdout
    (job,) = _json(_main(apart, "jobs", "of-another-type", "--json"))["jobs"]
    assert (job["state"], job["ending"]) == ("dead", "UNKNOWN_TYPE")


def test_a_job_that_was_given_up_is_sent_back_although_its_dead_letter_is_gone(
    apart: World,
) -> None:
    with apart.worker(MAX_ATTEMPTS="1", CHECKPOINT_INTERVAL="1000") as worker:
        message = apart.envelope(style_id=72, parameters={"epochs": 24})
        task_id = message["task_id"]
        apart.publish(message)
        until(lambda: log_lines(worker, "training_started"))
        for child in psutil.Process(worker.pid).children():
            if "--runs-fd" in child.cmdline():
                child.kill()
        assert apart.ending(task_id)[1]["error_code"] == "WORKER_CRASHED"
        until(lambda: apart.take(f"{apart.queue}.dead"))
        until(lambda: apart.record(task_id)["delivery"] == "delivered")
        (found,) = until(lambda: _json(_main(apart, "redrive", "--json"))["records"])
        assert found["task_id"] == task_id
        done = _main(apart, "redrive", task_id, COLUMNS="80")
        assert done.returncode == 0 and "sent back" in done.stdout, done.stdout + done.stderr
        endings = until(lambda: _two(apart, task_id))
        assert [each.path.rsplit("/", 1)[1] for each in endings] == ["failed", "complete"]
        assert worker.stop() == 0


def test_a_job_that_was_given_up_is_sent_back_trained_and_reported_again(apart: World) -> None:
    with apart.worker(MAX_ATTEMPTS="1", CHECKPOINT_INTERVAL="1000") as worker:
        message = apart.envelope(style_id=64, parameters={"epochs": 24})
        task_id = message["task_id"]
        apart.publish(message)
        until(lambda: log_lines(worker, "training_started"))
        for child in psutil.Process(worker.pid).children():
            if "--runs-fd" in child.cmdline():
                child.kill()
        kind, first = apart.ending(task_id)
        assert (kind, first["error_code"]) == ("failed", "WORKER_CRASHED")
        until(lambda: apart.record(task_id)["delivery"] == "delivered")
        dead = until(lambda: _json(_main(apart, "redrive", "--json"))["messages"])
        assert [each["task_id"] for each in dead] == [task_id]
        done = _main(apart, "redrive", task_id, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        endings = until(lambda: _two(apart, task_id))
        assert [each.path.rsplit("/", 1)[1] for each in endings] == ["failed", "complete"]
        assert endings[0].webhook_id != endings[1].webhook_id
        assert endings[1].body["sequence"] > endings[0].body["sequence"]
        until(lambda: apart.record(task_id)["delivery"] == "delivered")
        assert _json(_main(apart, "redrive", "--json"))["messages"] == []
        assert worker.stop() == 0


def test_a_worker_for_one_job_trains_it_and_ends_by_itself(apart: World) -> None:
    messages = [apart.envelope(style_id=66), apart.envelope(style_id=67)]
    for message in messages:
        apart.publish(message)
    done = _main(apart, "worker", "--once")
    assert done.returncode == 0, done.stderr
    assert apart.ending(messages[0]["task_id"])[0] == "complete"
    assert not apart.keys(apart.state, f"jobs/{messages[1]['task_id']}.json")
    assert apart.waiting(apart.queue)


def test_a_worker_for_one_job_that_finds_none_ends_after_a_while(apart: World) -> None:
    done = _main(apart, "worker", "--once", "--idle-seconds", "1")
    assert done.returncode == 0, done.stderr
    assert "worker_stopped" in done.stderr and "job_claimed" not in done.stderr


def test_an_unknown_job_is_reported_as_unknown(apart: World) -> None:
    done = _main(apart, "jobs", "nobody-knows-it", "--json")
    assert done.returncode == 1 and "no such record" in _json(done)["jobs"][0]["detail"]
    missing = _main(apart, "redrive", "nobody-knows-it")
    assert missing.returncode == 1 and "nobody-knows-it" in missing.stderr


def test_an_unreachable_broker_is_reported_in_a_sentence(apart: World, images: Path) -> None:
    done = _main(apart, "publish", str(images), "--style-id", "65", RABBITMQ_PORT="1")
    assert done.returncode == 1
    assert "RabbitMQ" in done.stderr and "Traceback" not in done.stderr
    assert not apart.keys(apart.media, "training/65/")


def test_looking_into_the_dead_queue_makes_no_queue(apart: World) -> None:
    done = _main(apart, "redrive", TRAINING_QUEUE="a-queue-that-nobody-uses")
    assert done.returncode == 0 and "empty" in done.stdout
    assert "a-queue-that-nobody-uses" not in apart.broker.ctl("list_queues", "name")


def _cancel_files(world: World) -> list[str]:
    """The ids of the jobs with a cancel file."""
    keys = world.keys(world.state, "jobs/")
    return [
        key.removeprefix("jobs/").removesuffix(".cancel") for key in keys if key.endswith(".cancel")
    ]


def _claim_and_die(world: World, message: dict[str, Any]) -> None:
    """A worker claims the job of a message, and then dies."""
    values: dict[str, Any] = {name.lower(): text for name, text in world.settings().items()}
    settings = config.load(_env_file=None, **values)
    job = messages.parse(json.dumps(message).encode(), message_id=None, kinds=settings.kinds())
    records = JobRecords(
        open_store(settings.storage.main_store()), world.state, owner="dead", lease_seconds=5
    )
    request = JobRequest(job.task_id, job.kind, job.subject, job.identity, job.understood())
    assert isinstance(records.claim(request), Claimed)


def _two(world: World, task_id: str) -> Any:
    endings = [each for each in world.backend.endings(task_id) if each.accepted]
    return endings if len(endings) == 2 else None
