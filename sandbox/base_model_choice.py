"""What the demo trains: Stable Diffusion 1.5 where that can be, else a stand-in of its shape."""

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
    """What is trained, and how.

    Attributes:
        words: What a person is told about it, a line each.
        settings: What follows for the worker's environment, by name.
        minutes: A job that is not over by then has failed.
    """

    words: tuple[str, ...]
    settings: dict[str, str]
    minutes: float


def choose_base_model(folder: Path) -> BaseModelChoice:
    """Decide by what is here; the stand-in is written into `folder` where it is needed."""
    name = os.environ.get("BASE_MODEL") or DEFAULT
    cuda = torch.cuda.is_available()
    if cuda and _is_at_hand(name):
        gpu = torch.cuda.get_device_name(0)
        words: tuple[str, ...] = (f"base model: Stable Diffusion 1.5 itself ({name}), on {gpu}",)
        # The worker runs in another folder.
        where = str(Path(name).resolve()) if Path(name).is_dir() else name
        return BaseModelChoice(words, {"BASE_MODEL": where}, minutes=60)
    missing = f"the base model {name} is not to be had here" if cuda else "this machine has no CUDA"
    words = (
        f"base model: a tiny stand-in of Stable Diffusion 1.5's shape, because {missing}:",
        "its images will be noise; everything else is real",
    )
    transformers.utils.logging.disable_progress_bar()  # the demo has a bar of its own
    settings = {
        "BASE_MODEL": str(build_stand_in(folder)),
        "RESOLUTION": "64",
        "ALLOW_CPU": "true",
        # A second thread gains nothing on a model so small, and on a busy machine the two wait for
        # each other a hundred times as long as they compute.
        "OMP_NUM_THREADS": "1",
    }
    return BaseModelChoice(words, settings, minutes=10)


def _is_at_hand(name: str) -> bool:
    """Whether the model is a local folder, lies in the hub's cache, or can be fetched."""
    if Path(name).is_dir():
        return True
    # Weights, not a small file: an interrupted download leaves those of some parts only.
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
    except (OSError, ValueError, HTTPException):  # no such name, no such model, no way there
        return False
