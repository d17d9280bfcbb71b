"""The snippets of docs/api.md run, and so do those of the documents whose dialects are served."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from api.store.tables import JobRow
from tests.integration.api.world import Ground, World, running

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BASH = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(name="ground")
def _ground(request: pytest.FixtureRequest, tmp_path: Path) -> Ground:
    s3, broker = request.getfixturevalue("s3_server"), request.getfixturevalue("rabbitmq")
    return Ground(f"sqlite:///{tmp_path / 'api.db'}", s3, broker, tmp_path)


@contextlib.contextmanager
def working(world: World) -> Iterator[None]:
    """A stand-in for a worker that completes each job, unless it is named `hold`."""
    stop = threading.Event()

    def work() -> None:
        worker = world.worker()
        while not stop.wait(0.1):
            with world.services.database.reading() as session:
                rows = list(session.scalars(select(JobRow).where(JobRow.status == "queued")))
            for row in rows:
                if row.admitted_at is None or row.name == "hold":
                    continue
                key = f"models/style_{row.subject}/lora_weights.safetensors"
                bucket = world.settings.storage.model_bucket_name
                world.services.s3.client.put_object(Bucket=bucket, Key=key, Body=b"weights")
                job = {"id": row.id, "subject": row.subject}
                worker.progress(job, 1_000_001, loss=0.5)
                worker.complete(job, 1_000_002)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def run(command: list[str], world: World, folder: Path) -> str:
    """Run a snippet, and return its output."""
    for number in (1, 2, 3):
        (folder / f"harbour-{number}.png").write_bytes(f"image {number}".encode())
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"API": world.url, "KEY": world.key},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_the_snippets_that_are_run() -> None:
    assert (len(BASH), len(PYTHON)) == (4, 3)


def test_the_commands_of_the_page_run_one_after_the_other(ground: Ground, tmp_path: Path) -> None:
    with running(ground) as world, working(world):
        printed = run(["bash", "-euo", "pipefail", "-c", "\n".join(BASH)], world, tmp_path)
    assert "event: end" in printed
    assert (tmp_path / "lora_weights.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_the_programs_of_the_page_run(ground: Ground, tmp_path: Path, number: int) -> None:
    with running(ground, api_private_webhooks=True) as world, working(world):
        printed = run([sys.executable, "-W", "ignore", "-c", PYTHON[number]], world, tmp_path)
    if "fine_tuning.jobs.create" in PYTHON[number]:
        assert printed.startswith("succeeded ft:sd15:")
        assert "The job has successfully completed" in printed


# ---- the documents whose dialects are served, word for word but for the address ------------------

CHAT_START = """
curl -X POST http://localhost:8300/api/v1/training/start \\
  -H "Content-Type: application/json" \\
  -d '{
    "org_id": "org_123",
    "base_model": "meta-llama/Llama-2-7b-chat-hf",
    "conversations": [
      {
        "messages": [
          {"role": "user", "content": "Hello!"},
          {"role": "assistant", "content": "Hey! How are you?"}
        ],
        "platform": "discord"
      }
    ]
  }'
"""
CHAT_STATUS = "curl http://localhost:8300/api/v1/training/status/train_abc123"
CHAT_GENERATE = """
curl -X POST "http://localhost:8300/api/v1/generate?org_id=org_123" \\
  -H "Content-Type: application/json" \\
  -d '{
    "message": "Tell me a joke",
    "temperature": 0.8,
    "max_tokens": 100
  }'
"""
TRAIN_START = """
import requests

config = {
    "config": {
        "model_name": "liuhaotian/llava-v1.5-7b",
        "use_lora": True,
        "use_qlora": True,  # For 8GB GPU
        "num_epochs": 3,
        "batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 2e-4,
        "train_data_path": "./output/splits/train.jsonl",
        "val_data_path": "./output/splits/val.jsonl",
        "output_dir": "./output/checkpoints",
    },
    "experiment_name": "llava-7b-qlora-8gb",
    "tags": ["qlora", "8gb-gpu"]
}

response = requests.post("http://localhost:8000/api/train/start", json=config)
job_id = response.json()["job_id"]
print(f"Training started: {job_id}")
"""
TRAIN_FOLLOW = """
import requests
import time

job_id = "your-job-id"

while True:
    response = requests.get(f"http://localhost:8000/api/train/{job_id}/status")
    status = response.json()

    print(f"Status: {status['status']}")
    print(f"Progress: {status['progress_percentage']:.1f}%")
    print(f"Train Loss: {status['train_loss']}")

    if status['status'] in ['completed', 'failed', 'cancelled']:
        break

    time.sleep(5)
"""


@pytest.fixture(name="opened")
def _opened(ground: Ground) -> Iterator[World]:
    with running(ground, api_open="true") as world:
        yield world


@pytest.mark.parametrize(
    ("snippet", "answer"),
    [
        (CHAT_START, '"org_id":"org_123","status":"queued","progress":0.0'),
        (CHAT_STATUS, '"code":"job_not_found"'),
        (CHAT_GENERATE, '"code":"no_engine"'),
    ],
)
def test_commands_of_the_chat_service_get_the_answers_of_the_table(
    opened: World, tmp_path: Path, snippet: str, answer: str
) -> None:
    command = snippet.replace("http://localhost:8300", opened.url)
    said = run(["bash", "-c", command], opened, tmp_path)
    assert answer in said
    assert _is_in_the_table(snippet, answer)


def test_the_programs_of_the_training_api_get_the_answers_of_the_table(
    opened: World, tmp_path: Path
) -> None:
    program = TRAIN_START.replace("http://localhost:8000", opened.url)
    shown = "\nprint(response.status_code, response.text)\njob_id ="
    ran = subprocess.run(
        [sys.executable, "-c", program.replace("\njob_id =", shown)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.startswith("501") and "jobs of the kind vlm" in ran.stdout
    assert "KeyError: 'job_id'" in ran.stderr  # the program expects that its training starts
    assert _is_in_the_table(TRAIN_START, '"code":"kind_not_offered"')

    job = opened.order(key=opened.new_key("org_default"))  # that of callers without a key
    opened.worker().progress(job, 1_000_001, loss=0.5)
    opened.worker().complete(job, 1_000_002)
    follow = TRAIN_FOLLOW.replace("http://localhost:8000", opened.url)
    program = follow.replace("your-job-id", job["id"])
    printed = run([sys.executable, "-c", program], opened, tmp_path)
    assert printed.splitlines() == ["Status: completed", "Progress: 100.0%", "Train Loss: 0.5"]
    assert _is_in_the_table(TRAIN_FOLLOW, "the progress of the job")


def _is_in_the_table(snippet: str, answer: str) -> bool:
    """Whether docs/api.md promises this answer to the snippet's request."""
    found = re.search(r"localhost:8\d00(/[\w/]+)", snippet)
    assert found
    rows = [line for line in PAGE.splitlines() if f"`{found[1]}" in line and "snippet" in line]
    return any(answer in row for row in rows)


def test_an_open_server_serves_every_organisation_without_a_key(opened: World) -> None:
    job = opened.order()
    with httpx.Client(base_url=opened.url) as client:
        assert client.get(f"/api/v1/training/status/{job['id']}").json()["org_id"] == "org_one"
        listed = client.get("/api/v1/training/jobs/org_one").json()["jobs"]
        assert [each["training_id"] for each in listed] == [job["id"]]
        assert client.get("/v1/jobs").json()["data"] == []
        stopped = client.delete(f"/api/v1/training/jobs/{job['id']}")
        assert stopped.status_code == 200, stopped.text


def test_the_dialects_show_the_same_jobs(opened: World) -> None:
    job: dict[str, Any] = opened.order(name="one", tags=["a"])
    other = opened.order(name="two")
    worker = opened.worker()
    worker.progress(job, 1_000_001, loss=0.5, progress_percent=50)
    with opened.client() as client:
        status = client.get(f"/api/train/{job['id']}/status").json()
        assert (status["status"], status["train_loss"]) == ("running", 0.5)
        assert status["progress_percentage"] == 50.0
        chat = client.get(f"/api/v1/training/status/{job['id']}").json()
        assert (chat["status"], chat["progress"]) == ("training", 0.5)
        worker.complete(job, 1_000_002)
        assert client.delete(f"/api/v1/training/jobs/{job['id']}").status_code == 400
        listed = client.get("/api/experiments", params={"tag": "a"}).json()["experiments"]
        assert [each["experiment_id"] for each in listed] == [job["id"]]
        assert client.get("/api/experiments/").status_code == 200
        table = client.post(
            "/api/experiments/compare", json={"experiment_ids": [job["id"], other["id"]]}
        ).json()
        assert table["best_experiment_id"] == job["id"]
        assert client.post(f"/api/train/{other['id']}/cancel").json()["success"] is True
        assert client.get("/api/train/jobs?status=completed").json()["total"] == 1
        assert client.get("/api/export/list").json() == {"exports": [], "total": 0}
        refused = client.post("/api/data/validate", json={"data_path": "/srv/data"}).json()
        assert refused["code"] == "path_not_accepted"
        assert client.delete(f"/api/experiments/{job['id']}").json()["success"] is True
        assert client.get(f"/api/experiments/{job['id']}").status_code == 404
