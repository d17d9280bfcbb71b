"""Aspect buckets: an image keeps its shape, and a batch has images of one shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from images.buckets import MOST_STRETCHED, Frame, frame_for
from jobs.style import HyperParameters, TrainingImage
from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import trained
from training.style import objective, trainer
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from training.style.plan import Plan
from training.style.results.lora_formats import model_card

# ---- frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resolution", "frame"),
    [
        ((3000, 3000), 512, Frame(512, 512)),
        ((6000, 4000), 512, Frame(640, 384)),
        ((1080, 1920), 512, Frame(384, 640)),
        ((800, 600), 512, Frame(576, 448)),
        ((4000, 1000), 512, Frame(1024, 256)),
        ((1080, 1920), 768, Frame(576, 1024)),
        ((300, 100), 128, Frame(192, 64)),
        ((300, 100), 64, Frame(64, 64)),
    ],
)
def test_an_image_gets_the_frame_that_is_most_like_it(
    size: tuple[int, int], resolution: int, frame: Frame
) -> None:
    assert frame_for(*size, resolution) == frame


@pytest.mark.parametrize(("resolution", "kept"), [(512, 0.85), (576, 0.8), (768, 0.9), (1024, 0.9)])
def test_frames_are_of_whole_blocks_take_no_more_than_the_square_and_cut_little(
    resolution: int, kept: float
) -> None:
    for stretch in np.geomspace(1 / MOST_STRETCHED, MOST_STRETCHED, 301):
        width, height = round(1000 * stretch), 1000
        frame = frame_for(width, height, resolution)
        assert frame.width % 64 == 0 and frame.height % 64 == 0
        assert 0.75 * resolution**2 <= frame.width * frame.height <= resolution**2
        assert frame.keeps(width, height) >= kept


def test_a_wide_image_is_encoded_wide_and_what_is_round_in_it_stays_round(
    base: BaseModel, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", (700, 200), "black")
    image.paste("white", (300, 50, 400, 150))
    image.paste("red", (0, 0, 100, 200))  # at the left
    path = tmp_path / "wide.png"
    image.save(path)
    seen: list[torch.Tensor] = []
    encode = base.encode_images

    def noted(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(pixels)
        return encode(pixels)

    monkeypatch.setattr(base, "encode_images", noted)
    run = make_run(resolution=128, min_images=1, images=(TrainingImage("wide.png", str(path)),))
    data = prepare(run, base)
    assert [tuple(pixels.shape) for pixels in seen] == [(1, 3, 64, 256)]
    assert data.shapes == ((4, 8, 32),)
    bright = seen[0][0, 2] > 0  # blue: only the white square
    assert abs(int(bright.any(dim=0).sum()) - int(bright.any(dim=1).sum())) <= 1
    assert seen[0][0, 0, 32, 5] > 0.9 and seen[0][0, 0, 32, -5] < -0.9


def test_the_report_has_the_training_size_of_each_image(
    base: BaseModel, make_run: MakeRun, mixed: tuple[TrainingImage, ...], tmp_path: Path
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (100, 250, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    Image.fromarray(noise[:50, :120]).save(tmp_path / "small.png")
    (tmp_path / "page.png").write_bytes(b"<html>")
    more = [
        TrainingImage(name, str(tmp_path / name)) for name in ("cut.png", "small.png", "page.png")
    ]
    data = prepare(make_run(resolution=128, images=(*mixed, *more)), base)
    assert [entry.trained_as for entry in data.entries] == [
        *("192 x 64", "128 x 128", "192 x 64", "64 x 192", "192 x 64"),
        *("192 x 64", "192 x 64", None),
    ]
    cut, small = data.entries[5:7]
    assert (cut.status, small.status) == ("used", "warned")
    assert cut.reasons == ("lost 17% at its edges, to fit 192 x 64 pixels",)
    assert small.reasons[0] == "is smaller than 192 x 64 pixels; enlarging it made it soft"
    assert not any(entry.reasons for entry in data.entries[:5])


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (4, 1), (3, 2), (2, 64), (16, 1)])
def test_every_batch_is_of_one_shape_and_every_image_comes_once_an_epoch(
    batch: int, accumulation: int
) -> None:
    shapes = tuple("wwwwwwwwwwhhhhhs")
    plan = Plan(
        shapes,
        HyperParameters(epochs=4, batch_size=batch, gradient_accumulation_steps=accumulation),
    )
    orders = []
    for epoch in range(4):
        first = epoch * plan.steps_per_epoch
        steps = [plan.batches(first + step) for step in range(plan.steps_per_epoch)]
        batches = [each for step in steps for each in step]
        assert all(len({shapes[index] for index in each}) == 1 for each in batches)
        assert all(1 <= len(each) <= batch for each in batches)
        assert all(1 <= len(step) <= accumulation for step in steps)
        seen = [index for each in batches for index in each]
        assert sorted(seen) == list(range(16))
        # No more batches than the images of each shape need.
        assert len(batches) == sum(-(-count // batch) for count in (10, 5, 1))
        orders.append(seen)
    assert len({tuple(order) for order in orders}) == 4


def test_images_of_several_shapes_train_every_part_of_the_lora(
    base: BaseModel,
    make_run: MakeRun,
    mixed: tuple[TrainingImage, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And each forward pass sees one shape: three wide images in pairs, the two others singly."""
    drawn: list[tuple[int, ...]] = []
    losses = objective.denoising_losses

    def noted(owner: BaseModel, batch: Any, chance: Any, **how: Any) -> Any:
        drawn.append(tuple(chance.noise.shape))
        return losses(owner, batch, chance, **how)

    monkeypatch.setattr(trainer, "denoising_losses", noted)
    run = make_run(resolution=128, images=mixed, batch_size=2, epochs=2)
    result, weights, _ = trained(base, run)
    assert result.steps == 8 and all(weight.any() for weight in weights.values())
    card = model_card(run, base, prepare(run, base), result)
    assert json.loads(card["ss_bucket_info"])["buckets"] == {
        "0": {"resolution": [64, 192], "count": 1},
        "1": {"resolution": [128, 128], "count": 1},
        "2": {"resolution": [192, 64], "count": 3},
    }
    for epoch in (drawn[:4], drawn[4:]):
        assert sorted(epoch) == sorted(
            [(2, 4, 8, 24), (1, 4, 8, 24), (1, 4, 24, 8), (1, 4, 16, 16)]
        )
