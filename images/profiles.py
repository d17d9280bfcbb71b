"""Colour spaces as ICC profiles, so that only LittleCMS converts colours."""

from __future__ import annotations

import dataclasses
import functools
import io
import struct

from PIL import Image, ImageCms

MOST_PROFILE_BYTES = 16 * 1024**2
"""A larger profile is ignored; those of print shops have 2 MiB."""
SAME = 1
"""A profile counts as sRGB if none of its colours differs by more than these levels of 255."""
STEEP = 2
"""The most levels of 255 for one level of the file, if its lower bits were dropped."""

_SRGB = ImageCms.createProfile("sRGB")
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""The mode that pixels have for a profile of each colour space."""

# Colorants relative to D50, as the profiles of these spaces' owners state them.
ADOBE_RGB = (
    (0.60974, 0.31111, 0.01947),
    (0.20528, 0.62567, 0.06087),
    (0.14919, 0.06322, 0.74457),
)
DISPLAY_P3 = (
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
)
ADOBE_GAMMA = 563 / 256
Colorants = tuple[tuple[float, float, float], ...]


class UnusableProfile(Exception):
    """A profile that cannot be used; the message follows "has"."""


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """The colour space of an image's numbers.

    Attributes:
        name: For people.
        mode: The mode that pixels must have for `to_srgb`.
        is_srgb: The numbers have the meaning of sRGB's.
        is_steep: Some levels are so far apart in sRGB that an image of 16 bits, read in 8, shows
            wrong colours.
        transform: To sRGB.
        levels: For greys, the red, green and blue of each of 256 levels.
    """

    name: str
    mode: str
    is_srgb: bool
    is_steep: bool
    transform: ImageCms.ImageCmsTransform
    levels: bytes = b""

    def to_srgb(self, pixels: Image.Image) -> Image.Image:
        """Pixels of `mode` as sRGB ones."""
        if self.levels:  # the transform computes greys exactly, but ten times more slowly
            bands = (pixels.point(self.levels[band::3]) for band in range(3))
            return Image.merge("RGB", list(bands))
        converted = ImageCms.applyTransform(pixels, self.transform)
        assert converted is not None  # it is, where nothing is done in place
        return converted


def read_profile(content: bytes) -> Profile:
    """Read a file's own profile.

    Whether it is sRGB is judged by its effect on colours, never by its name.

    Raises:
        UnusableProfile: It is damaged, or of a kind that images do not have.
    """
    if len(content) > MOST_PROFILE_BYTES:
        raise UnusableProfile("a colour profile that is too large")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(content))
        space = source.profile.xcolor_space.strip()
        name = (ImageCms.getProfileDescription(source) or "").strip()
        if space not in _MODES:
            raise UnusableProfile(f"a colour profile of an unknown kind ({space})")
        # LittleCMS would compute greys from a table too coarse for dark ones.
        flags = ImageCms.Flags.NOOPTIMIZE if space == "GRAY" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(source, _SRGB, _MODES[space], "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise UnusableProfile("a damaged colour profile") from error
    shown = "".join(letter for letter in name if letter.isprintable())[:60]
    return _judged(shown, _MODES[space], transform)


@functools.lru_cache(maxsize=8)
def known_profile(
    name: str, *, colorants: Colorants | None = None, gamma: float | None = None
) -> Profile:
    """A space that a file names instead of containing its profile.

    It is LittleCMS's own sRGB with other colorants or another curve, in the places where those
    stand.

    Args:
        name: For people.
        colorants: XYZ of red, green and blue, relative to D50; None for sRGB's.
        gamma: Exponent of the curve; None for sRGB's curve.
    """
    content = bytearray(ImageCms.ImageCmsProfile(_SRGB).tobytes())
    (count,) = struct.unpack_from(">I", content, 128)
    tags = {
        tag: place
        for tag, place, _ in (
            struct.unpack_from(">4sII", content, 132 + 12 * index) for index in range(count)
        )
    }
    for tag, colour in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants or (), strict=False):
        struct.pack_into(">3i", content, tags[tag] + 8, *(round(65536 * part) for part in colour))
    if gamma is not None:  # a parametric curve of type 0, Y = X ^ gamma
        for tag in (b"rTRC", b"gTRC", b"bTRC"):
            struct.pack_into(">4sIHHi", content, tags[tag], b"para", 0, 0, 0, round(65536 * gamma))
    source = ImageCms.ImageCmsProfile(io.BytesIO(bytes(content)))
    return _judged(name, "RGB", ImageCms.buildTransform(source, _SRGB, "RGB", "RGB"))


def _judged(name: str, mode: str, transform: ImageCms.ImageCmsTransform) -> Profile:
    profile = Profile(name, mode, False, False, transform)
    if mode not in ("RGB", "L"):
        return profile
    samples = _samples(mode)
    plain, converted = samples.convert("RGB").tobytes(), profile.to_srgb(samples).tobytes()
    furthest = max(abs(a - b) for a, b in zip(plain, converted, strict=True))
    ramp = Image.frombytes("L", (256, 1), bytes(range(256))).convert(mode)
    levels = profile.to_srgb(ramp).tobytes()
    steps = max(abs(b - a) for a, b in zip(levels, levels[3:], strict=False))
    return dataclasses.replace(
        profile,
        is_srgb=furthest <= SAME,
        is_steep=steps > STEEP,
        levels=levels if mode == "L" else b"",
    )


def _samples(mode: str) -> Image.Image:
    """Every grey, and for RGB a grid of 17 levels of each colour, too."""
    greys = Image.frombytes("L", (256, 1), bytes(range(256)))
    if mode == "L":
        return greys
    levels = [min(255, 16 * step) for step in range(17)]
    grid = bytes(part for r in levels for g in levels for b in levels for part in (r, g, b))
    size = 17**3
    samples = Image.new("RGB", (size, 2))
    samples.paste(Image.frombytes("RGB", (size, 1), grid), (0, 0))
    samples.paste(greys.convert("RGB"), (0, 1))
    return samples
