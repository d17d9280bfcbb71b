"""Images as artists upload them: each is trained on or left out, and the report has the result."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from cli.training.local import train_folder
from config import load_local
from consumer.life.stop_signal import StopSignal
from jobs.style import HyperParameters
from utils.names import printable


def pixels(seed: int, width: int = 160, height: int = 160) -> NDArray[np.uint8]:
    """Squares of many colours, different for each seed."""
    squares = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3))
    return np.kron(squares, np.ones((16, 16, 1), dtype=int)).astype(np.uint8)


def image(seed: int, width: int = 160, height: int = 160) -> Image.Image:
    """The same as an image."""
    return Image.fromarray(pixels(seed, width, height))


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **how)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, rows: bytes) -> bytes:
    """A PNG in colour, put together by hand."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def in_16_bits(seed: int) -> bytes:
    """A PNG with 16 bits for each colour."""
    lines = pixels(seed).astype(">u2") * 257
    return png(160, 160, 16, b"".join(b"\0" + line.tobytes() for line in lines))


def turned(seed: int) -> bytes:
    """A photograph that is stored sideways, with its orientation in EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image(seed, 192, 96), "JPEG", exif=exif)


def with_holes(seed: int) -> bytes:
    """An image with a transparent corner."""
    drawn = image(seed).convert("RGBA")
    drawn.paste((0, 0, 0, 0), (0, 0, 60, 60))
    return encoded(drawn)


def moving(seed: int) -> bytes:
    """Two frames."""
    frames = [image(seed), image(seed + 1)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def with_a_dot() -> bytes:
    """An almost empty white image."""
    image = Image.new("RGB", (160, 160), "white")
    image.paste("black", (80, 80, 96, 96))
    return encoded(image)


Kind = tuple[Callable[[], bytes], str, str]
GOOD: dict[str, Kind] = {
    "plain.jpg": (lambda: encoded(image(1), "JPEG", quality=95), "used", ""),
    "a_jpeg.png": (lambda: encoded(image(2), "JPEG"), "used", ""),
    "wide.webp": (lambda: encoded(image(3, 320, 112), "WEBP"), "used", ""),
    "turned.jpg": (lambda: turned(4), "used", "turned upright"),
    "print.jpg": (lambda: encoded(image(5).convert("CMYK"), "JPEG"), "used", "CMYK"),
    "deep_grey.png": (
        lambda: encoded(Image.fromarray(pixels(6)[..., 0].astype(np.uint16) * 257)),
        *("used", "16-bit grey"),
    ),
    "deep_colour.png": (lambda: in_16_bits(7), "used", "16 bits a colour"),
    "palette.png": (lambda: encoded(image(8).convert("P")), "used", "colour palette"),
    "grey.jpg": (lambda: encoded(image(9).convert("L"), "JPEG"), "used", "greyscale"),
    "ink.png": (lambda: encoded(image(10).convert("1")), "used", "black and white"),
    "lab.tiff": (lambda: encoded(image(11).convert("LAB"), "TIFF"), "used", "Lab"),
    "profile.png": (
        lambda: encoded(image(12), icc_profile=b"no profile"),
        *("used", "damaged colour profile"),
    ),
    "exif.png": (
        lambda: encoded(image(13), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
        *("used", ""),
    ),
    "holes.png": (lambda: with_holes(14), "warned", "laid on white"),
    "moving.gif": (lambda: moving(15), "warned", "only the first was used"),
    "small.png": (lambda: encoded(image(17, 96, 96)), "warned", "is smaller than 128 x 128"),
    "dot.png": (with_a_dot, "warned", "nearly empty"),
    "soft.jpg": (
        lambda: encoded(image(18).filter(ImageFilter.GaussianBlur(8)), "JPEG"),
        *("warned", "blurred"),
    ),
    "plain_near.jpg": (
        lambda: encoded(image(1).resize((240, 240)), "JPEG", quality=60),
        *("warned", "another version of plain.jpg"),
    ),
    "talkative.png": (lambda: encoded(image(19)), "warned", "longer caption than can be read"),
    # A Korean name in cp949, as Linux unpacks it from an archive.
    "\udcb0\udca1.png": (lambda: encoded(image(24)), "used", ""),
}
BAD: dict[str, Kind] = {
    "plain_twice.png": (
        lambda: encoded(Image.open(io.BytesIO(GOOD["plain.jpg"][0]()))),
        *("left_out", "is the same image as plain.jpg"),
    ),
    "tiny.png": (lambda: encoded(image(20, 16, 16)), "left_out", "too small"),
    "narrow.png": (lambda: encoded(image(21, 800, 64)), "left_out", "too long and narrow"),
    "one_colour.png": (
        lambda: encoded(Image.new("RGB", (160, 160), "teal")),
        *("left_out", "a single colour"),
    ),
    "cut.jpg": (
        lambda: encoded(image(22), "JPEG")[:-600],
        "left_out",
        "damaged or cut off",
    ),
    "bomb.png": (lambda: png(60000, 60000, 8, b"\0" * 100), "left_out", "far too many pixels"),
    "floats.tiff": (
        lambda: encoded(Image.new("F", (160, 160)), "TIFF"),
        *("left_out", "floating-point"),
    ),
    "empty.png": (lambda: b"", "left_out", "empty file"),
    "page.jpg": (lambda: b"<!DOCTYPE html><p>404</p>", "left_out", "web page"),
    "drawing.svg": (lambda: b"<svg xmlns='x'/>", "left_out", "SVG"),
    "phone.heic": (lambda: b"\0\0\0\x18ftypheic" + bytes(64), "left_out", "HEIC"),
    "noise.bin": (lambda: bytes(range(256)), "left_out", "not an image in a known format"),
}


def train(folder: Path, output: Path, base_model: Path) -> None:
    """One epoch on a folder, in a separate trainer process."""
    settings = load_local(
        _env_file=None,
        base_model=str(base_model),
        allow_cpu=True,
        log_level="WARNING",
    )
    train_folder(
        folder,
        output,
        settings=settings,
        parameters=HyperParameters(epochs=1, resolution=128, rank=2, batch_size=4),
        resume=False,
        on_event=lambda event: None,
        stop=StopSignal(),
    )


def filled(folder: Path, kinds: dict[str, Kind]) -> Path:
    """A folder with a file of each kind, and one caption that is far too long."""
    folder.mkdir()
    for name, (content, _, _) in kinds.items():
        (folder / name).write_bytes(content())
    caption = ", ".join(f"tag number {number}" for number in range(100))
    (folder / "talkative.txt").write_text(caption, encoding="utf-8")
    return folder


def test_each_image_of_an_awkward_folder_is_used_as_the_report_states(
    base_model: Path, tmp_path: Path
) -> None:
    kinds = GOOD | BAD
    output = tmp_path / "output"
    train(filled(tmp_path / "pictures", kinds), output, base_model)
    report = json.loads((output / "training_report.json").read_text(encoding="utf-8"))
    found = {each["source"]: each for each in report["pictures"]}
    assert found.keys() == {printable(name) for name in kinds} and r"\xb0\xa1.png" in found
    found = {name: found[printable(name)] for name in kinds}
    said = {name: (each["status"], "; ".join(each["reasons"])) for name, each in found.items()}
    for name, (_, status, reason) in kinds.items():
        assert said[name][0] == status and reason in said[name][1], (name, said[name])
        assert (found[name]["trained_as"] is None) is (status == "left_out"), name
    assert report["pictures_used"] == len(GOOD) and report["epochs"] == 1
    assert (found["turned.jpg"]["width"], found["turned.jpg"]["height"]) == (96, 192)
    assert found["turned.jpg"]["trained_as"] == "64 x 192"
    assert found["wide.webp"]["trained_as"] == "192 x 64"
    page = (output / "training_report.html").read_text(encoding="utf-8")
    assert all(printable(name) in page for name in kinds)
    assert (output / "lora_weights.safetensors").is_file()
