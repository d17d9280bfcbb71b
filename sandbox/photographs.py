"""Ten real photographs as files. scikit-image includes them, so nothing is downloaded."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import skimage.data
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Photograph:
    """One photograph as an artist would upload it.

    Attributes:
        name: File name.
        content: The file: JPEG or PNG, by the name's suffix.
        caption: A description, or None if there is none.
    """

    name: str
    content: bytes
    caption: str | None


# file name -> (scikit-image's name, caption). Colour and grey, tall and wide, 300 to 1000 pixels.
_CHOSEN: dict[str, tuple[str, str | None]] = {
    "astronaut.jpg": ("astronaut", "a portrait of an astronaut in an orange suit"),
    "cat.jpg": ("cat", "a tabby cat looks past the camera"),
    "coffee.png": ("coffee", "a cup of coffee and a spoon on a saucer"),
    "rocket.jpg": ("rocket", "a rocket on its launch pad in the evening"),
    "motorcycle.jpg": ("stereo_motorcycle", None),
    "galaxies.jpg": ("hubble_deep_field", None),
    "photographer.png": ("camera", "a photographer with his camera on a tripod"),
    "moon.png": ("moon", "craters on the moon"),
    "coins.png": ("coins", None),
    "grass.jpg": ("grass", None),
}


def photographs() -> list[Photograph]:
    """The ten photographs, encoded."""
    return [
        Photograph(name, _encode(name, source), caption)
        for name, (source, caption) in _CHOSEN.items()
    ]


def _encode(name: str, source: str) -> bytes:
    pixels = getattr(skimage.data, source)()
    if isinstance(pixels, tuple):  # the motorcycle: left eye, right eye, depth
        pixels = pixels[0]
    file = io.BytesIO()
    image = Image.fromarray(np.asarray(pixels))
    image.save(file, "JPEG" if name.endswith(".jpg") else "PNG", quality=92)
    return file.getvalue()
