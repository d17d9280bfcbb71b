"""Finds samples that repeat a training image almost unchanged.

Both images are reduced to 32 x 32 grey values, which are compared by their correlation: 1 for the
same composition in any brightness and contrast, about 0 for unrelated images. This finds a
repeated composition. It does not find a repeated detail, or a mirrored or cropped copy.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SIDE = 32
COPY = 0.9
"""From this likeness on, a sample counts as a copy."""
LEAST_GAIN = 0.1
"""A copy is so much more like the image than the base model's sample is: a prompt for a clear sky
makes similar images without any training."""


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """A training image that a sample repeats.

    Attributes:
        name: The image's name.
        likeness: Of the sample with the LoRA to it.
        before: Of the base model's sample to it.
    """

    name: str
    likeness: float
    before: float


def copies(
    before: Sequence[bytes], after: Sequence[bytes], images: Sequence[tuple[str, bytes]]
) -> list[Copy | None]:
    """The image that each sample repeats, or None.

    Args:
        before: The base model's samples, as image files.
        after: Those with the LoRA, of the same prompts and seeds.
        images: The training images: the name, which several may have, and the image file.
    """
    known = [(name, pattern(content)) for name, content in images]
    return [_copy(one, other, known) for one, other in zip(before, after, strict=True)]


def pattern(content: bytes) -> NDArray[np.float64]:
    """The grey values of an image file's middle square, with mean 0 and length 1.

    Returns:
        A vector of `SIDE` * `SIDE` values; all 0 for an image of one grey.

    Raises:
        OSError: The content is no JPEG or PNG file.
    """
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        small = ImageOps.fit(image.convert("L"), (SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float64).ravel()
    values -= values.mean()
    length = float(np.linalg.norm(values))
    return values / length if length > SIDE else np.zeros_like(values)


def _copy(
    before: bytes, after: bytes, known: Sequence[tuple[str, NDArray[np.float64]]]
) -> Copy | None:
    one, other = pattern(before), pattern(after)
    found = [Copy(name, float(other @ each), float(one @ each)) for name, each in known]
    alike = [copy for copy in found if copy.likeness >= max(COPY, copy.before + LEAST_GAIN)]
    return max(alike, key=lambda copy: copy.likeness, default=None)
