"""One image, a ramp, in two hundred combinations of storage, depth and colour profile.

Each has the sRGB values that it means.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from tests.corpus import files

SIDE = 64
Values = NDArray[np.float64]

RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
"""The stored numbers, as parts of the largest."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        name: Storage and profile.
        content: The file.
        right: [height, width, 3], sRGB from 0 to 255; None if it may only be left out.
    """

    name: str
    content: bytes
    right: Values | None


def eight(values: Values) -> NDArray[np.uint8]:
    """Numbers of 8 bits."""
    return np.round(values * 255).astype(np.uint8)


def deep(values: Values, bits: int = 16) -> NDArray[np.uint16]:
    """Numbers of more than 8 bits."""
    numbers: NDArray[np.uint16] = np.round(values * (2**bits - 1)).astype(np.uint16)
    return numbers


def srgb_of(linear: Values) -> Values:
    """sRGB's curve, from 0 to 255."""
    clipped = linear.clip(0, 1)
    curve = np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)
    return np.asarray(255 * curve)


# ---- profiles ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Space:
    """A colour profile.

    Attributes:
        content: The profile; None for none.
        kind: `RGB`, `GRAY`, or another one, which fits no pixels here.
        gamma: The curve of the numbers; None for sRGB's.
    """

    content: bytes | None
    kind: str = "RGB"
    gamma: float | None = None


def _made(kind: Literal["sRGB", "LAB"]) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes()


SPACES = {
    "no profile": Space(None),
    "sRGB": Space(_made("sRGB")),
    "linear, named sRGB": Space(files.profile("RGB ", 1.0, "sRGB-elle-V2-g10.icc"), gamma=1.0),
    "gamma 1.8": Space(files.profile("RGB ", 1.8, "ProPhoto-like"), gamma=1.8),
    "gamma 2.2": Space(files.profile("RGB ", 2.2, "Adobe-like"), gamma=2.2),
    "grey, gamma 1.0": Space(files.profile("GRAY", 1.0, "sGray linear"), "GRAY", 1.0),
    "grey, gamma 1.8": Space(files.profile("GRAY", 1.8, "Dot Gain"), "GRAY", 1.8),
    "grey, gamma 2.2": Space(files.profile("GRAY", 2.2, "Gray Gamma 2.2"), "GRAY", 2.2),
    "Lab": Space(_made("LAB"), "LAB"),
    "damaged": Space(b"\0" * 200, "damaged"),
}


# ---- storages ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Storage:
    """A way of storing the ramp.

    Attributes:
        make: The file, with a profile.
        levels: The stored numbers, from 0 to 1.
        is_grey: Its pixels are greys, and mean a grey profile's numbers.
        usable: False where it may only be left out.
    """

    make: Callable[[bytes | None], bytes]
    levels: Values
    is_grey: bool
    usable: bool = True


def _by_pillow(image: Image.Image, kind: str, **how: object) -> Callable[[bytes | None], bytes]:
    def make(profile: bytes | None) -> bytes:
        more = {"icc_profile": profile} if profile else {}
        return files.encoded(image, kind, **how, **more)

    return make


def _png(
    values: NDArray[np.generic], colours: int, *, depth: int, extra: tuple[bytes, ...] = ()
) -> Callable[[bytes | None], bytes]:
    def make(profile: bytes | None) -> bytes:
        before = (*([files.iccp(profile)] if profile else []), *extra)
        return files.png(values, colours, depth=depth, before=before)

    return make


def _tiff(pixels: bytes, order: str = "<", **tags: object) -> Callable[[bytes | None], bytes]:
    named = {int(name[1:]): value for name, value in tags.items()}

    def make(profile: bytes | None) -> bytes:
        more = {34675: profile} if profile else {}
        return files.tiff(pixels, (SIDE, SIDE), named | more, order=order)

    return make


def _colours(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.repeat(values[..., None], 3, axis=2)


def _with_alpha(values: NDArray[np.generic], opaque: int) -> NDArray[np.generic]:
    shaped = values if values.ndim == 3 else values[..., None]
    alpha = np.full((*shaped.shape[:2], 1), opaque, dtype=shaped.dtype)
    return np.concatenate([shaped, alpha], axis=2)


def storages() -> dict[str, Storage]:
    """Every way of storing the ramp."""
    low, high = eight(RAMP), deep(RAMP)
    grey, colour = Image.fromarray(low), Image.fromarray(_colours(low))
    small = low / 255
    large, twelve = high / 65535, deep(RAMP, 12)
    unused = np.int16(high.astype(np.int32) - 32768)
    jpegs = {
        "JPEG grey": _by_pillow(grey, "JPEG", quality=100),
        "JPEG RGB": _by_pillow(colour, "JPEG", quality=100, subsampling=0),
    }
    lossy = {
        name: Storage(make, np.asarray(decoded_by_pillow(make(None))) / 255, name.endswith("grey"))
        for name, make in jpegs.items()
    }
    return lossy | {
        "PNG L": Storage(_png(low, files.GREY, depth=8), small, True),
        "PNG L with a transparent value": Storage(
            # 255 is transparent, and white where it is laid on white
            _png(low, files.GREY, depth=8, extra=(files.chunk(b"tRNS", b"\0\xff"),)),
            small,
            True,
        ),
        "PNG LA": Storage(_png(_with_alpha(low, 255), files.GREY_ALPHA, depth=8), small, True),
        "PNG grey palette": Storage(_by_pillow(grey.convert("P"), "PNG"), small, True),
        "PNG 16-bit grey": Storage(_png(high, files.GREY, depth=16), large, True),
        "PNG 16-bit grey with alpha": Storage(
            _png(_with_alpha(high, 65535), files.GREY_ALPHA, depth=16), large, True
        ),
        "PNG RGB": Storage(_png(_colours(low), files.RGB, depth=8), small, False),
        "PNG RGBA": Storage(
            _png(_with_alpha(_colours(low), 255), files.RGBA, depth=8), small, False
        ),
        "PNG 16-bit RGB": Storage(_png(_colours(high), files.RGB, depth=16), large, False),
        "TIFF L": Storage(_tiff(low.tobytes()), small, True),
        "TIFF L, white is zero": Storage(_tiff((255 - low).tobytes(), t262=0), small, True),
        "TIFF 12-bit": Storage(
            _tiff(files.packed_in_12_bits(twelve), t258=12), twelve / 4095, True
        ),
        "TIFF 16-bit": Storage(_tiff(high.astype("<u2").tobytes(), t258=16), large, True),
        "TIFF 16-bit, Motorola": Storage(
            _tiff(high.astype(">u2").tobytes(), ">", t258=16), large, True
        ),
        "TIFF 16-bit, white is zero": Storage(
            _tiff((65535 - high).astype("<u2").tobytes(), t258=16, t262=0), large, True
        ),
        "TIFF signed 8-bit": Storage(_tiff(low.tobytes(), t339=2), small, True, usable=False),
        "TIFF signed 16-bit": Storage(
            _tiff(unused.astype("<i2").tobytes(), t258=16, t339=2), large, True, usable=False
        ),
        "TIFF 32-bit": Storage(
            _tiff(high.astype("<u4").tobytes(), t258=32), large, True, usable=False
        ),
        "TIFF floating point": Storage(
            _tiff(RAMP.astype("<f4").tobytes(), t258=32, t339=3), large, True, usable=False
        ),
        "TIFF RGB": Storage(
            _tiff(_colours(low).tobytes(), t258=(8, 8, 8), t262=2, t277=3), small, False
        ),
        "TIFF 16-bit RGB": Storage(
            _tiff(_colours(high).astype("<u2").tobytes(), t258=(16, 16, 16), t262=2, t277=3),
            large,
            False,
        ),
        "WebP": Storage(_by_pillow(colour, "WEBP", lossless=True), small, False),
    }


def cases() -> Iterator[Case]:
    """Each storage with each profile."""
    for name, storage in storages().items():
        for called, space in SPACES.items():
            yield Case(f"{name}, {called}", storage.make(space.content), _right(storage, space))


def _right(storage: Storage, space: Space) -> Values | None:
    """The sRGB values that a file means. A profile that cannot be for its pixels means nothing."""
    if not storage.usable:
        return None
    fits = space.kind == "RGB" or (space.kind == "GRAY" and storage.is_grey)
    if not fits or space.gamma is None:
        return _repeated(storage.levels * 255)
    return _repeated(srgb_of(storage.levels ** (round(256 * space.gamma) / 256)))


def _repeated(values: Values) -> Values:
    return values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)


def decoded_by_pillow(content: bytes) -> Image.Image:
    """Pillow's own route."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")
