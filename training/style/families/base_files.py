"""The base model's files: found or downloaded, loaded whole, hashed."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextModel

from jobs import base_models
from jobs.kinds import TrainerOptions
from utils.errors import BaseModelUnavailable, WrongBaseModel


def locate(options: TrainerOptions) -> tuple[Path, str]:
    """The model's local folder, downloaded where it must be, and its name in messages.

    Raises:
        BaseModelUnavailable: There is no such model on this machine or on the hub.
        WrongBaseModel: The model is of another family.
    """
    wanted = options.base_model
    path = Path(wanted).expanduser()
    if path.is_dir():
        name = path.resolve().name
        _refuse(base_models.unsuitable(path), name)
        if missing := [part for part in base_models.PARTS if not (path / part).is_dir()]:
            raise BaseModelUnavailable(
                f"The folder of the base model {name} lacks {', '.join(missing)}. Set BASE_MODEL "
                "to a whole diffusers folder of Stable Diffusion 1.5, or to a model on the Hugging "
                "Face hub."
            )
        return path.resolve(), name
    if path.is_absolute() or wanted.startswith((".", "~")) or wanted.count("/") != 1:
        raise BaseModelUnavailable(
            f"There is no base model {path.name}: the folder {path.absolute()} does not exist. Set "
            "BASE_MODEL to a diffusers folder, or to a model on the Hugging Face hub, such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5."
        )
    revision = options.base_model_revision
    try:
        # Only model_index.json, so that no other family is downloaded whole.
        with warnings.catch_warnings():
            # diffusers passes an argument that huggingface_hub calls deprecated.
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            index = DiffusionPipeline.load_config(wanted, revision=revision)
        _refuse(base_models.of_another_family(index.get("_class_name")), wanted)
        folder = DiffusionPipeline.download(
            wanted,
            revision=revision,
            use_safetensors=True,
            safety_checker=None,  # parts that are passed are not downloaded
            feature_extractor=None,
        )
    except WrongBaseModel:
        raise
    except Exception as error:
        raise BaseModelUnavailable(
            f"The base model {wanted} is not on this machine and could not be downloaded "
            f"({type(error).__name__}). Check the network, BASE_MODEL and HF_TOKEN, or put a "
            "diffusers folder on the disk and name it in BASE_MODEL."
        ) from error
    _refuse(base_models.unsuitable(Path(folder)), wanted)
    return Path(folder), wanted


def _refuse(reason: str | None, name: str) -> None:
    if reason:
        raise WrongBaseModel(base_models.refusal(name, reason))


def load_part(kind: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """One frozen part of the model.

    Raises:
        ValueError: A weight is missing. (Both libraries would fill it with random numbers.)
    """
    word = "dtype" if kind is CLIPTextModel else "torch_dtype"
    model, loaded = kind.from_pretrained(
        folder / part, use_safetensors=True, output_loading_info=True, **{word: dtype}
    )
    if missing := list(loaded["missing_keys"]) + list(loaded["mismatched_keys"]):
        raise ValueError(f"the {part} lacks {len(missing)} weights, {missing[0]} among them")
    return model.requires_grad_(False).eval()


def hash_of_weights(*folders: Path) -> str:
    """SHA-256 over the weight files of parts, in the order of their names, in hexadecimal."""
    digest = hashlib.sha256()
    for path in (each for folder in folders for each in _weights_of(folder)):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _weights_of(folder: Path) -> list[Path]:
    """The weight files of a part, without variants of the weights that were loaded."""
    start = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    found = folder.glob(f"{start}*.safetensors")
    return sorted(
        path for path in found if ".non_ema" not in path.name and ".fp16" not in path.name
    )


def first_line(error: Exception, folder: Path) -> str:
    """The first line of a foreign error, without paths of this machine."""
    text = (str(error).splitlines() or [""])[0].replace(str(folder), folder.name)
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
