"""Every image of Pillow's own test suite, taken in: `python -m tests.corpus.library_intake`.

pip fetches Pillow's source package unless `--source` names it; nothing of it is kept. The decoder
must answer for each file within two seconds and 300 MiB, and the pixels of each used image must
be within one level of Pillow's own result. The exit code is 1 if a file fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageCms, ImageOps

from images.decoder import CRASHED, SECONDS, TOO_SLOW, Decoder
from images.decoding import Refused, Request
from images.vetting import FORMATS, UnusableImage, vet
from tests.corpus.storages import srgb_of

MOST_SECONDS, MOST_MIB, MOST_LEVELS = 2.0, 300, 1
_WHITE = (255, 255, 255)
REASONS = (CRASHED, TOO_SLOW.format(seconds=SECONDS))
MAX_PIXELS = 100_000_000


@dataclasses.dataclass
class Verdict:
    """The result for one file."""

    name: str
    seconds: float
    reason: str = ""
    difference: int = 0
    notes: tuple[str, ...] = ()


def main() -> int:
    """Take all files in, and print the failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="pillow-*.tar.gz; without it pip fetches it")
    parser.add_argument("--all", action="store_true", help="print each file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.source or _fetched(Path(scratch))
        folder = Path(scratch) / "source"
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        verdicts = list(_verdicts(sorted(p for p in folder.rglob("Tests/**/*") if p.is_file())))
    wrong = [
        each
        for each in verdicts
        if each.seconds > MOST_SECONDS
        or each.difference > MOST_LEVELS
        or each.reason.startswith(REASONS)
    ]
    for each in verdicts if arguments.all else wrong:
        print(
            f"{each.name}: {each.seconds:.2f} s, {each.difference} off, {each.reason or each.notes}"
        )
    mebibytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    slowest = max(each.seconds for each in verdicts)
    used = sum(not each.reason for each in verdicts)
    print(
        f"{len(verdicts)} files, {used} used, {len(wrong)} wrong, slowest {slowest:.2f} s, "
        f"at most {mebibytes:.0f} MiB"
    )
    return int(bool(wrong) or mebibytes > MOST_MIB)


def _fetched(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
    subprocess.run([*command, f"pillow=={PIL.__version__}", "-d", str(folder)], check=True)
    return next(folder.glob("pillow-*.tar.gz"))


def _verdicts(files: list[Path]) -> Iterator[Verdict]:
    with Decoder() as decoder:
        for path in files:
            request = Request(str(path), MAX_PIXELS, 64)
            began = time.monotonic()
            (answer,) = decoder.answers([request])
            seconds = time.monotonic() - began
            reason = answer.fact.reason if isinstance(answer.fact, Refused) else ""
            if reason in REASONS:
                yield Verdict(path.name, seconds, reason)
            else:  # pixels of images that are too small to train on are compared, too
                yield _compared(path, seconds)


def _compared(path: Path, seconds: float) -> Verdict:
    """The largest difference to Pillow's own route, colour profiles included."""
    try:
        vetted = vet(path.read_bytes(), max_pixels=MAX_PIXELS)
    except UnusableImage as unusable:
        return Verdict(path.name, seconds, str(unusable))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plain = _by_pillow(path)
        except (OSError, SyntaxError, ValueError):  # over metadata that is not needed here
            return Verdict(path.name, seconds, notes=("Pillow itself refuses it",))
    if plain.size != vetted.image.size:
        return Verdict(path.name, seconds, difference=256, notes=vetted.notes)
    away = np.abs(np.asarray(plain).astype(int) - np.asarray(vetted.image).astype(int))
    return Verdict(path.name, seconds, difference=int(away.max()), notes=vetted.notes)


def _by_pillow(path: Path) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        profile = image.info.get("icc_profile")
        if upright.mode.startswith("I"):
            values = np.asarray(upright).astype(float)
            bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]
            levels = np.round(255 * values / (2**bits - 1)).clip(0, 255).astype(np.uint8)
            levels[values == image.info.get("transparency", -1)] = 255  # laid on white
            return Image.fromarray(levels).convert("RGB")
        alpha = None
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            alpha, upright = rgba.getchannel("A"), rgba.convert("RGB")
        rgb = upright.convert("RGB")
        if profile:
            rgb = _through(upright, rgb, profile)
        elif image.format == "PNG" and "srgb" not in image.info:
            rgb = _by_gamma(rgb, image.info.get("gamma", 1 / 2.2))
        if alpha is None:
            return rgb
        canvas = Image.new("RGB", rgb.size, _WHITE)
        canvas.paste(rgb, mask=alpha)
        return canvas


def _by_gamma(rgb: Image.Image, gamma: float) -> Image.Image:
    """Pillow ignores what a PNG says of its gamma."""
    if abs(gamma - 1 / 2.2) < 0.01:
        return rgb
    levels = srgb_of((np.arange(256) / 255) ** (1 / gamma))
    return rgb.point([round(level) for level in levels] * 3)


def _through(image: Image.Image, rgb: Image.Image, profile: bytes) -> Image.Image:
    srgb = ImageCms.createProfile("sRGB")
    for pixels in (image, rgb):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(pixels, source, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            continue
        if converted is not None:
            return converted
    return rgb


if __name__ == "__main__":
    sys.exit(main())
