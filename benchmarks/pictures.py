"""Pictures to train on: made on the spot, all different, as large as photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def paint(folder: Path, count: int, side: int) -> list[Path]:
    """Write so many square pictures of soft colour fields with some grain.

    Args:
        folder: Where; made if need be.
        count: How many.
        side: In pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(11)
    paths = []
    for number in range(count):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        soft = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        grain = random.normal(0, 12, (side, side, 3))
        pixels = np.clip(np.asarray(soft, dtype=np.float64) + grain, 0, 255).astype(np.uint8)
        path = folder / f"picture-{number:02}.png"
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths
