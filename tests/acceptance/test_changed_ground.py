"""Images, base model or format change before a job resumes: it resumes, or starts again."""

from __future__ import annotations

from sandbox.photographs import photographs
from tests.acceptance.world import World, log_lines, until


def test_a_job_whose_images_changed_meanwhile_is_trained_from_the_beginning(apart: World) -> None:
    """The same happens after a change of the base model, or of the checkpoints' format."""
    message = apart.envelope(style_id=81, parameters={"epochs": 12})
    task_id = message["task_id"]
    with apart.worker() as first:
        apart.publish(message)
        until(lambda: apart.keys(apart.state, f"jobs/{task_id}.json"))
        until(lambda: apart.record(task_id)["checkpoints"])
        assert first.stop() == 0
    name = message["data"]["images"][0].rsplit("/", 1)[1]
    apart.upload(name, photographs()[5].content)
    with apart.worker() as second:
        kind, ending = apart.ending(task_id)
        assert (kind, ending.get("error_message")) == ("complete", None)
        assert ending["training_metric"]["epochs"] == 12
        reasons = [each["reason"] for each in log_lines(second, "checkpoint_not_continued")]
        assert len(reasons) == 1 and "images" in reasons[0]
        assert [each["epoch"] for each in log_lines(second, "training_started")] == [0]
        assert second.stop() == 0
    models = apart.download_model(81)
    assert (models / "lora_weights.safetensors").exists()
