"""Writers of PNG, TIFF, JPEG and ICC files that Pillow cannot be asked for."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

D50 = (0.9642, 1.0, 0.8249)
# Colorants of sRGB relative to D50, as in every sRGB profile.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    """An image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **how)
    return buffer.getvalue()


# ---- PNG -----------------------------------------------------------------------------------------

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
"""PNG's colour types."""


def chunk(name: bytes, content: bytes, *, sound: bool = True) -> bytes:
    """One chunk of a PNG."""
    checksum = zlib.crc32(name + content) ^ (0 if sound else 1)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png(
    values: NDArray[Any], colour_type: int, *, depth: int = 8, before: Sequence[bytes] = ()
) -> bytes:
    """A PNG.

    Args:
        values: [height, width] or [height, width, channels], whole numbers below 2 ^ `depth`.
        colour_type: One of PNG's.
        depth: 8 or 16.
        before: Chunks before the pixels.
    """
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    numbers = np.ascontiguousarray(values.reshape(height, -1), dtype=">u2" if depth > 8 else "u1")
    rows = b"".join(b"\0" + row.tobytes() for row in numbers)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *before,
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


def flat_png(side: int) -> bytes:
    """A square RGBA image of one colour, however large, without its pixels in memory."""
    compressor = zlib.compressobj(6)
    row = b"\0" + b"\x20\x80\xa0\xff" * side
    pixels = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, RGBA, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def iccp(profile: bytes, *, sound: bool = True) -> bytes:
    """The chunk of a colour profile."""
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile), sound=sound)


# ---- TIFF ----------------------------------------------------------------------------------------

_TYPES = {"B": 1, "H": 3, "I": 4, "7": 7}


# pylint: disable-next=too-many-locals
def tiff(pixels: bytes, size: tuple[int, int], tags: dict[int, Any], *, order: str = "<") -> bytes:
    """A TIFF of one strip.

    Args:
        pixels: As they are stored.
        size: Width and height.
        tags: Tag -> a number, several numbers, or bytes; over the usual ones.
        order: `<` or `>`.
    """
    usual = {
        256: size[0],
        257: size[1],
        258: 8,
        259: 1,
        262: 1,
        273: 8,
        277: 1,
        278: size[1],
        279: len(pixels),
    }
    entries, extra = [], bytearray()
    place = 8 + len(pixels) + (len(pixels) & 1)
    every = usual | tags
    directory = 2 + 12 * len(every) + 4
    for tag, value in sorted(every.items()):
        if isinstance(value, bytes):
            kind, count, content = 7, len(value), value
        else:
            numbers = value if isinstance(value, tuple) else (value,)
            letter = "I" if max(numbers) > 0xFFFF or tag in (273, 279, 330) else "H"
            kind, count = _TYPES[letter], len(numbers)
            content = struct.pack(f"{order}{count}{letter}", *numbers)
        if len(content) > 4:
            where = place + directory + len(extra)
            extra += content + b"\0" * (len(content) & 1)
            content = struct.pack(f"{order}I", where)
        entries.append(struct.pack(f"{order}HHI", tag, kind, count) + content.ljust(4, b"\0"))
    mark = b"II" if order == "<" else b"MM"
    return b"".join(
        (
            mark + struct.pack(f"{order}HI", 42, place),
            pixels + b"\0" * (len(pixels) & 1),
            struct.pack(f"{order}H", len(entries)),
            *entries,
            struct.pack(f"{order}I", 0),
            bytes(extra),
        )
    )


def packed_in_12_bits(values: NDArray[Any]) -> bytes:
    """Numbers below 4096, two in three bytes; rows of an even number."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    first, second = pairs[:, 0], pairs[:, 1]
    parts = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
    return parts.astype(np.uint8).tobytes()


# ---- JPEG ----------------------------------------------------------------------------------------


def jpeg_of_many_scans(scans: int, side: int = 5000) -> bytes:
    """A small progressive JPEG in which a scan without news is repeated."""
    content = encoded(Image.new("RGB", (side, side), "teal"), "JPEG", progressive=True)
    last, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    return content[:end] + content[last:end] * scans + content[end:]


# ---- ICC -----------------------------------------------------------------------------------------


# pylint: disable-next=too-many-locals
def profile(
    space: str,
    gamma: float,
    name: str,
    *,
    colorants: Sequence[Sequence[float]] = SRGB,
    padding: int = 0,
) -> bytes:
    """A profile of version 2: a matrix and a plain gamma, or a grey with one.

    Args:
        space: `RGB ` or `GRAY`.
        gamma: The exponent.
        name: Its description.
        colorants: Of red, green and blue, relative to D50.
        padding: Bytes of a private tag that nothing compresses.
    """
    text = name.encode("ascii") + b"\0"
    description = b"desc" + struct.pack(">II", 0, len(text)) + text + b"\0" * 78
    curve = b"curv" + struct.pack(">II", 0, 1) + struct.pack(">H", round(256 * gamma))
    tags = {b"desc": description, b"wtpt": _xyz(D50), b"cprt": b"text\0\0\0\0none\0"}
    if space == "GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, colour in zip(b"rgb", colorants, strict=True):
            tags[bytes([letter]) + b"XYZ"] = _xyz(colour)
            tags[bytes([letter]) + b"TRC"] = curve
    if padding:
        noise = np.random.default_rng(3).integers(0, 256, padding, dtype=np.uint8)
        tags[b"priv"] = b"data\0\0\0\0" + noise.tobytes()
    table, content = b"", b""
    place = 128 + 4 + 12 * len(tags)
    for tag, body in tags.items():
        body += b"\0" * (-len(body) % 4)
        table += struct.pack(">4sII", tag, place + len(content), len(body))
        content += body
    size = place + len(content)
    header = struct.pack(
        ">I4sI4s4s4s12s4s4sIIIQI12sI",
        *(size, b"none", 0x02400000, b"mntr", space.encode(), b"XYZ ", bytes(12), b"acsp"),
        *(b"none", 0, 0, 0, 0, 0, struct.pack(">3i", *_fixed(D50)), 0),
    ).ljust(128, b"\0")
    return header + struct.pack(">I", len(tags)) + table + content


def _xyz(colour: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *_fixed(colour))


def _fixed(numbers: Sequence[float]) -> list[int]:
    return [round(65536 * number) for number in numbers]
