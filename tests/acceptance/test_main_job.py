"""The main job: a message goes in, a model that loads everywhere comes out, the backend knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file

from sandbox.worker_process import WorkerProcess
from tests.acceptance.world import World, log_lines, until

MODEL_FILES = {
    "lora_weights.safetensors",
    "lora_weights_kohya.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "training_report.json",
    "training_report.html",
    "samples.png",
    "loss_curve.png",
}


def test_the_backends_envelope_ends_in_complete_and_an_empty_queue(
    world: World, worker: WorkerProcess
) -> None:
    message = world.envelope(style_id=1)
    world.publish(message)
    kind, ending = world.ending(message["task_id"])
    assert kind == "complete"
    assert ending["style_id"] == 1
    assert ending["model_url"] == ending["model_path"]
    assert ending["model_url"] == f"s3://{world.media}/models/style_1/lora_weights.safetensors"
    assert ending["metadata"] == {"training_epochs": 2, "lora_rank": 4, "lora_alpha": 8.0}
    assert ending["training_metric"]["epochs"] == 2
    assert ending["training_metric"]["loss"] > 0
    assert until(lambda: world.waiting(world.queue) == 0)
    assert worker.exit_code is None


def test_the_flat_dialect_ends_in_complete_too_and_the_tags_caption_its_images(
    world: World, worker: WorkerProcess
) -> None:
    assert worker.exit_code is None
    task_id = "flat-1"
    flat = {
        "style_id": 2,
        "image_urls": list(world.photographs[:4]),
        "tags": ["watercolor", "portrait"],
        "webhook_url": "https://attacker.example/collect",
        "parameters": {"epochs": 1},
    }
    world.publish(flat, message_id=task_id)
    assert world.ending(task_id)[0] == "complete"
    report = json.loads(world.read(world.media, "models/style_2/training_report.json"))
    assert [image["caption"] for image in report["pictures"]] == ["watercolor, portrait"] * 4


def test_progress_begins_with_training_rises_and_never_follows_the_ending(
    world: World, worker: WorkerProcess
) -> None:
    assert worker.exit_code is None
    message = world.envelope(style_id=3, parameters={"epochs": 8})
    world.publish(message)
    world.ending(message["task_id"])
    heard = world.backend.progress(message["task_id"])
    ending = world.backend.endings(message["task_id"])[0]
    assert heard and all(each.received_at < ending.received_at for each in heard)
    sequences = [each.body["sequence"] for each in (*heard, ending)]
    assert sequences == sorted(set(sequences)) and sequences[0] > 1_000_000
    stages = [each.body["progress"]["stage"] for each in heard]
    assert stages == sorted(stages, key=["preparing", "training", "exporting", "uploading"].index)
    for each in heard:
        progress = each.body["progress"]
        for name in ("current_epoch", "total_epochs", "progress_percent", "estimated_seconds"):
            assert isinstance(progress[name], int)
        assert progress["total_epochs"] == 8


def test_the_three_files_load_through_their_own_loaders_with_the_same_effect(
    world: World, worker: WorkerProcess
) -> None:
    assert worker.exit_code is None
    message = world.envelope(style_id=4, parameters={"learning_rate": 0.01, "epochs": 4})
    world.publish(message)
    world.ending(message["task_id"])
    folder = world.download_model(4)
    assert {path.name for path in folder.iterdir()} == MODEL_FILES

    plain = _prediction(StableDiffusionPipeline.from_pretrained(world.base_model).unet)
    by_diffusers = StableDiffusionPipeline.from_pretrained(world.base_model)
    by_diffusers.load_lora_weights(folder, weight_name="lora_weights.safetensors")
    by_kohya = StableDiffusionPipeline.from_pretrained(world.base_model)
    by_kohya.load_lora_weights(folder, weight_name="lora_weights_kohya.safetensors")
    unet = UNet2DConditionModel.from_pretrained(world.base_model, subfolder="unet")
    by_peft = PeftModel.from_pretrained(unet, folder)

    effect = _prediction(by_peft) - plain
    assert effect.abs().max() > 1e-3, "the training must show"
    tolerance = 0.02 * float(effect.abs().max())
    for model in (by_diffusers.unet, by_kohya.unet):
        assert torch.allclose(_prediction(model) - plain, effect, atol=tolerance)


def test_the_second_job_of_a_warm_worker_equals_that_of_a_fresh_one(
    world: World, apart: World, worker: WorkerProcess
) -> None:
    assert worker.exit_code is None
    on_the_warm_one = world.envelope(style_id=5)
    world.publish(on_the_warm_one)
    world.ending(on_the_warm_one["task_id"])
    warm = world.download_model(5)

    with apart.worker() as another:
        again = apart.envelope(style_id=5)
        apart.publish(again)
        apart.ending(again["task_id"])
        assert another.stop() == 0
    assert _same_weights(warm, apart.download_model(5))


def test_checkpoints_are_uploaded_and_the_files_for_resuming_are_removed_after_the_ending(
    world: World, worker: WorkerProcess
) -> None:
    message = world.envelope(style_id=6, parameters={"epochs": 6})
    world.publish(message)
    world.ending(message["task_id"])
    task_id = message["task_id"]
    uploaded = [
        line["checkpoint"]
        for line in log_lines(worker, "checkpoint_uploaded")
        if line["task_id"] == task_id
    ]
    assert uploaded[-1] == "epoch-0006"
    record = until(lambda: (found := world.record(task_id))["delivery"] == "delivered" and found)
    assert record["state"] == "ended"
    kept = world.keys(world.state, f"checkpoints/style_6/{task_id}/")
    assert kept and all(key.endswith("/lora.safetensors") for key in kept)
    assert world.keys(world.state, f"staging/{task_id}/") == []


def test_the_report_describes_the_training(world: World, worker: WorkerProcess) -> None:
    assert worker.exit_code is None
    message = world.envelope(style_id=7)
    world.publish(message)
    world.ending(message["task_id"])
    report = json.loads(world.read(world.media, "models/style_7/training_report.json"))
    assert report["task_id"] == message["task_id"]
    assert [image["source"] for image in report["pictures"]] == message["data"]["images"]
    assert {image["status"] for image in report["pictures"]} == {"used"}
    assert report["hyperparameters"]["rank"] == 4
    assert report["epochs"] == 2 and report["steps"] == 6
    assert report["versions"]["torch"] == torch.__version__
    text = json.dumps(report)
    assert str(world.folder) not in text and "/tmp" not in text.replace(str(world.base_model), "")


def test_a_missing_feature_of_the_machine_is_logged_once(worker: WorkerProcess) -> None:
    assert log_lines(worker, "checkpoint_saved")
    for event in ("no_nvidia_gpu", "training_on_cpu"):
        assert len(log_lines(worker, event)) == (not torch.cuda.is_available())


def test_no_line_of_the_log_shows_a_secret(world: World, worker: WorkerProcess) -> None:
    text = worker.log.read_text(encoding="utf-8")
    settings = world.settings()
    for name in ("INTERNAL_API_TOKEN", "WEBHOOK_SIGNING_SECRET", "AWS_SECRET_ACCESS_KEY"):
        assert settings[name] not in text


@torch.no_grad()
def _prediction(unet: Any) -> torch.Tensor:
    unet.eval()
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    prediction: torch.Tensor = unet(noisy, torch.tensor([500]), text).sample
    return prediction


def _same_weights(one: Path, other: Path) -> bool:
    name = "adapter_model.safetensors"
    ours, theirs = load_file(one / name), load_file(other / name)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_held_out_images_are_fetched_and_the_best_checkpoint_is_delivered(
    world: World, worker: WorkerProcess
) -> None:
    assert worker.exit_code is None
    message = world.envelope(
        style_id=9,
        parameters={"epochs": 4, "deliver": "best"},
        validation_images=[world.photographs[4], f"s3://{world.media}/nowhere.jpg"],
        sample_prompts=["a lighthouse"],
    )
    world.publish(message)
    kind, ending = world.ending(message["task_id"])
    assert kind == "complete", ending
    report = json.loads(world.read(world.media, "models/style_9/training_report.json"))
    assert [each["status"] for each in report["validation_pictures"]] == ["used", "left_out"]
    assert [each["epoch"] for each in report["probes"]] == [0, 2, 4]
    assert all(each["held_out"] > 0 for each in report["probes"])
    best = min(report["probes"][1:], key=lambda each: each["held_out"])["epoch"]
    assert report["best_epoch"] == report["delivered_epoch"] == best
    assert ending["report"]["delivered_epoch"] == best
