"""Checks of a decoded image: content, duplicates and sharpness, measured on small copies.

The limits were set on photographs: intact ones, and the same ones blurred step by step;
`tests/unit/images/test_checks.py` tests them on these.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from images.buckets import MOST_STRETCHED
from images.colour import UnusableImage

log = logging.getLogger(__name__)

LEAST_PART = 4
"""An image whose shorter side is less than this part of the training size shows blocks."""
ONE_COLOUR = 8
"""A range of values, of 255, that looks like one colour."""
NEARLY_ALL = 0.98
LEAST_SHARPNESS = 8.0
"""Variance of the Laplacian in the sharpest parts of a copy 512 pixels wide: photographs have 180
and more; blurred by 1 % of their width, less than 6."""
GREY = 2.0
"""Mean difference of the colour channels, of 255, below which an image has no colour."""
MOTIF = 32
"""Side in pixels of the grey copy by which an image's motif is recognised."""
SAME_MOTIF = 4
"""Bits of 64 in which the perceptual hashes of two copies of one image differ at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class Looks:
    """The properties of one image's content.

    Attributes:
        warnings: Warnings for the artist, to follow the image's name in a sentence.
        is_grey: It has no colour.
        pixels: SHA-256 of its pixels: the same image in another file has the same.
        motif: Its perceptual hash; None without the library, or if none was made.
    """

    warnings: tuple[str, ...]
    is_grey: bool
    pixels: str
    motif: NDArray[np.bool_] | None

    def shows_the_same(self, other: Looks) -> bool:
        """Whether both look like copies of one image: resized, recompressed, touched up."""
        if self.motif is None or other.motif is None:
            return False
        return int((self.motif != other.motif).sum()) <= SAME_MOTIF


def look_at(image: Image.Image, *, resolution: int, size: tuple[int, int] | None = None) -> Looks:
    """Judge an image by its content; `motif_of` computes its motif.

    Args:
        image: Upright, RGB.
        resolution: Side of the training images in pixels.
        size: Size of the original that `image` is a smaller copy of.

    Raises:
        UnusableImage: There is nothing to learn from it. The message is the reason.
    """
    width, height = size or image.size
    least = max(8, resolution // LEAST_PART)
    if min(width, height) < least:
        raise UnusableImage(
            f"is too small ({width} x {height} pixels; at least {least} are needed on each side)",
            (width, height),
        )
    if max(width, height) > MOST_STRETCHED * min(width, height):
        raise UnusableImage(
            f"is too long and narrow ({width} x {height} pixels); cut a part out of it",
            (width, height),
        )
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX)).astype(np.int16)
    if int((small.max(axis=(0, 1)) - small.min(axis=(0, 1))).max()) <= ONE_COLOUR:
        raise UnusableImage("shows nothing: it is a single colour", (width, height))
    warnings = []
    away = np.abs(small - np.median(small, axis=(0, 1))).max(axis=2)
    if float((away <= ONE_COLOUR).mean()) >= NEARLY_ALL:
        warnings.append("is nearly empty: almost all of it is one colour")
    elif _sharpness(image) < LEAST_SHARPNESS:
        warnings.append("is blurred all over; the style will come out soft")
    channels = np.sort(small, axis=2)
    return Looks(
        warnings=tuple(warnings),
        is_grey=float((channels[..., 2] - channels[..., 0]).mean()) < GREY,
        pixels=hashlib.sha256(f"{width}x{height}".encode() + image.tobytes()).hexdigest(),
        motif=None,
    )


def motif_copy(image: Image.Image) -> Image.Image:
    """The small grey copy that shows an image's motif."""
    return image.convert("L").resize((MOTIF, MOTIF), Image.Resampling.LANCZOS)


def _sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian in the sharpest twentieth of the image's parts.

    A sharp subject before a soft background is a sharp image.
    """
    grey = image.convert("L")
    grey.thumbnail((512, 512), Image.Resampling.LANCZOS)
    values = np.asarray(grey).astype(np.float32)
    edges = (
        4 * values[1:-1, 1:-1]
        - values[:-2, 1:-1]
        - values[2:, 1:-1]
        - values[1:-1, :-2]
        - values[1:-1, 2:]
    )
    side = min(64, *edges.shape)
    parts = [
        float(edges[top : top + side, left : left + side].var())
        for top in range(0, edges.shape[0] - side + 1, side)
        for left in range(0, edges.shape[1] - side + 1, side)
    ]
    return float(np.percentile(parts, 95))


def motif_of(copy: Image.Image) -> NDArray[np.bool_] | None:
    """The perceptual hash of an image.

    Args:
        copy: From `motif_copy`.
    """
    try:
        import imagehash  # pylint: disable=import-outside-toplevel  # training alone does without
    except ImportError:
        log.info("near_duplicates_not_looked_for", extra={"reason": "ImageHash is not installed"})
        return None
    found: NDArray[np.bool_] = imagehash.phash(copy).hash.reshape(-1)
    return found
