"""Images to train on: made on the spot, all different, of the kind that artists upload."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 1024


def paint(folder: Path, count: int) -> list[Path]:
    """Write so many JPEG files of 1024 x 1024 pixels, soft colour fields with some grain.

    Args:
        folder: Receives the files; created if it is missing.
        count: How many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(11)
    paths = []
    for number in range(count):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        soft = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        grain = random.normal(0, 12, (SIDE, SIDE, 1))
        pixels = np.clip(np.asarray(soft, dtype=np.float64) + grain, 0, 255).astype(np.uint8)
        path = folder / f"image-{number:02}.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        paths.append(path)
    return paths
