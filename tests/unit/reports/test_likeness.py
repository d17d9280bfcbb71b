"""A sample that repeats a training image is found in any brightness, noise and size."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from reports.likeness import SIDE, copies, pattern


def scene(seed: int) -> Image.Image:
    """Large soft shapes, unlike those of every other seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((384, 256), Image.Resampling.BICUBIC)


def file(image: Image.Image, quality: int = 85) -> bytes:
    """As a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def noisy(image: Image.Image) -> Image.Image:
    """With noise in every pixel."""
    noise = np.random.default_rng(7).normal(0, 40, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "changed",
    [
        lambda image: image,
        lambda image: image.resize((96, 64)),
        lambda image: ImageEnhance.Brightness(image).enhance(0.6),
        lambda image: ImageEnhance.Color(image).enhance(0.0),
        noisy,
    ],
    ids=["same", "small", "dark", "grey", "noisy"],
)
def test_a_copy_is_found_by_name(changed: object) -> None:
    assert callable(changed)
    images = [(f"{n}.jpg", file(scene(n))) for n in range(10)]
    (found,) = copies([file(scene(99))], [file(changed(scene(3)), 60)], images)
    assert found is not None and found.name == "3.jpg"
    assert found.likeness > 0.9 > found.before


def test_another_image_is_no_copy() -> None:
    images = [(f"{n}.jpg", file(scene(n))) for n in range(10)]
    before, after = [file(scene(n)) for n in range(50, 60)], [file(scene(n)) for n in range(60, 70)]
    assert copies(before, after, images) == [None] * 10


def test_a_prompt_that_gives_this_image_without_training_is_no_copy() -> None:
    images = [("sky.jpg", file(scene(1)))]
    assert copies([file(noisy(scene(1)))], [file(scene(1))], images) == [None]


def grey_values(*parts: float, contrast: float = 25.0) -> bytes:
    """A PNG file whose likeness to each of the first pure patterns is its part."""
    rows = np.random.default_rng(5).normal(size=(len(parts) + 1, SIDE * SIDE))
    rows -= rows.mean(axis=1, keepdims=True)
    pure = np.linalg.qr(rows.T)[0].T  # orthogonal, of length 1
    rest = (1 - sum(part**2 for part in parts)) ** 0.5
    values = np.array([*parts, rest]) @ pure * SIDE * contrast + 128
    pixels = values.reshape(SIDE, SIDE).round().clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("before", "after", "is_copy"),
    [(0.0, 0.91, True), (0.0, 0.89, False), (0.83, 0.94, True), (0.85, 0.94, False)],
)
def test_a_copy_has_a_likeness_of_nine_tenths_and_gained_a_tenth_by_training(
    before: float, after: float, is_copy: bool
) -> None:
    (found,) = copies([grey_values(before)], [grey_values(after)], [("1.png", grey_values(1.0))])
    assert (found is not None) is is_copy
    if found:
        assert (found.before, found.likeness) == pytest.approx((before, after), abs=0.005)


def test_less_contrast_than_one_grey_value_is_no_image() -> None:
    assert not pattern(grey_values(1.0, contrast=0.8)).any()
    assert pattern(grey_values(1.0, contrast=3.0)).any()


def test_a_file_that_is_neither_jpeg_nor_png_is_refused() -> None:
    buffer = io.BytesIO()
    scene(1).save(buffer, "BMP")
    with pytest.raises(OSError, match="cannot identify"):
        pattern(buffer.getvalue())


def test_an_image_of_one_grey_is_like_nothing() -> None:
    grey = file(Image.new("RGB", (64, 64), "grey"))
    assert not pattern(grey).any()
    assert copies([grey], [grey], [("grey.jpg", grey)]) == [None]


def test_without_images_there_is_nothing_to_copy() -> None:
    assert copies([file(scene(1))], [file(scene(2))], []) == [None]
    assert not copies([], [], [("1.jpg", file(scene(1)))])


def test_images_of_one_name_are_all_compared() -> None:
    images = [("image.jpg", file(scene(n))) for n in range(3)]
    for n in range(3):
        (found,) = copies([file(scene(99))], [file(scene(n))], images)
        assert found is not None and found.name == "image.jpg"


def test_half_of_an_image_in_a_blend_is_no_copy() -> None:
    images = [("sky.jpg", file(scene(1))), ("noisy.jpg", file(noisy(scene(2))))]
    half = Image.blend(scene(1), scene(2), 0.5)
    (found,) = copies([file(scene(1))], [file(half)], images)
    assert found is None
    (found,) = copies([file(scene(1))], [file(scene(2))], images)
    assert found is not None and found.name == "noisy.jpg"
