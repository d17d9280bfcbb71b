"""A job from its order to its model, driven by OpenAI's own client."""

from __future__ import annotations

import io
import json
from typing import Any

import openai
import pytest

from services.broker.client import connect
from tests.integration.api.world import World, until


@pytest.fixture(name="client")
def _client(world: World) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{world.url}/v1", api_key=world.key)


def message_of(world: World) -> dict[str, Any]:
    """The next message of the training queue."""
    connection = connect(world.settings.broker)
    try:
        channel = connection.channel()

        def get() -> Any:
            method, properties, body = channel.basic_get(
                world.settings.broker.training_queue, auto_ack=True
            )
            return (properties, body) if method else None

        properties, body = until(get)
        assert properties.delivery_mode == 2
        return dict(json.loads(body)) | {"message_id": properties.message_id}
    finally:
        connection.close()


def test_openai_client_orders_follows_and_gets_the_model(
    world: World, client: openai.OpenAI
) -> None:
    file = client.files.create(file=("a.png", io.BytesIO(b"image")), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="sd15",
        training_file=file.id,
        hyperparameters={"n_epochs": 7},
        suffix="Harbour",
        metadata={"team": "art"},
    )
    assert job.status == "queued"
    message = message_of(world)
    assert message["message_id"] == message["task_id"] == job.id
    assert message["type"] == "model_training"
    assert message["data"]["parameters"] == {"epochs": 7}
    assert message["data"]["style_id"] >= 1_000_000_000
    assert message["data"]["org_id"] == "org_one"
    [image] = message["data"]["images"]
    assert image.endswith(f"orgs/org_one/files/{file.id}")

    worker = world.worker()
    values = world.job(job.id)
    assert worker.progress(values, 1_000_001, loss=0.5) == {"status": "ok"}
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    worker.progress(values, 1_000_002, current_epoch=2, loss=0.4)
    assert worker.complete(values, 1_000_003).status_code == 200

    ended = client.fine_tuning.jobs.retrieve(job.id)
    assert ended.status == "succeeded"
    assert ended.fine_tuned_model and ended.fine_tuned_model.startswith("ft:sd15:org_one:harbour:")
    assert [each.id for each in client.fine_tuning.jobs.list(metadata={"team": "art"})] == [job.id]
    assert not list(client.fine_tuning.jobs.list(metadata={"team": "music"}))
    said = [each.message for each in client.fine_tuning.jobs.list_events(job.id)]
    assert said[0] == "The job has successfully completed"
    assert said[-1] == "Job created"


def test_a_waiting_job_is_cancelled_at_once_and_its_message_never_published(
    world: World, client: openai.OpenAI
) -> None:
    jobs = [world.order() for _ in range(3)]
    until(lambda: sum(world.job(each["id"])["queue_position"] is not None for each in jobs) == 3)
    assert client.fine_tuning.jobs.cancel(jobs[2]["id"]).status == "cancelled"
    with pytest.raises(openai.ConflictError) as caught:
        client.fine_tuning.jobs.cancel(jobs[2]["id"])
    assert caught.value.code == "job_has_ended"


def test_an_ended_job_makes_room_for_the_next_of_its_organisation(world: World) -> None:
    first, second, third = (world.order() for _ in range(3))
    published = {message_of(world)["task_id"] for _ in range(2)}
    assert published == {first["id"], second["id"]}
    world.worker().failed(first, 1_000_001)
    assert message_of(world)["task_id"] == third["id"]


def test_addresses_of_s3_are_signed_with_version_4(world: World, client: openai.OpenAI) -> None:
    """Newer regions and stores refuse version 2, the default of boto3."""
    file = client.files.create(file=("a.png", io.BytesIO(b"image")), purpose="fine-tune")
    answer = world.get(f"/v1/files/{file.id}/content")
    assert "X-Amz-Signature=" in answer.headers["location"]
