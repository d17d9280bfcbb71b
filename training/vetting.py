"""Whether a file is a picture that can be trained on, judged by its content alone."""

from __future__ import annotations

import dataclasses
import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

from training.colour import UnusablePicture, to_srgb

__all__ = ["FORMATS", "UnusablePicture", "Vetted", "vet"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""What may be opened. Pillow knows more, and starts other programs for some of them."""

_SIGNATURES = (
    (b"<!doctype", "is a web page, not a picture"),
    (b"<html", "is a web page, not a picture"),
    (b"<?xml", "is a text file (XML or SVG), not a picture; export it as PNG"),
    (b"<svg", "is a drawing (SVG), not a picture; export it as PNG"),
    (b"%pdf", "is a PDF, not a picture; export it as PNG"),
    (b"{", "is a text file, not a picture"),
)
_HEIC_BRANDS = (b"heic", b"heix", b"mif1", b"hevc", b"msf1")


@dataclasses.dataclass(frozen=True, slots=True)
class Vetted:
    """A picture that can be used.

    Attributes:
        image: Upright, 8-bit sRGB.
        decoded: What the file was: format, size as stored, colour mode.
        notes: What was done to it.
        warnings: What the artist should know.
    """

    image: Image.Image
    decoded: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def vet(content: bytes, *, max_pixels: int) -> Vetted:
    """Decode a picture and bring it to upright 8-bit RGB.

    Args:
        content: The file's bytes.
        max_pixels: A header that announces more is refused before anything is decoded.

    Raises:
        UnusablePicture: Says why.
    """
    if not content:
        raise UnusablePicture("is an empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; what matters raises
        image = _open(content)
        _refuse_by_header(image, max_pixels)
        several, deep = _first_of_several(image), _deep_colour(image)
        _decode(image)
        upright, notes = _upright(image)
        rgb, more, see_through = _converted(upright)
    decoded = f"{image.format}, {image.width} x {image.height} pixels, {image.mode}"
    return Vetted(rgb, decoded, notes + deep + more, several + see_through)


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnusablePicture("announces far too many pixels to be decoded safely") from error
    except UnidentifiedImageError as error:
        raise UnusablePicture(_what_else(content)) from error
    except Exception as error:  # a damaged header surfaces as nearly any exception
        raise UnusablePicture("is damaged: its header cannot be read") from error


def _what_else(content: bytes) -> str:
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, reason in _SIGNATURES:
        if start.startswith(signature):
            return reason
    if content[4:8] == b"ftyp" and content[8:12] in _HEIC_BRANDS:
        return "is in Apple's HEIC format; export it as JPEG or PNG"
    return "is not a picture in a known format (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF)"


def _refuse_by_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnusablePicture("has no pixels")
    if width * height > max_pixels:
        raise UnusablePicture(
            f"has {width} x {height} pixels, more than the {max_pixels:,} that are allowed",
            image.size,
        )


def _first_of_several(image: Image.Image) -> tuple[str, ...]:
    """A warning where only the first picture of the file is used.

    A phone's MPO holds a second view of the photograph; all else with frames moves or has pages.
    """
    try:
        several = image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception as error:  # looking for a second one walks through the file
        raise UnusablePicture("is damaged or cut off: it cannot be decoded", image.size) from error
    return ("is animated or has several pages; only the first was used",) if several else ()


def _deep_colour(image: Image.Image) -> tuple[str, ...]:
    """A note where the decoder is about to keep 8 of 16 bits of each colour, unasked."""
    packed = [part for tile in getattr(image, "tile", ()) for part in tile[-1:]]
    raw = str(packed[0][0] if packed and isinstance(packed[0], tuple) else packed[:1])
    deep = ";16" in raw and not image.mode.startswith("I")
    return ("had 16 bits a colour, converted to 8",) if deep else ()


def _converted(
    image: Image.Image,
) -> tuple[Image.Image, tuple[str, ...], tuple[str, ...]]:
    """`to_srgb`, where whatever a rare way of storing colours raises is this picture's alone."""
    try:
        return to_srgb(image)
    except UnusablePicture:
        raise
    except MemoryError as error:
        raise UnusablePicture("is too large to be converted", image.size) from error
    except Exception as error:
        raise UnusablePicture(
            f"stores its colours in a way that cannot be read ({image.mode}); export it as PNG",
            image.size,
        ) from error


def _decode(image: Image.Image) -> None:
    try:
        image.load()
    except MemoryError as error:
        raise UnusablePicture("is too large to be decoded", image.size) from error
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise UnusablePicture("is damaged or cut off: it cannot be decoded", image.size) from error


def _upright(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Turn the picture as its EXIF data says; unreadable EXIF data does no harm."""
    try:
        orientation = image.getexif().get(0x0112, 1)
        turned = ImageOps.exif_transpose(image)
    except Exception:  # pylint: disable=broad-exception-caught  # damaged metadata, in any way
        return image, ("has damaged EXIF data, which was ignored",)
    if orientation in range(2, 9):
        return turned, ("was turned upright as its EXIF data says",)
    return image, ()
