"""The decoder process: `python -m images.decoding SECONDS BYTES`.

Images come from strangers, and decoders are C libraries: one file may crash them, or keep them
busy for minutes. So they run here, with limits of time and memory for each image, and the trainer
goes on if this process dies. Requests come in as lines of JSON; out goes a line of JSON for each,
and then the bytes that it announces. It ends with its pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import AvifImagePlugin, Image, ImageOps, PngImagePlugin

from images.buckets import frame_for
from images.checks import look_at, motif_copy
from images.profiles import MOST_PROFILE_BYTES
from images.vetting import UnusableImage, Vetted, vet
from utils.events import decode, encode

THUMBNAIL = 320
"""Side of a thumbnail in pixels."""


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
        decoded: Description of the file: format, size as stored, colour mode.
        notes: Changes to the image.
        warnings: Warnings about the file, for the artist.
        looks: Warnings about the content, for the artist.
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


def main(arguments: Sequence[str]) -> None:
    """Answer requests until the pipe ends.

    Args:
        arguments: Seconds of computing time, and bytes of memory, that one image may take.
    """
    seconds, memory = (int(each) for each in arguments)
    # C libraries print what they please; the pipe is only for answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # threads reserve memory that they do not use
    PngImagePlugin.MAX_TEXT_CHUNK = MOST_PROFILE_BYTES  # the limit of profiles, too
    _limit(memory)
    answers.write(encode(Ready()))
    answers.flush()
    for line in sys.stdin.buffer:
        _allow(seconds)
        _answer(decode(line, (Request,)), answers)
        answers.flush()


def _limit(memory: int) -> None:
    """Let the process grow by so many bytes, write no file and leave no core."""
    with contextlib.suppress(OSError):  # only Linux reports the size
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _allow(seconds: int) -> None:
    """Let the kernel end this process once the next image has taken so long."""
    until = math.ceil(time.process_time() + seconds)
    with contextlib.suppress(ValueError, OSError):  # an operator's own limit may be lower
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))


def _answer(request: Request, answers: BinaryIO) -> None:
    thumbnail = b""
    try:
        content = Path(request.path).read_bytes()
        vetted = vet(content, max_pixels=request.max_pixels)
        identity = hashlib.sha256(content).hexdigest()
        del content
        thumbnail = _thumbnail(vetted.image)
        fact, *images = _taken(vetted, request.resolution, identity, len(thumbnail))
    except UnusableImage as unusable:
        width, height = unusable.size or (None, None)
        answers.write(encode(Refused(str(unusable), width, height, len(thumbnail))))
    except OSError:
        answers.write(encode(Refused("its file could not be read", thumbnail=len(thumbnail))))
    except MemoryError:
        answers.write(encode(Refused("is too large to be decoded", thumbnail=len(thumbnail))))
    except Exception as error:  # pylint: disable=broad-exception-caught  # it is the reason
        reason = f"cannot be decoded ({type(error).__name__}); export it as PNG"
        answers.write(encode(Refused(reason, thumbnail=len(thumbnail))))
    else:
        answers.write(encode(fact))
        for image in images:
            answers.write(image)
    answers.write(thumbnail)


def _taken(
    vetted: Vetted, resolution: int, identity: str, thumbnail: int
) -> tuple[Taken, bytes, bytes]:
    """The facts, the pixels of the frame, and the grey copy that shows the motif.

    Raises:
        UnusableImage: There is nothing to learn from the image.
    """
    looks = look_at(vetted.image, resolution=resolution, size=vetted.size)
    frame = frame_for(*vetted.size, resolution)
    fitted = ImageOps.fit(vetted.image, (frame.width, frame.height), Image.Resampling.LANCZOS)
    fact = Taken(
        identity=identity,
        width=vetted.size[0],
        height=vetted.size[1],
        decoded=vetted.decoded,
        notes=vetted.notes,
        warnings=vetted.warnings,
        looks=looks.warnings,
        is_grey=looks.is_grey,
        pixels=looks.pixels,
        frame=(frame.width, frame.height),
        thumbnail=thumbnail,
    )
    return fact, fitted.tobytes(), motif_copy(vetted.image).tobytes()


def _thumbnail(image: Image.Image) -> bytes:
    """A small copy without any metadata."""
    small = image.copy() if max(image.size) <= THUMBNAIL else image
    small = ImageOps.contain(small, (THUMBNAIL, THUMBNAIL)) if small is image else small
    buffer = io.BytesIO()
    Image.frombytes("RGB", small.size, small.tobytes()).save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])
