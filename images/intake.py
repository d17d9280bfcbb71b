"""What the decoder says of one image: facts and small images, never the file itself."""

from __future__ import annotations

import dataclasses

THUMBNAIL = 320
"""Side of a thumbnail in pixels."""
MOTIF = 32
"""Side in pixels of the grey copy that an image's motif is recognised by."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """Ask the decoder for an image.

    Attributes:
        path: Its file.
        max_pixels: Larger images are refused.
        resolution: Side of the training images in pixels.
    """

    path: str
    max_pixels: int
    resolution: int


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """The decoder has started."""


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """The image cannot be used.

    Attributes:
        reason: To follow the image's name in a sentence.
        width, height: In pixels, where they are known.
        thumbnail: Bytes of a JPEG that follow.
    """

    reason: str
    width: int | None = None
    height: int | None = None
    thumbnail: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """The image can be used.

    Attributes:
        identity: SHA-256 of the file.
        width, height: Of the image, upright, in pixels.
        decoded: What the file was.
        notes: What was done to it.
        warnings: What the artist should know of the file.
        looks: What the artist should know of what it shows.
        is_grey: It has no colour.
        pixels: SHA-256 of its pixels.
        frame: Width and height of the pixels that follow.
        thumbnail: Bytes of a JPEG that follow the pixels.
    """

    identity: str
    width: int
    height: int
    decoded: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    looks: tuple[str, ...]
    is_grey: bool
    pixels: str
    frame: tuple[int, ...]
    thumbnail: int
