"""Language models over the API: the message of an order, read by a worker's code, to its intake."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conversations.intake import Intake
from jobs import message as messages
from jobs.addresses import S3Location
from jobs.kinds import Claim, Fetched
from services.broker.client import connect
from tests.integration.api.world import Ground, World, running, until
from training.language.work import intake_of

BASE = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
PAIR = {
    "messages": [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hey! How are you?"},
    ]
}


@pytest.fixture(name="world")
def _world(ground: Ground) -> Any:
    with running(ground, kinds="style,llm") as world:
        yield world


def message_of(world: World) -> bytes:
    """The next message of the queue of language models."""
    connection = connect(world.settings.broker)
    try:
        channel = connection.channel()
        queue = f"{world.settings.broker.training_queue}.llm"
        return bytes(until(lambda: channel.basic_get(queue, auto_ack=True)[2]))
    finally:
        connection.close()


def taken_in(world: World, body: bytes, folder: Path) -> tuple[Any, Intake]:
    """The run that a worker makes of a message, and the intake of its files."""
    kinds = world.services.kinds
    job = messages.parse(body, message_id=None, kinds=kinds)
    kind = kinds.of(job.kind)
    fetched = []
    for index, each in enumerate(kind.inputs(job.spec)):
        assert each.location is not None
        path = folder / f"input-{index}"
        path.write_bytes(world.services.s3.read(each.location, max_bytes=2**20).body)
        fetched.append(Fetched(each, path))
    claim = Claim(task_id=job.task_id, number=1, folder=folder, resume_from=None)
    run: Any = kind.run(job.spec, fetched, claim)
    return run, intake_of(run)


def test_openais_client_orders_a_language_model_from_a_file(world: World, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{world.url}/v1", api_key=world.key)
    lines = "".join(
        json.dumps({"messages": [{"role": "user", "content": f"Number {i}?"}, PAIR["messages"][1]]})
        + "\n"
        for i in range(12)
    )
    file = client.files.create(file=("data.jsonl", io.BytesIO(lines.encode())), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        hyperparameters={"n_epochs": 2, "learning_rate_multiplier": 0.5},
        seed=7,
        extra_body={"kind": "llm", "options": {"prompts": ["Number 3?"]}},
    )
    run, intake = taken_in(world, message_of(world), tmp_path)
    assert (run.task_id, run.base_model, run.prompts) == (job.id, BASE, ("Number 3?",))
    assert (run.parameters.epochs, run.parameters.seed) == (2.0, 7)
    assert run.parameters.learning_rate == pytest.approx(1e-4)
    assert (intake.rows, intake.used) == (12, 12) and intake.held_out


def test_inline_conversations_become_a_file_that_a_worker_reads(
    world: World, tmp_path: Path
) -> None:
    order = {"org_id": "org_one", "base_model": BASE, "conversations": [PAIR], "num_epochs": 4}
    with world.client() as client:
        answer = client.post("/api/v1/training/start", json=order)
        assert answer.status_code == 200, answer.text
        training_id = answer.json()["training_id"]
        shown = client.get(f"/api/v1/training/status/{training_id}").json()
    assert shown["status"] == "queued"
    run, intake = taken_in(world, message_of(world), tmp_path)
    assert (run.task_id, run.parameters.epochs, intake.used) == (training_id, 4.0, 1)


@pytest.mark.parametrize(
    ("model", "files", "param"),
    [("someone/else", 1, '"model"'), (BASE, 2, "training_files")],
)
def test_a_base_that_is_not_allowed_and_several_files_are_refused(
    world: World, model: str, files: int, param: str
) -> None:
    ids = world.upload(files)
    body = {"kind": "llm", "model": model, "training_files": ids}
    with world.client() as client:
        answer = client.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 400
    assert param in answer.text


def test_an_evaluation_shows_what_the_training_measured(world: World) -> None:
    order = {"org_id": "org_one", "base_model": BASE, "conversations": [PAIR]}
    with world.client() as client:
        training_id = client.post("/api/v1/training/start", json=order).json()["training_id"]
        nothing = client.post("/api/v1/training/evaluate", json={"org_id": "org_one"})
        assert nothing.status_code == 404
        _complete(world, training_id, world.job(training_id)["subject"])
        answer = client.post("/api/v1/training/evaluate", json={"org_id": "org_one"})
        other = _evaluated(client, [{"prompt": "A new one?"}])
        known = _evaluated(client, [{"prompt": "Hello!"}])
    shown = answer.json()
    assert (shown["training_id"], shown["perplexity"], shown["base_perplexity"]) == (
        training_id,
        3.0,
        9.0,
    )
    assert known.json()["responses"] == [{"prompt": "Hello!", "response": "Hey!", "base": "?"}]
    assert other.status_code == 501 and "options.prompts" in other.text


def _evaluated(client: httpx.Client, prompts: list[dict[str, str]]) -> httpx.Response:
    order = {"org_id": "org_one", "test_prompts": prompts}
    return client.post("/api/v1/training/evaluate", json=order)


def _complete(world: World, task_id: str, subject: str) -> None:
    """Publish a report, and send the ending."""
    prefix = f"models/llm/{subject}/{task_id}"
    bucket = world.settings.storage.model_bucket_name
    report = {
        "evaluation": {
            "before": {"perplexity": 9.0},
            "after": {"perplexity": 3.0, "perplexity_interval": [2.5, 3.5]},
            "verdict": "Held-out perplexity fell by 67%.",
            "answers": [{"question": "Hello!", "base": "?", "tuned": "Hey!", "sampled": "Hi"}],
        }
    }
    place = S3Location(bucket, f"{prefix}/training_report.json")
    world.services.s3.write(place, json.dumps(report).encode(), "application/json")
    url = f"s3://{bucket}/{prefix}/adapter_model.safetensors"
    body = {
        "kind": "llm",
        "subject": subject,
        "task_id": task_id,
        "sequence": 1_000_002,
        "model_url": url,
        "model_path": url,
        "metadata": {"base_model": BASE},
        "training_metric": {"loss": 0.1},
    }
    answer = world.worker().send("complete", body)
    assert answer.status_code == 200, answer.text
