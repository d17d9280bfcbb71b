"""The demo's base model: Stable Diffusion 1.5 if possible, otherwise a stand-in of its shape."""

from __future__ import annotations

import dataclasses
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache

from training.style.stand_in_model import build_stand_in

DEFAULT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
HUB_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class BaseModelChoice:
    """The base model of the demo, and the settings that follow from it.

    Attributes:
        words: Lines that describe it to the user.
        settings: Settings of the worker, by name.
        minutes: A job that takes longer has failed.
    """

    words: tuple[str, ...]
    settings: dict[str, str]
    minutes: float


def choose_base_model(folder: Path) -> BaseModelChoice:
    """Choose by this machine's equipment; if needed, the stand-in is written into `folder`."""
    name = os.environ.get("BASE_MODEL") or DEFAULT
    cuda = torch.cuda.is_available()
    if cuda and _is_at_hand(name):
        gpu = torch.cuda.get_device_name(0)
        words: tuple[str, ...] = (f"base model: Stable Diffusion 1.5 itself ({name}), on {gpu}",)
        # Absolute, because the worker runs in another folder.
        where = str(Path(name).resolve()) if Path(name).is_dir() else name
        return BaseModelChoice(words, {"BASE_MODEL": where}, minutes=60)
    missing = f"the base model {name} is not available here" if cuda else "this machine has no CUDA"
    words = (
        f"base model: a tiny stand-in of Stable Diffusion 1.5's shape, because {missing}:",
        "its images will be noise; everything else is real",
    )
    transformers.utils.logging.disable_progress_bar()  # the demo has its own progress bar
    settings = {
        "BASE_MODEL": str(build_stand_in(folder)),
        "RESOLUTION": "64",
        "ALLOW_CPU": "true",
        # A second thread does not help such a small model. On a busy machine the threads would wait
        # for each other a hundred times as long as they compute.
        "OMP_NUM_THREADS": "1",
    }
    return BaseModelChoice(words, settings, minutes=10)


def _is_at_hand(name: str) -> bool:
    """Whether the model is a local folder, is in the hub's cache, or can be downloaded."""
    if Path(name).is_dir():
        return True
    # Weights, not a small file: an interrupted download leaves the weights of only some parts.
    parts = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    suffixes = (".safetensors", ".fp16.safetensors")
    try:
        if all(
            any(isinstance(try_to_load_from_cache(name, part + suffix), str) for suffix in suffixes)
            for part in parts
        ):
            return True
        if constants.is_offline_mode():
            return False
        address = f"{constants.ENDPOINT}/api/models/{name}"
        with urllib.request.urlopen(address, timeout=HUB_SECONDS):
            return True
    except (OSError, ValueError, HTTPException):  # an invalid name, no such model, or no connection
        return False
