"""A kind that is added by one file, one folder of work and one registry line, on real servers.

A copy of the product gets the kind of `tests/toy`. Its worker takes styles and toys.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox.worker_process import ROOT, WorkerProcess
from tests.acceptance.pages import Pages
from tests.acceptance.world import World, log_lines, until
from tests.toy.install import REGISTRY_LINE, copy_with_toy, differences
from tests.toy.work import CHECKPOINT_LETTERS

TEXT = b"seven letters"
KINDS = {"KINDS": "style,toy", "TOY_PAUSE_SECONDS": "0.2", "MAX_ATTEMPTS": "1"}


@pytest.fixture(name="program", scope="module")
def _program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product with the toy kind."""
    return copy_with_toy(tmp_path_factory.mktemp("with-toy"))


def test_adding_the_kind_changes_one_line_outside_its_own_files(program: Path) -> None:
    assert differences(program) == {
        *("jobs/kinds.py", "jobs/toy.py"),
        *("training/toy/__init__.py", "training/toy/work.py"),
    }
    before, after = (
        (folder / "jobs" / "kinds.py").read_text(encoding="utf-8").splitlines(keepends=True)
        for folder in (ROOT, program)
    )
    changes = [line for line in difflib.ndiff(before, after) if not line.startswith("  ")]
    assert changes == [f"+ {REGISTRY_LINE}"]


@pytest.fixture(name="worker", scope="module")
def _worker(world: World, program: Path) -> Iterator[WorkerProcess]:
    """A worker that takes both kinds."""
    with world.worker_of(program, **KINDS) as worker:
        yield worker
        assert worker.stop() == 0, worker.last_words(20)


def publish(world: World, task_id: str, text: bytes = TEXT) -> None:
    """Publish an order of the toy kind to the kind's own queue."""
    address = world.upload(f"{task_id}.txt", text)
    message = {
        "task_id": task_id,
        "type": "toy_training",
        "data": {"name": "seven", "text": address},
    }
    with world.channel() as channel:
        queue = f"{world.queue}.toy"
        channel.queue_declare(queue, durable=True)
        channel.basic_publish("", queue, json.dumps(message).encode(), mandatory=True)


def command(program: Path, world: World, *arguments: str) -> Any:
    """The JSON of one of the copy's commands."""
    done = subprocess.run(
        [sys.executable, str(program / "main.py"), *arguments, "--json"],
        env=world.settings(**KINDS) | {"PATH": os.environ["PATH"]},
        cwd=world.folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def trainer_of(worker: WorkerProcess) -> psutil.Process:
    """The worker's trainer process."""
    children = psutil.Process(worker.pid).children()
    (trainer,) = (each for each in children if "--runs-fd" in each.cmdline())
    return trainer


def started(worker: WorkerProcess, task_id: str) -> list[int]:
    """Letters that were counted before each run of a toy job."""
    return [
        line["done"] for line in log_lines(worker, "training_started") if line["task_id"] == task_id
    ]


def test_a_toy_job_between_two_styles_keeps_the_trainer_and_its_base_model(
    world: World, worker: WorkerProcess
) -> None:
    first, last = world.envelope(style_id=91), world.envelope(style_id=92)
    world.publish(first)
    assert world.ending(first["task_id"])[0] == "complete"
    trainer = trainer_of(worker)
    publish(world, "toy-1")
    kind, ending = world.ending("toy-1")
    assert (kind, ending["kind"], ending["subject"]) == ("complete", "toy", "seven")
    assert ending["letters"] == len(TEXT)
    key = "models/toy/seven/toy-1/letters.json"
    assert ending["model_url"] == f"s3://{world.media}/{key}"
    assert json.loads(world.read(world.media, key)) == {"letters": len(TEXT)}
    world.publish(last)
    assert world.ending(last["task_id"])[0] == "complete"
    assert trainer_of(worker) == trainer
    assert len(log_lines(worker, "base_model_loaded")) == 1
    reports = [request.body["progress"] for request in world.backend.progress("toy-1")]
    assert {"letter", "letters", "stage"} <= set(reports[-1])


def _job(pages: Pages, task_id: str) -> dict[str, Any] | None:
    """The job of the status page, if it is this one."""
    job: dict[str, Any] | None = pages.json("/status")["job"]
    return job if job and job["task_id"] == task_id else None


def test_a_worker_of_two_kinds_holds_one_job_and_its_status_names_it(
    world: World, worker: WorkerProcess
) -> None:
    pages = Pages(worker)
    publish(world, "toy-2", TEXT * 2)
    job = until(lambda: _job(pages, "toy-2"))
    assert (job["kind"], job["subject"]) == ("toy", "seven")
    style = world.envelope(style_id=93)
    world.publish(style)
    publish(world, "toy-3")
    for task_id in ("toy-2", "toy-3", style["task_id"]):
        assert world.ending(task_id)[0] == "complete"
    events = [
        (line["event"], line["task_id"])
        for line in log_lines(worker)
        if line["event"] in ("training_started", "job_ended")
        and line["task_id"] in ("toy-2", "toy-3", style["task_id"])
    ]
    assert [event for event, _ in events] == ["training_started", "job_ended"] * 3
    assert [task for _, task in events[::2]] == [task for _, task in events[1::2]]


def test_a_toy_job_is_listed_and_cancelled(
    program: Path, world: World, worker: WorkerProcess
) -> None:
    publish(world, "toy-4", TEXT * 30)
    until(lambda: started(worker, "toy-4"))
    (job,) = command(program, world, "jobs", "toy-4")["jobs"]
    assert (job["kind"], job["subject"], job["state"]) == ("toy", "seven", "held")
    assert command(program, world, "cancel", "toy-4")["task_id"] == "toy-4"
    kind, ending = world.ending("toy-4")
    assert (kind, ending["error_code"], ending["kind"]) == ("failed", "CANCELLED", "toy")
    until(lambda: not world.keys(world.state, "checkpoints/toy/toy-4/"))


def test_a_toy_job_that_was_given_up_is_sent_back_and_continues_at_its_checkpoint(
    program: Path, world: World, worker: WorkerProcess
) -> None:
    publish(world, "toy-5", TEXT * 4)
    until(lambda: world.keys(world.state, "jobs/toy-5.json"))
    until(lambda: world.record("toy-5")["checkpoints"])
    killed = 0
    # An attempt that made a checkpoint does not count.
    while world.record("toy-5")["state"] == "live":
        if len(started(worker, "toy-5")) > killed:
            trainer_of(worker).kill()
            killed += 1
        time.sleep(0.05)
    kind, ending = world.ending("toy-5")
    assert (kind, ending["error_code"], ending["subject"]) == ("failed", "WORKER_CRASHED", "seven")
    until(lambda: world.record("toy-5")["delivery"] == "delivered")
    (waiting,) = command(program, world, "redrive")["messages"]
    assert (waiting["task_id"], waiting["kind"], waiting["subject"]) == ("toy-5", "toy", "seven")
    (sent,) = command(program, world, "redrive", "toy-5")["messages"]
    assert sent["sent_back"] and "from checkpoint epoch-0000-step-" in sent["outcome"]
    until(lambda: len(world.backend.endings("toy-5")) == 2)
    assert world.backend.endings("toy-5")[-1].body["letters"] == 4 * len(TEXT)
    assert started(worker, "toy-5")[-1] >= CHECKPOINT_LETTERS


def test_doctor_tests_the_queue_of_the_kind(program: Path, world: World) -> None:
    findings = command(program, world, "doctor")["findings"]
    of_broker = [each for each in findings if f"{world.queue}.toy" in each["detail"]]
    assert of_broker and {each["verdict"] for each in of_broker} == {"ok"}


def test_a_worker_of_only_this_kind_needs_no_gpu_and_loads_no_base_model(
    program: Path, apart: World
) -> None:
    with apart.worker_of(program, KINDS="toy", ALLOW_CPU="false") as worker:
        publish(apart, "toy-6")
        assert apart.ending("toy-6")[0] == "complete"
        until(lambda: Pages(worker).json("/ready")["ready"])
        assert worker.stop() == 0
    assert not log_lines(worker, "base_model_loaded")
