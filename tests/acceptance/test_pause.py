"""A job is paused, left alone, resumed or cancelled, on real servers and with the last release."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sandbox.backend import PROGRESS, Answer
from sandbox.photographs import photographs
from sandbox.worker_process import ROOT, WorkerProcess
from tests.acceptance.world import World, log_lines, until
from tests.integration.api.world import TOKEN, Ground, running
from tests.releases import LAST_RELEASE, extract
from utils.settings.values import derived_signing_secret

LEASE = 5.0  # of the world's workers; they sweep as often
EPOCHS = 120


def _main(world: World, *arguments: str) -> Any:
    """A command's JSON."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments, "--json"],
        env=world.settings() | {"PATH": os.environ["PATH"]},
        cwd=world.folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _state(world: World, task_id: str) -> str:
    (job,) = _main(world, "jobs", task_id)["jobs"]
    return str(job["state"])


def _begun(world: World, style_id: int) -> dict[str, Any]:
    """The message of a job that has a checkpoint, and is far from its end."""
    message = world.envelope(style_id=style_id, parameters={"epochs": EPOCHS})
    world.publish(message)
    task_id = message["task_id"]
    until(lambda: world.keys(world.state, f"jobs/{task_id}.json"))
    until(lambda: world.record(task_id)["checkpoints"])
    return message


def _is_paused(world: World, task_id: str) -> bool:
    record = world.record(task_id)
    return bool(record["hold"]["released"] and record["hold"]["quiet_seconds"] > 1e8)


def _assert_left_alone(world: World, task_id: str, seconds: float) -> None:
    claim = world.record(task_id)["hold"]["claim"]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        record = world.record(task_id)
        assert (record["state"], record["hold"]["claim"]) == ("live", claim)
        time.sleep(0.5)
    assert world.waiting(world.queue) == 0 and not world.backend.endings(task_id)


def _assert_resumes(world: World, worker: WorkerProcess, task_id: str) -> None:
    """The paused job, once resumed, ends from its last checkpoint."""
    # Read first: the worker may write another checkpoint before the command ends.
    reached = world.record(task_id)["checkpoints"][-1]["epoch"]
    _main(world, "resume", task_id)
    kind, ending = world.ending(task_id)
    assert (kind, ending["training_metric"]["epochs"]) == ("complete", EPOCHS)
    assert world.record(task_id)["attempts"] == 0
    assert log_lines(worker, "training_started")[-1]["epoch"] == reached


@pytest.mark.timeout(400)
def test_a_paused_job_waits_over_a_restart_and_a_duplicate_and_continues(apart: World) -> None:
    with apart.worker() as first:
        message = _begun(apart, 91)
        task_id = message["task_id"]
        assert _main(apart, "pause", task_id)["task_id"] == task_id
        until(lambda: _is_paused(apart, task_id))
        assert _state(apart, task_id) == "paused"
        told = [each.body["progress"]["stage"] for each in apart.backend.progress(task_id)]
        assert told[-1] == "paused"
        until(lambda: apart.waiting(apart.queue) == 0)
        other = apart.envelope(style_id=92)
        apart.publish(other)
        assert apart.ending(other["task_id"])[0] == "complete", "the worker takes the next job"
        assert first.stop() == 0
    with apart.worker() as second:
        apart.publish(message)
        until(lambda: log_lines(second, "job_paused"))
        _assert_left_alone(apart, task_id, 4 * LEASE)
        _assert_resumes(apart, second, task_id)
        assert not apart.keys(apart.state, f"jobs/{task_id}.pause")


@pytest.mark.timeout(400)
def test_the_backend_pauses_a_job_in_its_answer_and_the_job_is_cancelled_later(
    apart: World,
) -> None:
    wanted: list[str] = []
    apart.backend.answer = lambda request: (
        Answer(200, body=b'{"pause": true}')
        if request.path == PROGRESS and request.task_id in wanted
        else None
    )
    try:
        with apart.worker():
            task_id = _begun(apart, 93)["task_id"]
            wanted.append(task_id)
            until(lambda: _is_paused(apart, task_id))
            assert apart.keys(apart.state, f"jobs/{task_id}.pause")
            _main(apart, "cancel", task_id)
            assert apart.ending(task_id)[1]["error_code"] == "CANCELLED"
            until(lambda: not apart.keys(apart.state, f"jobs/{task_id}.pause"))
    finally:
        apart.backend.answer = None


@pytest.mark.timeout(400)
def test_a_paused_job_that_is_cancelled_over_the_api_is_ended_by_a_worker(
    apart: World, tmp_path: Path
) -> None:
    ground = Ground(f"sqlite:///{tmp_path / 'api.db'}", apart.s3_server, apart.broker, tmp_path)
    place = {
        "aws_storage_bucket_name": apart.media,
        "model_bucket_name": apart.media,
        "state_bucket_name": apart.state,
        "training_queue": apart.queue,
    }
    with running(ground, **place) as api:
        of_the_api = {
            "BACKEND_API_URL": api.url,
            "INTERNAL_API_TOKEN": TOKEN,
            "WEBHOOK_SIGNING_SECRET": derived_signing_secret(TOKEN),
        }
        with apart.worker(**of_the_api) as worker, api.client() as client:
            parts = [("file", (each.name, each.content)) for each in photographs()[:3]]
            files = client.post("/v1/files", files=parts).json()["data"]
            job = api.order(
                training_files=[each["id"] for each in files], parameters={"epochs": EPOCHS}
            )
            path = f"/v1/jobs/{job['id']}"
            until(lambda: client.get(f"{path}/checkpoints").json()["data"])
            client.post(f"{path}/pause").raise_for_status()
            until(lambda: api.job(job["id"])["status"] == "paused")
            assert _is_paused(apart, job["id"])
            until(lambda: apart.waiting(apart.queue) == 0)
            client.post(f"{path}/cancel").raise_for_status()
            until(lambda: api.job(job["id"])["status"] == "cancelled")
            assert apart.record(job["id"])["ending"]["code"] == "CANCELLED"
            assert worker.stop() == 0


@pytest.mark.timeout(400)
def test_the_last_release_leaves_a_paused_job_alone_and_finishes_it_later(
    apart: World, tmp_path: Path
) -> None:
    code = extract(LAST_RELEASE, tmp_path / "last-release")
    with apart.worker() as this:
        task_id = _begun(apart, 94)["task_id"]
        _main(apart, "pause", task_id)
        until(lambda: _is_paused(apart, task_id))
        # The broker of the tests takes messages back after 5 s. That release knows no pause, and
        # would train the job of a message that it gets.
        until(lambda: apart.waiting(apart.queue) == 0)
        assert this.stop() == 0
    with apart.worker_of(code) as last:
        until(lambda: log_lines(last, "consuming"))
        _assert_left_alone(apart, task_id, 6 * LEASE)
        _assert_resumes(apart, last, task_id)
        assert last.stop() == 0
