"""A language model that two processes train, from the message to the webhook, on real servers."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import stand_in_language_model
from sandbox.worker_process import WorkerProcess
from tests.acceptance.pages import Pages
from tests.acceptance.world import World, log_lines, until

BASE = "stand-in/tiny"


@pytest.fixture(name="worker", scope="module")
def _worker(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A worker whose trainer has two processes on the CPU."""
    folder = tmp_path_factory.mktemp("llama")
    base = stand_in_language_model.build(folder, hidden=32, layers=1, vocabulary=384)
    two = {"KINDS": "llm", "LLM_BASE_MODELS": f"{BASE}={base}", "TRAINER_PROCESSES": "2"}
    with world.worker(**two) as worker:
        yield worker


def publish(world: World, task_id: str, **parameters: Any) -> None:
    """Publish an order of a language model."""
    rows = stand_in_language_model.conversations(60)
    address = world.upload(
        f"{task_id}.jsonl", b"".join(json.dumps(r).encode() + b"\n" for r in rows)
    )
    data = {
        "subject": "guide",
        "base_model": BASE,
        "training_file": address,
        "prompts": ["Who are you?"],
        "parameters": {"rank": 4, "learning_rate": 0.005, "save_steps": 5, **parameters},
    }
    message = {"task_id": task_id, "type": "llm_training", "data": data}
    with world.channel() as channel:
        queue = f"{world.queue}.llm"
        channel.queue_declare(queue, durable=True)
        channel.basic_publish("", queue, json.dumps(message).encode(), mandatory=True)


def processes(worker: WorkerProcess) -> list[psutil.Process]:
    """The processes of a worker's trainer, process 0 first."""
    children = psutil.Process(worker.pid).children(recursive=True)
    return [each for each in children if "--runs-fd" in each.cmdline()]


def test_the_job_survives_the_death_of_a_process_and_completes(
    world: World, worker: WorkerProcess
) -> None:
    publish(world, "task-two", max_steps=150)
    until(lambda: world.keys(world.state, "checkpoints/llm/task-two/"))
    first, second = processes(worker)
    assert Pages(worker).metric("trainer_processes") == 2
    second.send_signal(signal.SIGKILL)
    kind, body = world.ending("task-two")
    assert kind == "complete", body
    assert body["metadata"]["training_steps"] == 150
    metric = body["training_metric"]
    assert metric["perplexity_after"] < metric["perplexity_before"]
    retries = log_lines(worker, "job_will_be_tried_again")
    assert len(retries) == 1
    assert "process 1 (of 0 to 1) of the trainer was killed (SIGKILL)" in retries[0]["reason"]
    resumed = [line["claim"] for line in log_lines(worker, "run_taken")]
    assert resumed == [1, 2]
    files = world.keys(world.media, "models/llm/guide/task-two/")
    assert any(Path(key).name == "adapter_model.safetensors" for key in files)
    assert not first.is_running()


def test_nothing_is_left_of_a_worker_that_is_killed(world: World, worker: WorkerProcess) -> None:
    publish(world, "task-killed", max_steps=5000)
    until(lambda: world.keys(world.state, "checkpoints/llm/task-killed/"))
    both = processes(worker)
    assert len(both) == 2
    psutil.Process(worker.pid).kill()
    gone, alive = psutil.wait_procs(both, timeout=10)
    assert len(gone) == 2 and not alive
