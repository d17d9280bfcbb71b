"""Whether the first image in a file is the image, and how the file stores its colours."""

from __future__ import annotations

import struct

from PIL import Image, TiffImagePlugin

from images.colour import Stored, UnusableImage
from images.profiles import (
    ADOBE_GAMMA,
    ADOBE_RGB,
    DISPLAY_P3,
    Profile,
    UnusableProfile,
    known_profile,
    read_profile,
)

_EXPORT = "export it as an 8-bit PNG"
RAW = f"is a camera's raw file, which holds only a preview as an image; {_EXPORT}"
PREVIEW = f"begins with a small preview instead of the image; {_EXPORT}"

_SUBFILE_TYPE, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 254, 258, 262, 339
_SUB_IFDS, _DNG_VERSION, _TIFF_EP = 330, 50706, 37398
_PLANES, _SEPARATE = 284, 2
_REDUCED = 1
_UNSIGNED, _UNDEFINED, _FLOAT = 1, 4, 3
_WHITE_IS_ZERO = 0
# ISO/IEC 23091-2: primaries and transfer functions that browsers show as sRGB.
_BT709_PRIMARIES, _P3_PRIMARIES, _UNKNOWN = 1, 12, 2
_SRGB_LIKE_TRANSFERS = (1, 2, 6, 13, 14, 15)
_GAMMA = 1 / 2.2
_GAMMA_TOLERANCE = 0.01
_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_CHROMATICITY_TOLERANCE = 0.01
_EXIF_IFD, _INTEROP_IFD, _COLOUR_SPACE, _INTEROP_INDEX = 0x8769, 0xA005, 0xA001, 1


def refuse_previews(image: Image.Image, content: bytes) -> None:
    """Refuse a file whose first image is a thumbnail of what it holds.

    Raises:
        UnusableImage: It is such a file. The message names its kind.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    reduced = _first(tags.get(_SUBFILE_TYPE, 0)) & _REDUCED
    is_raw = _DNG_VERSION in tags or _TIFF_EP in tags or content[8:10] == b"CR"
    if is_raw or (reduced and _SUB_IFDS in tags):
        raise UnusableImage(RAW, image.size)
    if reduced:
        raise UnusableImage(PREVIEW, image.size)


def stored_in(
    image: Image.Image, coding: tuple[int, ...] | None, content: bytes
) -> tuple[Stored, tuple[str, ...]]:
    """How a file stores its colours, read before anything is decoded.

    Args:
        image: Opened, not loaded.
        coding: A PNG's coding-independent code points, if it has any.
        content: The file.

    Returns:
        The rule for its colours, and notes about what is ignored.

    Raises:
        UnusableImage: It stores numbers whose meaning is not known for certain.
    """
    levels = _levels(image)
    profile, notes = _profile(image, coding or _coding_of_avif(image, content))
    raw = _raw_mode(image)
    drops_bits = ";16" in raw and not levels
    return Stored(levels, bool(levels) or drops_bits, raw.startswith("LA"), profile), notes


def _levels(image: Image.Image) -> tuple[int, ...] | None:
    """The table from a deep grey to 8 bits, by the range that the file states.

    Raises:
        UnusableImage: It states none, or one that is not whole numbers from 0.
    """
    bits, inverted = 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        bits = _first(tags.get(_BITS, 1))
        inverted = _first(tags.get(_PHOTOMETRIC, 1)) == _WHITE_IS_ZERO
        kind = _first(tags.get(_SAMPLE_FORMAT, _UNSIGNED))
        if kind == _FLOAT:
            raise UnusableImage(f"stores floating-point values; {_EXPORT}", image.size)
        if kind not in (_UNSIGNED, _UNDEFINED):
            raise UnusableImage(f"stores signed numbers; {_EXPORT}", image.size)
    if image.mode == "F":
        raise UnusableImage(f"stores floating-point values; {_EXPORT}", image.size)
    if not image.mode.startswith("I"):
        _refuse_deep_planes(image)
        return None
    if not 8 < bits <= 16 or (image.mode == "I" and image.format != "PNG"):
        raise UnusableImage(f"stores greys of {bits} bits; {_EXPORT}", image.size)
    top = 2**bits - 1
    table = [min(255, round(255 * value / top)) for value in range(65536)]
    return tuple(255 - level for level in table) if inverted else tuple(table)


def _refuse_deep_planes(image: Image.Image) -> None:
    """Refuse a TIFF whose colours are in separate planes of 16 bits, without compression.

    Pillow reads each byte of such a plane as a pixel.

    Raises:
        UnusableImage: It is such a file.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    is_deep = _first(tags.get(_BITS, 1)) > 8 and tags.get(_PLANES) == _SEPARATE
    if is_deep and any(codec == "raw" for codec, *_ in image.tile):
        raise UnusableImage(f"stores 16 bits a colour in separate planes; {_EXPORT}", image.size)


def _raw_mode(image: Image.Image) -> str:
    """How the decoder finds the pixels in the file, such as `RGB;16B`; "" if it is unknown."""
    packed = [part for tile in getattr(image, "tile", ()) for part in tile[-1:]]
    raw = packed[0] if packed else ""
    return str(raw[0] if isinstance(raw, tuple) and raw else raw)


def _profile(
    image: Image.Image, coding: tuple[int, ...] | None
) -> tuple[Profile | None, tuple[str, ...]]:
    """The colour space that the file names, the most exact way first; None where it is sRGB.

    Raises:
        UnusableImage: It names one that is not known here.
    """
    notes: tuple[str, ...] = ()
    if content := image.info.get("icc_profile"):
        try:
            return read_profile(content), ()
        except UnusableProfile as problem:
            notes = (f"has {problem}, which was ignored",)
    if coding:
        return _coded(image, coding), notes
    if image.format == "PNG":
        return (None if "srgb" in image.info else _from_gamma(image)), notes
    return (_adobe_rgb() if _says_adobe_rgb(image) else None), notes


def _coded(image: Image.Image, coding: tuple[int, ...]) -> Profile | None:
    primaries, transfer = coding[:2]
    if transfer in _SRGB_LIKE_TRANSFERS:
        if primaries in (_BT709_PRIMARIES, _UNKNOWN):
            return None
        if primaries == _P3_PRIMARIES:
            return known_profile("Display P3", colorants=DISPLAY_P3)
    raise UnusableImage(
        f"is coded for other screens (primaries {primaries}, transfer {transfer}, such as HDR); "
        "export it in sRGB",
        image.size,
    )


def _coding_of_avif(image: Image.Image, content: bytes) -> tuple[int, ...] | None:
    """Colour primaries and transfer function of an AVIF file, from its `colr` box."""
    place = content.find(b"colrnclx", 0, 65536) if image.format == "AVIF" else -1
    if place < 0 or place + 14 > len(content):
        return None
    return struct.unpack_from(">HHH", content, place + 8)


def _from_gamma(image: Image.Image) -> Profile | None:
    """The colour space of a PNG that states its gamma and its primaries by numbers."""
    chromaticity = image.info.get("chromaticity", _CHROMATICITY)
    if any(
        abs(stated - usual) > _CHROMATICITY_TOLERANCE
        for stated, usual in zip(chromaticity, _CHROMATICITY, strict=True)
    ):
        raise UnusableImage(
            "states primary colours that are not sRGB's and has no colour profile; export it in "
            "sRGB",
            image.size,
        )
    gamma = image.info.get("gamma", _GAMMA)
    # Programs that mean sRGB state 1/2.2, or a number near it.
    if abs(gamma - _GAMMA) <= _GAMMA_TOLERANCE:
        return None
    if not 0.1 <= gamma <= 10:
        raise UnusableImage(f"states a gamma of {gamma:g}; export it in sRGB", image.size)
    return known_profile(f"sRGB with a gamma of {1 / gamma:.3g}", gamma=1 / gamma)


def _says_adobe_rgb(image: Image.Image) -> bool:
    """Whether the EXIF data states that the colours are Adobe RGB.

    Cameras write that instead of a profile.
    """
    try:
        exif = image.getexif()
        space = exif.get_ifd(_EXIF_IFD).get(_COLOUR_SPACE)
        index = exif.get_ifd(_INTEROP_IFD).get(_INTEROP_INDEX)
    except Exception:  # pylint: disable=broad-exception-caught  # damaged metadata, in any way
        return False
    return space == 2 or (space == 0xFFFF and str(index).startswith("R03"))


def _adobe_rgb() -> Profile:
    return known_profile("Adobe RGB (1998)", colorants=ADOBE_RGB, gamma=ADOBE_GAMMA)


def _first(value: object) -> int:
    """A tag's first number; 0 where it is none."""
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, int) else 0
