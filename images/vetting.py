"""Whether a file is an image that can be trained on, judged only by its content."""

from __future__ import annotations

import dataclasses
import io
import math
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

from images import png_metadata
from images.colour import Stored, UnusableImage, to_srgb
from images.containers import RAW, refuse_previews, stored_in

__all__ = ["FORMATS", "UnusableImage", "Vetted", "vet"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Formats that may be opened. Pillow knows more, and starts other programs for some of them."""
MOST_DECODED_BYTES = 512 * 1024**2
"""Memory that the pixels of one image may take in the decoder."""
LARGE = 32_000_000
"""Pixels. A larger image is made smaller while it is read: no more than that is trained on."""

_SIGNATURES = (
    (b"<!doctype", "is a web page, not an image"),
    (b"<html", "is a web page, not an image"),
    (b"<?xml", "is a text file (XML or SVG), not an image; export it as PNG"),
    (b"<svg", "is a drawing (SVG), not an image; export it as PNG"),
    (b"%pdf", "is a PDF, not an image; export it as PNG"),
    (b"{", "is a text file, not an image"),
)
_RAW_SIGNATURES = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM")
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIC_BRANDS = (b"heic", b"heix", b"mif1", b"hevc", b"msf1")
_GZIP = b"\x1f\x8b"
# Bytes that Pillow takes for a pixel of each mode; four for all others.
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
_ORIENTATION = 0x0112


@dataclasses.dataclass(frozen=True, slots=True)
class Vetted:
    """An image that can be used.

    Attributes:
        image: Upright, 8-bit sRGB; smaller than the file's image if that is larger than `LARGE`.
        decoded: Description of the file: format, size as stored, colour mode.
        notes: Changes to the image.
        warnings: Warnings for the artist.
        size: Of the file's image, upright.
    """

    image: Image.Image
    decoded: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)


def vet(content: bytes, *, max_pixels: int) -> Vetted:
    """Decode an image and bring it to upright 8-bit RGB.

    Args:
        content: The file's bytes.
        max_pixels: A header that announces more is refused before anything is decoded.

    Raises:
        UnusableImage: It cannot be used. The message is the reason.
    """
    if not content:
        raise UnusableImage("is an empty file")
    png = png_metadata.Png(content)
    if content.startswith(png_metadata.SIGNATURE):
        png = png_metadata.tidied(content)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow's warnings about odd metadata; relevant problems raise errors
        image = _open(png.content)
        _refuse_by_header(image, max_pixels)
        refuse_previews(image, content)
        return _brought_to_rgb(image, png)


def _brought_to_rgb(image: Image.Image, png: png_metadata.Png) -> Vetted:
    size = image.size
    several = _first_of_several(image)
    decoded = f"{image.format}, {size[0]} x {size[1]} pixels, {image.mode}"
    stored, notes = _stored(image, png)
    reduced_by = _shrunk(image)
    _decode(image, size)
    orientation, exif_notes = _orientation(image)
    rgb, more, see_through = _converted(image, stored, reduced_by, size)
    upright = _upright(rgb, orientation)
    if orientation > 4:
        size = size[::-1]
    return Vetted(upright, decoded, exif_notes + notes + more, several + see_through, size)


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnusableImage(
            "has far too many pixels to be decoded safely; export it smaller"
        ) from error
    except UnidentifiedImageError as error:
        raise UnusableImage(_what_else(content)) from error
    except Exception as error:  # a damaged header surfaces as nearly any exception
        raise UnusableImage("is damaged: its header cannot be read") from error


def _what_else(content: bytes) -> str:
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, reason in _SIGNATURES:
        if start.startswith(signature):
            return reason
    if content.startswith(_RAW_SIGNATURES) or content[4:12] == b"ftypcrx ":
        return RAW
    if content.startswith(_TIFF_SIGNATURES):
        return (
            "is a damaged TIFF, or stores its pixels in a way that cannot be read; export it as an "
            "8-bit PNG"
        )
    if content.startswith(_GZIP):
        return "is compressed as a whole (gzip); upload the image itself"
    if content[4:8] == b"ftyp" and content[8:12] in _HEIC_BRANDS:
        return "is in Apple's HEIC format; export it as JPEG or PNG"
    return "is not an image in a known format (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF)"


def _refuse_by_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnusableImage("has no pixels")
    if width * height > max_pixels:
        raise UnusableImage(
            f"has {width} x {height} pixels, more than the {max_pixels:,} that are allowed; "
            "export it smaller",
            image.size,
        )
    needed = width * height * _BYTES.get(image.mode, 4)
    if needed > MOST_DECODED_BYTES:
        raise UnusableImage(
            f"would take {needed / 1024**2:,.0f} MiB of memory to decode, more than the "
            f"{MOST_DECODED_BYTES / 1024**2:,.0f} MiB that are allowed; export it smaller",
            image.size,
        )


def _first_of_several(image: Image.Image) -> tuple[str, ...]:
    """A warning if only the first image of the file is used.

    An MPO file of a phone has a second view of the photograph; other files with frames are animated
    or have pages.
    """
    try:
        several = image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception as error:  # looking for a second one walks through the file
        raise UnusableImage(
            "is damaged or cut off: it cannot be decoded; export it again", image.size
        ) from error
    return ("is animated or has several pages; only the first was used",) if several else ()


def _stored(image: Image.Image, png: png_metadata.Png) -> tuple[Stored, tuple[str, ...]]:
    """The rule for its colours, with notes about ignored metadata."""
    try:
        stored, notes = stored_in(image, png.coding, png.content)
    except UnusableImage:
        raise
    except Exception as error:  # tags may hold anything
        raise UnusableImage("is damaged: its header cannot be read", image.size) from error
    if png.damaged:
        notes += (f"has damaged metadata ({', '.join(png.damaged)}), which was ignored",)
    if stored.is_deep and not stored.levels:
        notes += ("had 16 bits a colour, converted to 8",)
    return stored, notes


def _shrunk(image: Image.Image) -> int:
    """The factor by which a large image is reduced on each side; a JPEG is decoded reduced."""
    factor = math.ceil(math.sqrt(image.width * image.height / LARGE))
    if factor > 1 and image.format in ("JPEG", "MPO"):
        image.draft(image.mode, (image.width // 2, image.height // 2))
        return 1 if image.width * image.height <= LARGE else 2
    return factor


def _converted(
    image: Image.Image, stored: Stored, reduced_by: int, size: tuple[int, int]
) -> tuple[Image.Image, tuple[str, ...], tuple[str, ...]]:
    """`to_srgb`. Any error of a rare way to store colours makes only this image unusable."""
    try:
        return to_srgb(image, stored, reduced_by=reduced_by)
    except UnusableImage:
        raise
    except MemoryError as error:
        raise UnusableImage("is too large to be converted; export it smaller", size) from error
    except Exception as error:
        raise UnusableImage(
            f"stores its colours in a way that cannot be read ({image.mode}); export it as PNG",
            size,
        ) from error


def _decode(image: Image.Image, size: tuple[int, int]) -> None:
    try:
        image.load()
    except MemoryError as error:
        raise UnusableImage("is too large to be decoded; export it smaller", size) from error
    except Exception as error:  # decoders raise nearly anything on damaged data
        if "memory" in str(error):  # the message of Pillow's decoders
            raise UnusableImage("is too large to be decoded; export it smaller", size) from error
        raise UnusableImage(
            "is damaged or cut off: it cannot be decoded; export it again", size
        ) from error


def _orientation(image: Image.Image) -> tuple[int, tuple[str, ...]]:
    """The orientation in the EXIF data, which is ignored if it cannot be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # pylint: disable=broad-exception-caught  # damaged metadata, in any way
        return 1, ("has damaged EXIF data, which was ignored",)
    if isinstance(orientation, int) and 2 <= orientation <= 8:
        return orientation, ("was turned upright by its EXIF data",)
    return 1, ()


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    image.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(image)
