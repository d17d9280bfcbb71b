"""Judges images before a training: which are used, and what the artist should know about each.

The trainer and the page judge with the same rules, so the page's account is the one that the
training will give.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from images.buckets import Frame
from images.checks import MOTIF, Looks, motif_of
from images.colour import UnusableImage
from images.decoder import Answer, Decoder
from images.decoding import Refused, Request, Taken

USED, WARNED, LEFT_OUT = "used", "warned", "left_out"
FEW_IMAGES = 10
"""By experience of users of such trainers, a style comes out weakly with fewer usable images."""
MUCH_LOST = 0.1
"""A part of the image; a crop of more is named."""
CROP = 320
"""Side in pixels of the small copy of the crop."""


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFacts:
    """The facts of one image, without its pixels; all are JSON values.

    Attributes:
        refused: The reason for which it cannot be used; empty if it can.
        width, height: In pixels, upright; 0 where they are not known.
        notes: Changes to the image.
        warnings: Warnings for the artist.
        is_grey: It has no colour.
        pixels: SHA-256 of its pixels.
        motif: Its perceptual hash in hexadecimal; empty without one.
        frame: Width and height of the image that is trained on; empty if it cannot be used.
    """

    refused: str
    width: int = 0
    height: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    is_grey: bool = False
    pixels: str = ""
    motif: str = ""
    frame: tuple[int, ...] = ()

    def looks(self) -> Looks:
        """The part that other images are compared with."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.motif), np.uint8)).astype(np.bool_)
        return Looks((), self.is_grey, self.pixels, bits if self.motif else None)


@dataclasses.dataclass(frozen=True, slots=True)
class ImageJudgement:
    """The judgement of one image.

    Attributes:
        status: `USED`, `WARNED` (used, but the artist should know something), or `LEFT_OUT`.
        reasons: In words for an artist, to follow the image's name in a sentence.
    """

    status: str
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SeenImage:
    """An image that was decoded.

    Attributes:
        facts: Its facts.
        thumbnail: A small JPEG of the whole; empty if nothing could be decoded.
        crop: A small JPEG of the part that is trained on; empty if it cannot be used.
    """

    facts: ImageFacts
    thumbnail: bytes = b""
    crop: bytes = b""


def see(paths: Sequence[Path], *, resolution: int, max_pixels: int) -> Iterator[SeenImage]:
    """Decode images in a separate process with limits of time and memory.

    Args:
        paths: Their files.
        resolution: Side of the training images in pixels.
        max_pixels: Larger images are refused.

    Raises:
        WorkerCrashed: The process cannot be started.
    """
    requests = [Request(str(path), max_pixels, resolution) for path in paths]
    with Decoder() as decoder:
        for answer in decoder.answers(requests):
            yield _seen(answer)


def judge(named: Sequence[tuple[str, ImageFacts]]) -> list[ImageJudgement]:
    """Judge images that are trained on together, in their order.

    Args:
        named: The name and the facts of each.
    """
    seen: list[tuple[str, Looks]] = []
    return [_judged(name, facts, seen) for name, facts in named]


def about_all(used: Sequence[ImageFacts]) -> list[str]:
    """Keys of warnings about the usable images as a whole: `few`, `grey`."""
    found = ["few"] if len(used) < FEW_IMAGES else []
    if used and all(facts.is_grey for facts in used):
        found.append("grey")
    return found


def compare(size: tuple[int, int], looks: Looks, seen: list[tuple[str, Looks]]) -> tuple[str, ...]:
    """Compare an image with those before it.

    Returns:
        A warning where it looks like one of them.

    Raises:
        UnusableImage: It is one of them: trained on twice, it would count twice.
    """
    for name, other in seen:
        if other.pixels == looks.pixels:
            raise UnusableImage(f"is the same image as {name}", size)
    near = [name for name, other in seen if looks.shows_the_same(other)]
    return (f"looks like another version of {near[0]}, which then counts twice",) if near else ()


def enlarged(size: tuple[int, int], frame: Frame) -> tuple[str, ...]:
    """A warning about an image that is smaller than its frame."""
    small = frame.enlarges(*size)
    return (f"is smaller than {frame} pixels; enlarging it made it soft",) if small else ()


def cropped(size: tuple[int, int], frame: Frame) -> tuple[str, ...]:
    """A note about an image that loses much at its edges."""
    lost = 1 - frame.keeps(*size)
    return (f"lost {lost:.0%} at its edges, to fit {frame} pixels",) if lost > MUCH_LOST else ()


def _judged(name: str, facts: ImageFacts, seen: list[tuple[str, Looks]]) -> ImageJudgement:
    if facts.refused:
        return ImageJudgement(LEFT_OUT, (facts.refused,))
    size, frame, looks = (facts.width, facts.height), Frame(*facts.frame), facts.looks()
    try:
        cautions = compare(size, looks, seen)
    except UnusableImage as unusable:
        return ImageJudgement(LEFT_OUT, (str(unusable),))
    seen.append((name, looks))
    cautions = facts.warnings + enlarged(size, frame) + cautions
    return ImageJudgement(
        WARNED if cautions else USED, cautions + facts.notes + cropped(size, frame)
    )


def _seen(answer: Answer) -> SeenImage:
    fact, thumbnail = answer.fact, answer.thumbnail or b""
    if isinstance(fact, Refused):
        return SeenImage(ImageFacts(fact.reason, fact.width or 0, fact.height or 0), thumbnail)
    motif = motif_of(Image.frombytes("L", (MOTIF, MOTIF), answer.motif))
    return SeenImage(
        ImageFacts(
            refused="",
            width=fact.width,
            height=fact.height,
            notes=fact.notes,
            warnings=fact.warnings + fact.looks,
            is_grey=fact.is_grey,
            pixels=fact.pixels,
            motif="" if motif is None else np.packbits(motif).tobytes().hex(),
            frame=fact.frame,
        ),
        thumbnail,
        _small(answer.pixels, fact),
    )


def _small(pixels: bytes, fact: Taken) -> bytes:
    """A small JPEG of the crop."""
    image = Image.frombytes("RGB", (fact.frame[0], fact.frame[1]), pixels)
    image.thumbnail((CROP, CROP))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()
