"""Images: judged by what they are, left out with a reason, encoded once with their caption."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from images.vetting import UnusableImage, Vetted, vet
from jobs.style import TrainingImage, TrainingRun
from tests.unit.training.conftest import MakeRun
from training.style.dataset import prepare
from training.style.examples import Dataset
from training.style.families.sd15 import BaseModel
from utils.errors import ImageDownloadFailed, LowQualityData, Stopped, StopReason


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    """An image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **how)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (80, 64)) -> Image.Image:
    """An image that compresses badly."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    values = np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def header_of_a_png(width: int, height: int, *, depth: int = 8, rows: bytes = b"\0" * 100) -> bytes:
    """A PNG in colour that announces a size, and has next to no data."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def vetted(content: bytes, *, max_pixels: int = 1_000_000) -> Vetted:
    """Vet with the usual limits of these tests."""
    return vet(content, max_pixels=max_pixels)


def animation() -> bytes:
    """A GIF of two frames."""
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


# ---- vetting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(lambda: b"", "is an empty file", id="empty"),
        pytest.param(
            lambda: b"<!DOCTYPE html><p>404</p>", "is a web page, not an image", id="html"
        ),
        pytest.param(lambda: b'\n<?xml version="1.0"?><Error/>', "is a text file", id="xml"),
        pytest.param(lambda: b'{"detail": "gone"}', "is a text file", id="json"),
        pytest.param(lambda: b"\0\0\0\x18ftypheic" + bytes(64), "Apple's HEIC", id="heic"),
        pytest.param(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image in a known", id="eps"),
        pytest.param(lambda: bytes(range(256)), "not an image in a known", id="anything"),
        pytest.param(lambda: encoded(noise())[:4000], "is damaged or cut off", id="cut png"),
        pytest.param(
            lambda: encoded(noise(), "JPEG")[:2500], "is damaged or cut off", id="cut jpeg"
        ),
        pytest.param(lambda: header_of_a_png(5000, 5000), "more than the 1,000,000", id="bomb"),
        pytest.param(lambda: header_of_a_png(60000, 60000), "far too many pixels", id="huge bomb"),
        pytest.param(lambda: header_of_a_png(0, 10), "no pixels|not an image", id="no pixels"),
        pytest.param(
            lambda: encoded(Image.new("F", (64, 64)), "TIFF"), "floating-point", id="floats"
        ),
    ],
)
def test_a_file_that_is_no_usable_image_is_refused_with_its_reason(
    content: Callable[[], bytes], reason: str
) -> None:
    with pytest.raises(UnusableImage, match=reason):
        vetted(content())


def test_a_bomb_is_refused_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", explode)
    with pytest.raises(UnusableImage, match="5000 x 5000") as caught:
        vetted(header_of_a_png(5000, 5000))
    assert caught.value.size == (5000, 5000)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright_by_its_exif_data(orientation: int) -> None:
    upright = Image.new("RGB", (80, 64), "blue")
    upright.paste("red", (0, 0, 40, 32))  # the red corner is at the top left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = vetted(encoded(stored, "PNG", exif=exif.tobytes()))
    assert result.image.size == (80, 64)
    assert result.image.getpixel((5, 5)) == (255, 0, 0)
    assert bool(result.notes) is (orientation > 1)


def test_damaged_exif_data_does_no_harm() -> None:
    content = encoded(noise(), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert vetted(content).image.size == (80, 64)


def test_transparent_parts_are_laid_on_white_with_a_note_for_the_artist() -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 32, 64))
    result = vetted(encoded(image))
    assert result.image.getpixel((50, 5)) == (255, 255, 255)
    assert result.image.getpixel((5, 5)) == (0, 0, 255)
    assert result.warnings == ("has transparent parts, which were laid on white",)


def test_an_alpha_channel_without_transparency_is_no_warning() -> None:
    assert not vetted(encoded(noise("RGB").convert("RGBA"))).warnings


def test_a_palette_with_a_transparent_colour_is_laid_on_white() -> None:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(0, (0, 0, 32, 64))
    result = vetted(encoded(image, "PNG", transparency=0))
    assert result.image.getpixel((5, 5)) == (255, 255, 255)
    assert result.image.getpixel((50, 5)) == (0, 255, 0)


def test_16_bit_grey_is_scaled_and_not_clipped_to_white() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    result = vetted(encoded(Image.fromarray(ramp)))
    values = np.asarray(result.image)[..., 0]
    assert (values.min(), values.max()) == (0, 255)
    assert abs(float(values.mean()) - 127.5) < 1
    assert "16-bit" in result.notes[0]


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (lambda: encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
        (lambda: encoded(Image.new("L", (64, 64), 90)), (90, 90, 90)),
        (lambda: encoded(Image.new("1", (64, 64), 1)), (255, 255, 255)),
        (lambda: encoded(Image.new("RGB", (64, 64), (9, 8, 7)).convert("P")), None),
    ],
)
def test_every_colour_mode_becomes_rgb_with_a_note(
    content: Callable[[], bytes], colour: tuple[int, int, int] | None
) -> None:
    result = vetted(content())
    assert result.image.mode == "RGB" and len(result.notes) == 1
    if colour:
        found = np.asarray(result.image)[32, 32].astype(int)
        assert np.abs(found - colour).max() <= 3


def in_16_bits(width: int, height: int) -> bytes:
    """A PNG with 16 bits for each colour, red from left to right; Pillow writes none."""
    line = np.zeros((width, 3), dtype=">u2")
    line[:, 0] = np.linspace(0, 65535, width)
    rows = (b"\0" + line.tobytes()) * height
    return header_of_a_png(width, height, depth=16, rows=rows)


def test_an_image_with_16_bits_a_colour_keeps_its_colours_with_a_note() -> None:
    result = vetted(in_16_bits(64, 64))
    values = np.asarray(result.image)
    assert values[0, 0, 0] == 0 and values[0, -1, 0] == 255 and not values[..., 1:].any()
    assert result.notes == ("had 16 bits a colour, converted to 8",)
    assert not vetted(header_of_a_png(64, 64, rows=(b"\0" + bytes(192)) * 64)).notes


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (ValueError("conversion not supported"), r"cannot be read \(RGB\); export it as PNG"),
        (MemoryError(), "is too large to be converted"),
        (UnusableImage("has colours of its own"), "has colours of its own"),
    ],
)
def test_colours_that_cannot_be_converted_cost_one_image_and_not_the_job(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, reason: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("images.vetting.to_srgb", fail)
    with pytest.raises(UnusableImage, match=reason):
        vetted(encoded(noise()))


def test_a_phones_image_with_a_second_view_is_a_still_image() -> None:
    both = encoded(noise(), "MPO", save_all=True, append_images=[noise()])
    assert vetted(both).image.size == (80, 64)


def test_of_an_animation_the_first_image_is_used_with_a_note_for_the_artist() -> None:
    result = vetted(animation())
    assert result.image.getpixel((5, 5)) == (255, 0, 0)
    assert "only the first was used" in result.warnings[0]
    assert result.decoded == "GIF, 64 x 64 pixels, P"


def wide_gamut() -> bytes:
    """A colour profile whose numbers mean other colours than sRGB's: Lab's."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@pytest.mark.parametrize(
    ("profile", "note"),
    [
        (b"no profile", "has a damaged colour profile, which was ignored"),
        (wide_gamut()[:200], "has a damaged colour profile, which was ignored"),
        (wide_gamut(), "has a colour profile for another kind of colours, which was ignored"),
    ],
)
def test_a_colour_profile_that_does_not_fit_does_no_harm_and_is_noted(
    profile: bytes, note: str
) -> None:
    result = vetted(encoded(noise(), "PNG", icc_profile=profile))
    assert np.array_equal(np.asarray(result.image), np.asarray(noise()))
    assert result.notes == (note,)


def test_an_image_with_srgbs_own_profile_stays_as_it_is() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    result = vetted(encoded(noise(), "PNG", icc_profile=profile))
    assert np.array_equal(np.asarray(result.image), np.asarray(noise())) and not result.notes


def test_another_profiles_colours_are_converted_to_srgb() -> None:
    """In this one the red and the blue channel have changed places."""
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = swapped.index(b"rXYZ"), swapped.index(b"bXYZ")
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    name = swapped.index("sRGB".encode("utf-16-be"))
    swapped[name : name + 8] = "BGRs".encode("utf-16-be")
    red_image = Image.new("RGB", (64, 64), (255, 0, 0))
    result = vetted(encoded(red_image, "PNG", icc_profile=bytes(swapped)))
    assert result.image.getpixel((5, 5)) == (0, 0, 255)
    assert "converted to sRGB" in result.notes[0]


# ---- preparing -----------------------------------------------------------------------------------


def with_file(run: TrainingRun, path: Path, content: bytes) -> TrainingRun:
    """The run with one more image."""
    path.write_bytes(content)
    image = TrainingImage(f"s3://media/training/{path.name}?X-Amz-Signature=abc", str(path), "more")
    return dataclasses.replace(run, images=(*run.images, image))


def test_every_image_asked_for_is_reported_in_order_and_the_good_ones_are_used(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    run = with_file(make_run(count=3), tmp_path / "page.jpg", b"<html>Not found</html>")
    missing = TrainingImage("s3://media/gone.png", None, "", "is not in the bucket")
    run = dataclasses.replace(run, images=(missing, *run.images))
    data = prepare(run, base)
    assert [entry.source for entry in data.entries] == [p.source for p in run.images]
    assert [e.status for e in data.entries] == ["left_out", "used", "used", "used", "left_out"]
    assert data.entries[0].reasons == ("is not in the bucket",)
    assert data.entries[1].width == 128 and data.entries[1].height == 96
    assert "web page" in data.entries[4].reasons[0] and data.entries[4].width is None
    assert [example.source for example in data.usable] == [p.source for p in run.images[1:4]]


def test_too_few_good_images_are_low_quality_and_each_bad_one_is_named(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    run = with_file(make_run(count=2), tmp_path / "empty.png", b"")
    with pytest.raises(LowQualityData) as caught:
        prepare(run, base)
    assert "2 of 3 images" in str(caught.value)
    assert "empty.png: is an empty file" in str(caught.value)
    assert "Signature" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_too_few_images_asked_for_are_low_quality(base: BaseModel, make_run: MakeRun) -> None:
    with pytest.raises(LowQualityData, match="Add more images"):
        prepare(make_run(count=2), base)


def test_too_few_images_fetched_are_a_failed_download(base: BaseModel, make_run: MakeRun) -> None:
    run = make_run(count=2)
    gone = TrainingImage("s3://media/gone.png", None, "", "is not in the bucket")
    with pytest.raises(ImageDownloadFailed, match=r"gone\.png: is not in the bucket"):
        prepare(dataclasses.replace(run, images=(*run.images, gone)), base)


def test_a_lost_image_is_not_blamed_where_bad_ones_make_the_difference(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    run = with_file(make_run(count=2), tmp_path / "empty.png", b"")
    gone = TrainingImage("s3://media/gone.png", None, "", "is not in the bucket")
    with pytest.raises(LowQualityData, match=r"empty\.png.*gone\.png"):
        prepare(dataclasses.replace(run, images=(*run.images, gone)), base)


def test_a_reason_that_several_images_share_is_named_once(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    broken = [tmp_path / f"{name}.jpg" for name in "abc"]
    for path in broken:
        path.write_bytes(b"<html>")
    images = tuple(TrainingImage(f"s3://media/{path.name}", str(path), "") for path in broken)
    run = dataclasses.replace(make_run(), images=images)
    with pytest.raises(LowQualityData) as caught:
        prepare(run, base)
    assert "3 images: is a web page, not an image (a.jpg, b.jpg, c.jpg)." in str(caught.value)


def test_a_file_that_vanished_is_left_out(base: BaseModel, make_run: MakeRun) -> None:
    run = make_run(count=3)
    lost = TrainingImage("s3://media/lost.png", "/nowhere/lost.png", "")
    data = prepare(dataclasses.replace(run, images=(*run.images, lost)), base)
    assert data.entries[3].reasons == ("its file could not be read",)


def test_an_image_of_which_the_vae_makes_no_finite_numbers_is_named(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10))
    encode = base.encode_images

    def sometimes_nan(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = encode(pixels)
        return (mean * float("nan"), std) if next(calls) == 1 else (mean, std)

    monkeypatch.setattr(base, "encode_images", sometimes_nan)
    data = prepare(make_run(count=4), base)
    assert [entry.status for entry in data.entries] == ["used", "left_out", "used", "used"]
    assert "no numbers" in data.entries[1].reasons[0]


def test_fewer_than_ten_images_are_a_warning(base: BaseModel, make_run: MakeRun) -> None:
    assert "Only 9 images" in prepare(make_run(count=9), base).warnings[0]
    assert not prepare(make_run(count=10), base).warnings


def test_a_shuffle_never_pairs_an_image_with_anothers_latents_or_caption(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(count=6)
    straight = prepare(run, base)
    mixed = list(run.images)
    random.Random(1).shuffle(mixed)
    shuffled = prepare(dataclasses.replace(run, images=tuple(mixed)), base)
    for index, example in enumerate(shuffled.usable):
        latents, text = shuffled.batch([index])
        other = straight.usable.index(example)
        expected, expected_text = straight.batch([other])
        assert torch.equal(latents.mean, expected.mean) and torch.equal(text, expected_text)
    assert straight.identities != shuffled.identities
    assert set(straight.identities) == set(shuffled.identities)


def test_a_batch_holds_the_encodings_of_its_images(
    base: BaseModel, make_run: MakeRun, photographs: list[Path]
) -> None:
    data = prepare(make_run(count=3), base)
    latents, text = data.batch([2, 0])
    assert latents.mean.shape == latents.std.shape == (2, 4, 8, 8)
    assert latents.mean.dtype == latents.std.dtype == torch.float32
    assert torch.equal(text[0], base.encode_prompts(["caption 2"])[0])
    middle = (16, 0, 112, 96)  # of 128 x 96
    square = Image.open(photographs[2]).resize((64, 64), Image.Resampling.LANCZOS, box=middle)
    pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    mean, _ = base.encode_images(pixels)
    assert torch.equal(latents.mean[0], mean[0])


def test_each_image_and_each_caption_is_encoded_once(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(count=3)
    twice = dataclasses.replace(run, images=run.images * 2)
    images, prompts = [], []
    encode_images, encode_prompts = base.encode_images, base.encode_prompts

    def count_images(pixels: torch.Tensor) -> Any:
        images.append(pixels)
        return encode_images(pixels)

    def count_prompts(texts: list[str]) -> Any:
        prompts.extend(texts)
        return encode_prompts(texts)

    monkeypatch.setattr(base, "encode_images", count_images)
    monkeypatch.setattr(base, "encode_prompts", count_prompts)
    data: Dataset = prepare(twice, base)
    assert len(images) == 3 and len(data.usable) == 3
    assert [entry.status for entry in data.entries] == ["used"] * 3 + ["left_out"] * 3
    assert "is the same image as image_0.png" in data.entries[3].reasons
    assert prompts == ["", "caption 0", "caption 1", "caption 2"]


def test_an_image_is_known_by_its_bytes_and_not_by_its_name(
    base: BaseModel, make_run: MakeRun, photographs: list[Path]
) -> None:
    data = prepare(make_run(count=3), base)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in photographs[:3]]
    assert [example.identity for example in data.usable] == digests
    assert set(data.latents) == set(digests)


@pytest.mark.parametrize("separator", [", ", " "])
def test_a_caption_longer_than_can_be_read_is_cut_between_tags_or_words_with_a_note(
    base: BaseModel, make_run: MakeRun, separator: str
) -> None:
    run = make_run(count=3)
    words = [f"tag{number}" for number in range(100)]
    long = dataclasses.replace(run.images[1], caption=separator.join(words))
    data = prepare(dataclasses.replace(run, images=(run.images[0], long, run.images[2])), base)
    caption = data.entries[1].caption
    kept = caption.split(separator)
    assert kept == words[: len(kept)] and 3 < len(kept) < 100
    assert data.entries[1].status == "warned"
    assert (
        f"cut after “{' '.join(caption.split(', ')[-1].split()[-5:])}”"
        in data.entries[1].reasons[0]
    )
    assert data.usable[1].caption == caption and caption in data.embeddings
    tokens = base.tokenizer(caption).input_ids
    assert len(tokens) <= base.tokenizer.model_max_length
    assert len(base.tokenizer(separator.join(words[: len(kept) + 1])).input_ids) > 77


def test_a_stop_while_images_are_prepared_is_obeyed_before_the_next_image(
    base: BaseModel, make_run: MakeRun
) -> None:
    answers = iter([None, StopReason.SHUTDOWN])
    with pytest.raises(Stopped) as caught:
        prepare(make_run(count=5), base, should_stop=lambda: next(answers))
    assert caught.value.reason is StopReason.SHUTDOWN
