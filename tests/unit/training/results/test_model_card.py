"""The metadata of a model file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors import safe_open

from jobs.layout import KOHYA_WEIGHTS
from tests.unit.training.conftest import MakeRun
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from training.style.results import export
from training.style.results.lora_formats import MOST_TAGS, model_card, tag_counts
from training.style.trainer import LoRATrainer


def test_the_file_names_its_origin_and_its_trigger_word(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(epochs=1, trigger_word="inkstyle")
    captions = ("ink, harbour", "ink,  a  boat ", "바다, ink")
    run = dataclasses.replace(
        run,
        images=tuple(
            dataclasses.replace(image, caption=caption)
            for image, caption in zip(run.images, captions, strict=True)
        ),
    )
    data = prepare(run, base)
    result = LoRATrainer(run, base, data).train()
    card = model_card(run, base, data, result)
    export.export(base, run.parameters, tmp_path, metadata=card)
    with safe_open(tmp_path / KOHYA_WEIGHTS, framework="pt") as opened:
        header = opened.metadata()
    assert json.loads(header["ss_tag_frequency"]) == {
        "training": {"ink": 3, "inkstyle": 3, "a boat": 1, "harbour": 1, "바다": 1}
    }
    expected = {
        "task_id": "task-1",
        "style_id": "10",
        "ss_steps": "3",
        "ss_epoch": "1",
        "ss_num_train_images": "3",
        "ss_new_sd_model_hash": base.hash,
        "ss_base_model_version": "sd_v1",
        "modelspec.title": "Style 10",
        "modelspec.tags": "ink, inkstyle, a boat, harbour, 바다",
        "modelspec.trigger_phrase": "inkstyle",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }
    assert expected.items() <= header.items()


def test_no_caption_makes_the_header_swell() -> None:
    counts = tag_counts([", ".join(f"tag {n} {'x' * 5000}" for n in range(1000)), ",,  ,"])
    assert len(counts) == MOST_TAGS and max(map(len, counts)) == 200
    assert not tag_counts(["", " , "])
