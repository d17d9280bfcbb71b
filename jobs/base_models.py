"""The family of a base model, by the configuration files of its diffusers folder.

Needs no torch, so that the worker and the doctor judge a folder as the trainer process does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_INDEX = "model_index.json"
PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
"""Folders of a Stable Diffusion 1.5 model that training reads."""
CONFIGS = {
    "unet": "unet/config.json",
    "text_encoder": "text_encoder/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
PREDICTIONS = ("epsilon", "v_prediction")
"""Predictions that the training loop knows."""
LATENT_CHANNELS = 4
_PIPELINES = frozenset({"StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"})
_OTHER_FAMILIES: Mapping[str, str] = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionInpaint": "an inpainting model",
    "StableDiffusionInstructPix2Pix": "an image editing model",
    "StableDiffusionUpscale": "an upscaling model",
    "LatentConsistency": "a distilled model (latent consistency)",
    "Flux2": "FLUX.2",
    "Flux": "FLUX.1",
    "ZImage": "Z-Image",
    "QwenImage": "Qwen-Image",
}
"""Beginning of a pipeline's class name -> family; the longer beginning first."""

_WIDTH_OF_SD2 = 1024
"""Numbers of a token that the cross-attention of Stable Diffusion 2 reads; 1.5 reads 768."""

Configuration = Mapping[str, Any]


def unsuitable(folder: Path) -> str | None:
    """Why the model of a folder cannot be trained as Stable Diffusion 1.5.

    Files that are missing or damaged are no evidence: another check reports them.

    Args:
        folder: A diffusers folder.

    Returns:
        The end of a sentence that begins with the model's name; None if nothing speaks against it.
    """
    pipeline = _read(folder / MODEL_INDEX).get("_class_name")
    found = {part: _read(folder / name) for part, name in CONFIGS.items()}
    return of_another_family(pipeline) or _unlike_sd15(found) or _unlike_each_other(found)


def refusal_of(setting: str) -> str | None:
    """The sentence that refuses a value of BASE_MODEL; None unless it names an unsuitable folder.

    A model of the hub is judged by the trainer process, after its files are there.
    """
    folder = Path(setting).expanduser()
    reason = unsuitable(folder) if folder.is_dir() else None
    return refusal(str(folder), reason) if reason else None


def refusal(name: str, reason: str) -> str:
    """The sentence that refuses a model.

    Args:
        name: The model's.
        reason: From `unsuitable` or `of_another_family`.
    """
    return (
        f"The base model {name} {reason}. Set BASE_MODEL to a diffusers folder, or to a model on "
        "the Hugging Face hub, of Stable Diffusion 1.5."
    )


def of_another_family(pipeline: Any) -> str | None:
    """Why the pipeline that `model_index.json` names is of another family; None if it is not.

    Args:
        pipeline: Its `_class_name`; None if it has none.
    """
    if pipeline is None or pipeline in _PIPELINES:
        return None
    known = (family for start, family in _OTHER_FAMILIES.items() if str(pipeline).startswith(start))
    family = next(known, "a model of another family")
    return f"is {family} ({MODEL_INDEX} names {str(pipeline)[:80]}), not Stable Diffusion 1.5"


def labels(unet: Configuration, scheduler: Configuration) -> dict[str, str]:
    """Header entries that name a base model in LoRA files, as other trainers write them.

    Args:
        unet: Configuration of its UNet.
        scheduler: Configuration of its scheduler.

    Returns:
        `ss_base_model_version`, `ss_v2`, `modelspec.architecture` and `modelspec.prediction_type`;
        `ss_v_parameterization` and `ss_zero_terminal_snr` only if they are true.
    """
    is_second = unet.get("cross_attention_dim") == _WIDTH_OF_SD2
    prediction = str(scheduler.get("prediction_type", "epsilon"))
    is_velocity = prediction == "v_prediction"
    model = "stable-diffusion-v1"
    if is_second:
        model = "stable-diffusion-v2-768-v" if is_velocity else "stable-diffusion-v2-512"
    entries = {
        "ss_base_model_version": f"sd_v{2 if is_second else 1}{'_v' if is_velocity else ''}",
        "ss_v2": str(is_second),
        "modelspec.architecture": f"{model}/lora",
        "modelspec.prediction_type": "v" if is_velocity else prediction,
    }
    if is_velocity:
        entries["ss_v_parameterization"] = "True"
    if scheduler.get("rescale_betas_zero_snr"):
        entries["ss_zero_terminal_snr"] = "True"
    return entries


def _unlike_sd15(found: Mapping[str, Configuration]) -> str | None:
    """The first property of a part that Stable Diffusion 1.5 does not have."""
    unet, scheduler = found["unet"], found["scheduler"]
    network = unet.get("_class_name", "UNet2DConditionModel")
    if network != "UNet2DConditionModel":
        return f"has a denoiser of the class {str(network)[:80]}, not UNet2DConditionModel"
    if unet.get("addition_embed_type") == "text_time":
        return "is Stable Diffusion XL by its unet/config.json, not Stable Diffusion 1.5"
    channels = unet.get("in_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        return (
            f"has a UNet with {channels} input channels, as inpainting and editing models have; "
            f"training needs {LATENT_CHANNELS}"
        )
    predicts = scheduler.get("prediction_type", "epsilon")
    if predicts not in PREDICTIONS:
        return f"predicts {str(predicts)[:80]!r}; training needs one of {', '.join(PREDICTIONS)}"
    return None


def _unlike_each_other(found: Mapping[str, Configuration]) -> str | None:
    """The first two parts that do not fit together."""
    unet, encoder, vae = found["unet"], found["text_encoder"], found["vae"]
    reads, writes = unet.get("cross_attention_dim"), encoder.get("hidden_size")
    if isinstance(reads, int) and isinstance(writes, int) and reads != writes:
        return (
            f"has a UNet that reads text of {reads} numbers a token, and a text encoder that "
            f"writes {writes}"
        )
    latents = vae.get("latent_channels", LATENT_CHANNELS)
    if latents != LATENT_CHANNELS:
        return f"has a VAE with {latents} latent channels; training needs {LATENT_CHANNELS}"
    return None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none in the file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
