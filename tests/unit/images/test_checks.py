"""Checks of an image's content, on real photographs and on damaged copies of them."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFilter

from images.checks import Looks, look_at, motif_copy, motif_of
from images.vetting import UnusableImage
from jobs.style import TrainingImage
from sandbox.photographs import photographs as real_photographs
from tests.unit.training.conftest import MakeRun
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from utils.errors import LowQualityData

PHOTOGRAPHS = {
    each.name: Image.open(io.BytesIO(each.content)).convert("RGB") for each in real_photographs()
}


def looks(image: Image.Image) -> Looks:
    """The image at the usual training size."""
    found = look_at(image, resolution=512)
    return dataclasses.replace(found, motif=motif_of(motif_copy(image)))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_sound_photograph_gets_no_warning_and_a_blurred_one_does(name: str) -> None:
    sound = PHOTOGRAPHS[name]
    assert not looks(sound).warnings
    blurred = sound.filter(ImageFilter.GaussianBlur(max(sound.size) / 100))
    assert looks(blurred).warnings == ("is blurred all over; the style will come out soft",)


def test_a_sharp_subject_before_a_soft_background_is_a_sharp_image() -> None:
    sharp = PHOTOGRAPHS["astronaut.jpg"]
    image = sharp.filter(ImageFilter.GaussianBlur(12))
    image.paste(sharp.crop((150, 50, 300, 200)), (150, 50))
    assert not looks(image).warnings


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("RGB", (1, 1)), "too small"),
        (PHOTOGRAPHS["cat.jpg"].resize((200, 100)), "too small"),
        (PHOTOGRAPHS["cat.jpg"].resize((2000, 400)), "too long and narrow"),
        (PHOTOGRAPHS["cat.jpg"].resize((20000, 1)), "too small"),
        (Image.new("RGB", (600, 600), "black"), "a single colour"),
        (Image.new("RGB", (600, 600), "white"), "a single colour"),
    ],
)
def test_an_image_of_which_nothing_can_be_learnt_is_left_out(
    image: Image.Image, reason: str
) -> None:
    with pytest.raises(UnusableImage, match=reason):
        looks(image)


def test_a_nearly_empty_image_is_used_with_a_warning() -> None:
    """A small drawing on a large sheet may be the style."""
    sheet = Image.new("RGB", (600, 600), "white")
    ImageDraw.Draw(sheet).line((290, 290, 330, 330), fill="black", width=3)
    assert looks(sheet).warnings == ("is nearly empty: almost all of it is one colour",)


def test_the_same_pixels_are_known_in_another_file_and_an_edited_copy_by_its_motif() -> None:
    cat, coffee = PHOTOGRAPHS["cat.jpg"], PHOTOGRAPHS["coffee.png"]
    assert looks(cat).pixels == looks(cat.copy()).pixels != looks(coffee).pixels
    buffer = io.BytesIO()
    cat.resize((400, 266)).save(buffer, "JPEG", quality=60)
    assert looks(cat).shows_the_same(looks(Image.open(buffer)))


def test_no_two_photographs_are_taken_for_one() -> None:
    seen = [looks(each) for each in PHOTOGRAPHS.values()]
    alike = [(i, j) for i, a in enumerate(seen) for j, b in enumerate(seen) if a.shows_the_same(b)]
    assert alike == [(i, i) for i in range(len(seen))]


def test_only_images_without_colour_are_grey() -> None:
    grey = {name for name, image in PHOTOGRAPHS.items() if looks(image).is_grey}
    assert grey == {"photographer.png", "moon.png", "coins.png", "grass.jpg"}


# ---- in a run ------------------------------------------------------------------------------------


def images(tmp_path: Path, *images: Image.Image) -> tuple[TrainingImage, ...]:
    """Files of these images, as a run names them."""
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    return tuple(
        TrainingImage(f"s3://media/{n}.png", str(tmp_path / f"{n}.png")) for n in range(len(images))
    )


def test_an_image_that_comes_twice_counts_once_towards_the_least_number(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    cat, coffee = PHOTOGRAPHS["cat.jpg"], PHOTOGRAPHS["coffee.png"]
    run = dataclasses.replace(make_run(), images=images(tmp_path, cat, cat, coffee))
    with pytest.raises(LowQualityData, match=r"1\.png: is the same image as 0\.png"):
        prepare(run, base)


def test_another_version_of_an_image_is_used_with_a_warning(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    cat, coffee = PHOTOGRAPHS["cat.jpg"], PHOTOGRAPHS["coffee.png"]
    run = dataclasses.replace(
        make_run(), images=images(tmp_path, cat, coffee, cat.resize((400, 266)))
    )
    entry = prepare(run, base).entries[2]
    assert entry.status == "warned" and "another version of 0.png" in entry.reasons[0]


def test_a_set_without_colour_is_noticed_and_one_image_without_is_not(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    greys = [PHOTOGRAPHS[name] for name in ("photographer.png", "moon.png", "coins.png")]
    run = dataclasses.replace(make_run(), images=images(tmp_path, *greys))
    assert "without colour" in prepare(run, base).warnings[-1]
    mixed = images(tmp_path, *greys[:2], PHOTOGRAPHS["cat.jpg"])
    assert "colour" not in prepare(dataclasses.replace(run, images=mixed), base).warnings[-1]
