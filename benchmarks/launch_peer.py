"""Run another trainer's script on a machine without torchvision: `launch_peer.py SCRIPT ARGUMENTS`.

torchvision has no part in a step but its transforms of images. If it is not installed, a module
of that name offers the few that diffusers' script uses, by Pillow. This file imports nothing of the
project, because it runs with the interpreter of the other trainer.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

Transform = Callable[[Any], Any]


class InterpolationMode(enum.Enum):
    """torchvision's names of Pillow's filters."""

    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    LANCZOS = Image.Resampling.LANCZOS


def compose(steps: Sequence[Transform]) -> Transform:
    """One after the other."""

    def composed(image: Any) -> Any:
        for step in steps:
            image = step(image)
        return image

    return composed


def resize(size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> Transform:
    """The shorter side becomes `size` pixels."""

    def resized(image: Image.Image) -> Image.Image:
        scale = size / min(image.size)
        wanted = (round(image.width * scale), round(image.height * scale))
        return image.resize(wanted, interpolation.value)

    return resized


def crop(size: int) -> Transform:
    """The middle, `size` pixels square; the benchmark's images are square, so none is moved."""
    return lambda image: ImageOps.fit(image, (size, size))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """[3, h, w] from 0 to 1."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def normalize(mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Subtract and divide."""
    return lambda tensor: (tensor - mean[0]) / std[0]


def without_torchvision() -> None:
    """Offer the stand-in as `torchvision`, after the libraries that look for the real one."""
    # pylint: disable=import-outside-toplevel
    import diffusers
    import transformers

    # Both remember that there is none.
    transformers.utils.import_utils.is_torchvision_available()
    assert diffusers.__version__
    package, transforms = types.ModuleType("torchvision"), types.ModuleType(
        "torchvision.transforms"
    )
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    package.__dict__.update(transforms=transforms, __version__="0", __path__=[])
    transforms.__dict__.update(
        InterpolationMode=InterpolationMode,
        Compose=compose,
        Resize=resize,
        CenterCrop=crop,
        RandomCrop=crop,
        RandomHorizontalFlip=lambda p=0.5: ImageOps.mirror,
        Lambda=lambda function: function,
        ToTensor=lambda: to_tensor,
        Normalize=normalize,
    )
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


if __name__ == "__main__":
    del sys.argv[0]
    if importlib.util.find_spec("torchvision") is None:
        without_torchvision()
    runpy.run_path(sys.argv[0], run_name="__main__")
