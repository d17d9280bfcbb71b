"""Is a diffusers folder of Stable Diffusion whole? Looked at without torch: names and headers."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

_UNET = "diffusion_pytorch_model"
# What the trainer loads, a line each: any one of a line's files will do.
NEEDED: tuple[tuple[str, ...], ...] = (
    ("scheduler/scheduler_config.json",),
    ("tokenizer/vocab.json", "tokenizer/tokenizer.json"),
    ("text_encoder/config.json",),
    ("unet/config.json",),
    ("vae/config.json",),
    ("text_encoder/model.safetensors", "text_encoder/model.safetensors.index.json"),
    (f"unet/{_UNET}.safetensors", f"unet/{_UNET}.safetensors.index.json"),
    (f"vae/{_UNET}.safetensors", f"vae/{_UNET}.safetensors.index.json"),
)
_LONGEST_HEADER = 100 * 1024**2  # the format's own limit


def missing(names: Mapping[str, object]) -> list[str]:
    """What is needed and not among these names."""
    return [choice[0] for choice in NEEDED if not any(name in names for name in choice)]


def listing(folder: Path) -> dict[str, Path]:
    """Every file of a folder by its relative name; a link that leads nowhere is no file."""
    return {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }


def examine_folder(folder: Path) -> tuple[int, list[str]]:
    """Look at a local model.

    Returns:
        Bytes of the weights that would be loaded, and what is wrong with the folder.
    """
    names = listing(folder)
    problems = [f"{name} is missing" for name in missing(names)]
    size = 0
    for choice in NEEDED:
        if weights := next((names[name] for name in choice if name in names), None):
            for path in _files_of(weights):
                if path.suffix == ".safetensors":
                    problems += _damage(path, folder)
                    size += path.stat().st_size if path.is_file() else 0
    return size, problems


def _files_of(weights: Path) -> Iterator[Path]:
    """The file itself, or the parts that an index names."""
    if not weights.name.endswith(".index.json"):
        yield weights
        return
    try:
        parts = set(json.loads(weights.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        yield weights.with_suffix("").with_suffix("")  # reported as damaged by its name
        return
    yield from (weights.parent / str(part) for part in sorted(parts, key=str))


def _damage(path: Path, folder: Path) -> list[str]:
    """What is wrong with a safetensors file as far as its length and header tell.

    The format: eight bytes with the header's length, the header (JSON), the tensors' bytes.
    """
    name = path.relative_to(folder).as_posix()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LONGEST_HEADER):
                return [f"{name} is cut off"]
            header = json.loads(file.read(length))
            ends = [
                tensor["data_offsets"][1]
                for tensor_name, tensor in header.items()
                if tensor_name != "__metadata__"
            ]
    except (OSError, ValueError, struct.error, KeyError, AttributeError, TypeError):
        return [f"{name} cannot be read as safetensors"]
    if size < 8 + length + max(ends, default=0):
        return [f"{name} is cut off"]
    return []
