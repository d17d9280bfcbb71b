"""Every way of storing colours, brought to 8-bit sRGB by a stated rule."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

BACKGROUND = (255, 255, 255)
"""Transparent parts are laid on white: a declared colour, not whatever the file hides there."""

_SRGB = ImageCms.createProfile("sRGB")
_NOTES = {
    "CMYK": ("was in print colours (CMYK), converted to RGB; colours may shift a little",),
    "P": ("had a colour palette, converted to full colour",),
    "L": ("is greyscale, converted to colour",),
    "LA": ("is greyscale, converted to colour",),
    "LAB": ("was in Lab colours, converted to RGB",),
    "1": ("is black and white, converted to colour",),
}


class UnusablePicture(Exception):
    """The picture cannot be used; the message says why, to follow the picture's name in a sentence.

    Attributes:
        size: Width and height where they could be read.
    """

    def __init__(self, reason: str, size: tuple[int, int] | None = None) -> None:
        super().__init__(reason)
        self.size = size


def to_srgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...], tuple[str, ...]]:
    """Bring a decoded picture to 8-bit sRGB without transparency.

    Returns:
        The picture; what was done to it; what the artist should know.

    Raises:
        UnusablePicture: It stores no colours.
    """
    if image.mode.startswith("I"):
        grey = _from_16_bit(image)
        return grey.convert("RGB"), ("was 16-bit grey, converted to 8-bit colour",), ()
    if image.mode == "F":
        raise UnusablePicture(
            "stores floating-point values; export it as an 8-bit picture", image.size
        )
    notes = _NOTES.get(image.mode, ())
    alpha = None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha, colours = rgba.getchannel("A"), rgba.convert("RGB")
    else:
        colours = image.convert("RGB") if image.mode in ("P", "1", "LAB") else image
    rgb, profile_notes = _through_profile(colours, image.info.get("icc_profile"))
    if alpha is None or alpha.getextrema()[0] == 255:
        return rgb, notes + profile_notes, ()
    canvas = Image.new("RGB", rgb.size, BACKGROUND)
    canvas.paste(rgb, mask=alpha)
    return canvas, notes + profile_notes, ("has transparent parts, which were laid on white",)


def _through_profile(
    image: Image.Image, profile: bytes | None
) -> tuple[Image.Image, tuple[str, ...]]:
    """Read the numbers as the file's own colour profile means them; without one they are sRGB."""
    plain = image.convert("RGB")
    if not profile:
        return plain, ()
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()[:60]
        converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return plain, ("has a damaged colour profile, which was ignored",)
    if converted is None or name.startswith("sRGB"):
        return plain, ()
    return converted, (f"was in the colours of the profile {name!r}, converted to sRGB",)


def _from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit by scaling; Pillow's own conversion clips all above 255 to white."""
    values = np.asarray(image)
    if image.mode == "I" and values.max() <= 255:  # 32-bit files often hold 8-bit values
        return Image.fromarray(values.clip(0, 255).astype(np.uint8))
    # 65535 / 255 is 257; whole numbers, row by row, since a scan can be large.
    scaled = np.empty(values.shape, dtype=np.uint8)
    for row, numbers in enumerate(values):
        scaled[row] = (numbers.clip(0, 65535).astype(np.uint32) + 128) // 257
    return Image.fromarray(scaled)
