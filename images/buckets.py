"""Aspect buckets: every image keeps its shape, as closely as a frame of whole blocks allows.

A frame has no more pixels than the square of the training size, so it takes no more memory; its
sides are multiples of 64, which the UNet can halve as often as it does. Images of one frame can
share a batch.
"""

from __future__ import annotations

import dataclasses
import functools

BLOCK = 64
"""Pixels: eight of the VAE's, times the three halvings of SD1.5's UNet."""
MOST_STRETCHED = 4
"""The largest ratio of the sides of a frame; also of an image."""


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """The size that an image is scaled and cropped to.

    Attributes:
        width, height: In pixels.
    """

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"

    def keeps(self, width: int, height: int) -> float:
        """The part of an image of this size that remains after the crop to the frame."""
        shape, frame = width * self.height, height * self.width
        return min(shape, frame) / max(shape, frame)

    def enlarges(self, width: int, height: int) -> bool:
        """Whether an image of this size has fewer pixels than the frame shows."""
        return width < self.width or height < self.height


def frame_for(width: int, height: int, resolution: int) -> Frame:
    """The frame that cuts least off an image.

    Args:
        width, height: Size of the upright image, in pixels.
        resolution: The training size, a multiple of `BLOCK`.
    """
    return max(_frames(resolution), key=lambda frame: frame.keeps(width, height))


@functools.cache
def _frames(resolution: int) -> tuple[Frame, ...]:
    """The highest frame of each width, with the square first, so that it wins a tie."""
    wide = [
        Frame(width, height)
        for width in range(resolution, resolution * MOST_STRETCHED, BLOCK)
        if (height := resolution**2 // width // BLOCK * BLOCK) * MOST_STRETCHED >= width
    ]
    high = [Frame(frame.height, frame.width) for frame in wide[1:]]
    return (*wide, *high)
