"""The family of a base model, judged by the configuration files of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.base_models import CONFIGS, labels, refusal_of, unsuitable

SD15: dict[str, dict[str, Any]] = {
    "model_index.json": {"_class_name": "StableDiffusionPipeline"},
    CONFIGS["unet"]: {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "cross_attention_dim": 768,
    },
    CONFIGS["text_encoder"]: {"hidden_size": 768},
    CONFIGS["vae"]: {"latent_channels": 4},
    CONFIGS["scheduler"]: {"prediction_type": "epsilon"},
}


def written(folder: Path, **changes: dict[str, Any]) -> Path:
    """Write the configuration files of SD1.5, with changes by part."""
    for name, content in SD15.items():
        part = Path(name).stem if name == "model_index.json" else Path(name).parts[0]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | changes.get(part, {})), encoding="utf-8")
    return folder


def test_stable_diffusion_15_and_its_velocity_variant_are_suitable(tmp_path: Path) -> None:
    assert unsuitable(written(tmp_path)) is None
    assert unsuitable(written(tmp_path, scheduler={"prediction_type": "v_prediction"})) is None


@pytest.mark.parametrize(
    ("pipeline", "family"),
    [
        ("StableDiffusionXLPipeline", "is Stable Diffusion XL "),
        ("StableDiffusion3Pipeline", "is Stable Diffusion 3 "),
        ("StableDiffusionInpaintPipeline", "is an inpainting model "),
        ("FluxPipeline", "is FLUX.1 "),
        ("Flux2KleinPipeline", "is FLUX.2 "),
        ("ZImagePipeline", "is Z-Image "),
        ("QwenImagePipeline", "is Qwen-Image "),
        ("SomethingNewPipeline", "is a model of another family "),
    ],
)
def test_another_family_is_named_by_model_index(tmp_path: Path, pipeline: str, family: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    reason = unsuitable(tmp_path)
    assert reason and reason.startswith(family) and pipeline in reason


@pytest.mark.parametrize(
    ("changes", "evidence"),
    [
        ({"unet": {"addition_embed_type": "text_time"}}, "Stable Diffusion XL"),
        ({"unet": {"in_channels": 9}}, "9 input channels"),
        ({"unet": {"_class_name": "Kandinsky5Transformer3DModel"}}, "Kandinsky5"),
        ({"unet": {"cross_attention_dim": 2048}}, "reads text of 2048 numbers"),
        ({"vae": {"latent_channels": 16}}, "16 latent channels"),
        ({"scheduler": {"prediction_type": "sample"}}, "predicts 'sample'"),
    ],
)
def test_a_folder_without_a_model_index_is_judged_by_its_parts(
    tmp_path: Path, changes: dict[str, dict[str, Any]], evidence: str
) -> None:
    (written(tmp_path, **changes) / "model_index.json").unlink()
    reason = unsuitable(tmp_path)
    assert reason and evidence in reason


def test_missing_and_damaged_files_are_no_evidence(tmp_path: Path) -> None:
    assert unsuitable(tmp_path) is None
    for name in SD15:
        (written(tmp_path) / name).write_text("{")
    assert unsuitable(tmp_path) is None


def test_the_refusal_names_folder_family_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    refused = refusal_of(str(tmp_path)) or ""
    assert str(tmp_path) in refused and "Stable Diffusion XL" in refused
    assert "Set BASE_MODEL" in refused
    assert refusal_of("owner/name-of-the-hub") is None


@pytest.mark.parametrize(
    ("width", "prediction", "version", "architecture"),
    [
        (768, "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        (768, "v_prediction", "sd_v1_v", "stable-diffusion-v1/lora"),
        (1024, "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        (1024, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_labels_of_lora_files_name_the_version_and_the_prediction(
    width: int, prediction: str, version: str, architecture: str
) -> None:
    found = labels({"cross_attention_dim": width}, {"prediction_type": prediction})
    assert found["ss_base_model_version"] == version
    assert found["modelspec.architecture"] == architecture
    assert found["ss_v2"] == str(width == 1024)
    velocity = prediction == "v_prediction"
    assert found["modelspec.prediction_type"] == ("v" if velocity else "epsilon")
    assert ("ss_v_parameterization" in found) is velocity
    assert "ss_zero_terminal_snr" not in found


def test_a_rescaled_schedule_is_named_in_the_labels() -> None:
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert labels({}, scheduler)["ss_zero_terminal_snr"] == "True"
