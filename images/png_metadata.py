"""Removes metadata from PNG files that the product does not read, so that it cannot cost the image.

A text of more than a megabyte, or a wrong checksum in a comment, makes Pillow refuse the whole
file, although neither concerns the pixels.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Iterator

from images.profiles import MOST_PROFILE_BYTES

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_TEXT_BYTES = 1 << 20
"""Of a text that is kept; Pillow refuses longer ones."""
_XMP = b"XML:com.adobe.xmp"
_RAW_EXIF = (b"Raw profile type exif", b"Raw profile type APP1")
_COLOURS = (b"iCCP", b"cICP", b"sRGB", b"gAMA", b"cHRM")
# That there are frames is of interest, the frames after the first are not.
_USED = (b"tRNS", b"eXIf", b"acTL", *_COLOURS)


@dataclasses.dataclass(frozen=True, slots=True)
class Png:
    """A PNG file without its unused metadata.

    Attributes:
        content: The file without metadata that is not used or is damaged.
        damaged: The names of used chunks that were damaged and left out.
        coding: Primaries, transfer, matrix and range of its chunk cICP; None without one.
    """

    content: bytes
    damaged: tuple[str, ...] = ()
    coding: tuple[int, ...] | None = None


def tidied(content: bytes) -> Png:
    """The file with only its pixels and the chunks that define their colours.

    The parts that the decoder judges stay as they are: chunks of the pixels, sound or not, and the
    end of a truncated file.
    """
    kept: list[memoryview] = [memoryview(SIGNATURE)]
    damaged: list[str] = []
    coding = None
    for name, chunk in _chunks(content):
        critical = not name[0] & 0x20
        if not critical and name not in _USED and not _says_how_it_lies(name, chunk):
            continue
        if not critical and not (_is_sound(chunk) and _is_bounded(name, chunk)):
            damaged.append(name.decode("ascii", "replace"))
            continue
        if name == b"cICP" and len(chunk) == 16:
            coding = tuple(chunk[8:12])
        kept.append(chunk)
    return Png(b"".join(kept), tuple(dict.fromkeys(damaged)), coding)


def _chunks(content: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Each chunk's name and its bytes, length and checksum included.

    The rest of a broken file comes as one chunk of pixels.
    """
    view, place = memoryview(content), len(SIGNATURE)
    while place < len(view):
        if place + 12 > len(view):
            yield b"IDAT", view[place:]
            return
        length, name = struct.unpack_from(">I4s", view, place)
        end = place + 12 + length
        if end > len(view) or not name.isalpha():
            yield b"IDAT", view[place:]
            return
        yield name, view[place:end]
        if name == b"IEND":
            return
        place = end


def _says_how_it_lies(name: bytes, chunk: memoryview) -> bool:
    """Whether it is a short text in which other programs keep the image's orientation."""
    if name not in (b"tEXt", b"zTXt", b"iTXt") or not _is_sound(chunk):
        return False
    keyword, _, rest = bytes(chunk[8:-4]).partition(b"\0")
    if name == b"iTXt":
        if keyword != _XMP:
            return False
        is_compressed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    else:
        if keyword not in _RAW_EXIF:
            return False
        is_compressed, text = name == b"zTXt", rest[1:] if name == b"zTXt" else rest
    return _has_at_most(text, MOST_TEXT_BYTES) if is_compressed else len(text) <= MOST_TEXT_BYTES


def _is_bounded(name: bytes, chunk: memoryview) -> bool:
    """Whether a profile is not compressed from something larger than any profile."""
    if name != b"iCCP":
        return True
    _, _, rest = bytes(chunk[8:-4]).partition(b"\0")
    return _has_at_most(rest[1:], MOST_PROFILE_BYTES)


def _has_at_most(compressed: bytes, most: int) -> bool:
    stream = zlib.decompressobj()
    try:
        stream.decompress(compressed, most)
    except zlib.error:
        return False
    return stream.eof


def _is_sound(chunk: memoryview) -> bool:
    (checksum,) = struct.unpack(">I", chunk[-4:])
    return zlib.crc32(chunk[4:-4]) == int(checksum)
