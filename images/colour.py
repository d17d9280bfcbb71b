"""Converts every way of storing colours to 8-bit sRGB by a defined rule.

The conversion is chosen once, from the image's mode and profile. The pixels are then converted in
strips, so that a large image is never in memory twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from PIL import Image

from images.profiles import Profile

BACKGROUND = (255, 255, 255)
"""Transparent parts are laid on white: a fixed colour, not the hidden one."""
STRIP_PIXELS = 1024 * 1024
"""Pixels that are converted at a time."""

_NOTES = {
    "CMYK": ("was in print colours (CMYK), converted to RGB; colours may shift a little",),
    "P": ("had a colour palette, converted to full colour",),
    "PA": ("had a colour palette, converted to full colour",),
    "L": ("is greyscale, converted to colour",),
    "LA": ("is greyscale, converted to colour",),
    "La": ("is greyscale, converted to colour",),
    "LAB": ("was in Lab colours, converted to RGB",),
    "1": ("is black and white, converted to colour",),
}
_GREY = ("1", "L", "LA", "La")


class UnusableImage(Exception):
    """The image cannot be used. The message follows the image's name in a sentence.

    Attributes:
        size: Width and height, if they could be read.
    """

    def __init__(self, reason: str, size: tuple[int, int] | None = None) -> None:
        super().__init__(reason)
        self.size = size


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """The rule for a file's colours, in addition to the work of the decoder.

    Attributes:
        levels: The 8-bit level of each of 65,536 values of deep greys; None if it has none.
        is_deep: The decoder keeps 8 of 16 bits.
        is_grey: Its pixels are greys, even if they are decoded to another mode.
        profile: The colour space of the numbers; None for sRGB.
    """

    levels: tuple[int, ...] | None = None
    is_deep: bool = False
    is_grey: bool = False
    profile: Profile | None = None


def to_srgb(
    image: Image.Image, stored: Stored = Stored(), *, reduced_by: int = 1
) -> tuple[Image.Image, tuple[str, ...], tuple[str, ...]]:
    """Bring a decoded image to 8-bit sRGB without transparency.

    Args:
        image: As decoded.
        stored: How the file stores its colours.
        reduced_by: Pixels of the image on each side of one of the result's.

    Returns:
        The image, the changes to it, and warnings for the artist.

    Raises:
        UnusableImage: Its colours cannot be read with certainty.
    """
    profile, notes = _fitting(image, stored)
    convert = _converter(image, stored, profile)
    width, height = -(-image.width // reduced_by), -(-image.height // reduced_by)
    result = Image.new("RGB", (width, height))
    rows = max(1, STRIP_PIXELS // max(1, image.width * reduced_by)) * reduced_by
    see_through = False
    for top in range(0, image.height, rows):
        rgb, alpha = convert(image.crop((0, top, image.width, min(image.height, top + rows))))
        if alpha is not None and alpha.getextrema() != (255, 255):
            see_through = True
            rgb = _on_background(rgb, alpha)
        result.paste(rgb.reduce(reduced_by) if reduced_by > 1 else rgb, (0, top // reduced_by))
    warning = ("has transparent parts, which were laid on white",) if see_through else ()
    return result, notes, warning


def _on_background(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", rgb.size, BACKGROUND)
    canvas.paste(rgb, mask=alpha)
    return canvas


def _fitting(image: Image.Image, stored: Stored) -> tuple[Profile | None, tuple[str, ...]]:
    """The profile, if it changes these pixels, and notes about the changes.

    Raises:
        UnusableImage: The profile needs bits that the decoder drops.
    """
    deep_grey = ("was 16-bit grey, converted to 8-bit colour",)
    notes = deep_grey if stored.levels else _NOTES.get(image.mode, ())
    profile = stored.profile
    if profile is None or profile.is_srgb:
        return None, notes
    if not _fits(image, profile.mode, is_grey=stored.is_grey or bool(stored.levels)):
        return None, notes + (
            "has a colour profile for another kind of colours, which was ignored",
        )
    if stored.is_deep and profile.is_steep:
        raise UnusableImage(
            f"has 16 bits a colour in the colour space {profile.name!r}, which cannot be converted "
            "without loss; export it as an 8-bit sRGB PNG",
            image.size,
        )
    said = f"was in the colours of the profile {profile.name!r}, converted to sRGB"
    return profile, notes + (said,)


def _fits(image: Image.Image, mode: str, *, is_grey: bool) -> bool:
    """Whether pixels of this image can be brought to the mode without changing their meaning."""
    if mode == "L":
        return is_grey or image.mode in _GREY or _has_grey_palette(image)
    if mode == "RGB":
        return image.mode not in ("CMYK", "LAB")
    return image.mode == mode


def _has_grey_palette(image: Image.Image) -> bool:
    if image.mode not in ("P", "PA") or image.palette is None:
        return False
    colours = image.palette.tobytes()
    bands = len(image.palette.mode)
    return all(len(set(colours[place : place + 3])) <= 1 for place in range(0, len(colours), bands))


def _converter(
    image: Image.Image, stored: Stored, profile: Profile | None
) -> Callable[[Image.Image], tuple[Image.Image, Image.Image | None]]:
    """A function from a part of the image to its RGB pixels and their opacity, if it has one."""
    mode = profile.mode if profile else "RGB"

    def colours_of(part: Image.Image) -> Image.Image:
        plain = part if part.mode == mode else part.convert(mode)
        return profile.to_srgb(plain) if profile else plain

    def from_levels(part: Image.Image) -> tuple[Image.Image, Image.Image | None]:
        whole = part.convert("I")  # the only mode of more than 8 bits that accepts a table
        return colours_of(whole.point(list(stored.levels or ()), "L")), _opacity_of_deep(whole)

    def see_through(part: Image.Image) -> tuple[Image.Image, Image.Image | None]:
        if part.mode == "La":
            part = part.convert("LA")
        if part.mode == "LA":
            return colours_of(part.convert("L")), part.getchannel("A")
        rgba = part.convert("RGBA")
        grey = mode == "L" and part.mode not in ("P", "PA")
        return colours_of(part.convert("L") if grey else rgba.convert("RGB")), rgba.getchannel("A")

    if stored.levels:
        return from_levels
    if image.has_transparency_data:
        return see_through
    return lambda part: (colours_of(part), None)


def _opacity_of_deep(whole: Image.Image) -> Image.Image | None:
    """The opacity if a file of 16-bit greys names one of them as transparent."""
    transparent = whole.info.get("transparency")
    if not isinstance(transparent, int):
        return None
    table = [255] * 65536
    table[transparent & 0xFFFF] = 0
    return whole.point(table, "L")
