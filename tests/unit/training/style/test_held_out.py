"""Held-out images: none of them is trained on in any form, and the best checkpoint needs some."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.style import TrainingImage
from reports.verdict import HELD_OUT
from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import checkpoints, same, stop_after, trained
from training.style import held_out
from training.style.checkpoint import load
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from training.style.results import validation
from training.style.results.report import build_report
from utils.errors import LowQualityData


def another(image: TrainingImage, path: Path, **how: int) -> TrainingImage:
    """The same image in another file."""
    with Image.open(str(image.path)) as opened:
        opened.convert("RGB").save(path, **how)  # type: ignore[arg-type]
    return dataclasses.replace(image, source=f"s3://media/held/{path.name}", path=str(path))


def painting(path: Path, seed: int) -> TrainingImage:
    """A soft random image, as compression changes little of it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(path)
    return TrainingImage(f"s3://media/training/{path.name}", str(path), f"painting {seed}")


@pytest.mark.parametrize("name", ["same.bmp", "same.webp"])
def test_the_pixels_of_a_training_image_in_another_format_are_not_held_out(
    base: BaseModel, make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    how = {"lossless": True} if name.endswith("webp") else {}
    copy = another(make_run().images[1], tmp_path / name, **how)
    found = prepare(make_run(validation_images=(copy,)), base).held_out
    assert found and not found.usable
    assert [(e.status, e.reasons) for e in found.entries] == [("left_out", (held_out.TRAINED_ON,))]


def test_a_compressed_or_smaller_copy_of_a_training_image_is_not_held_out(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    images = tuple(painting(tmp_path / f"{n}.png", n) for n in range(3))
    copy = another(images[2], tmp_path / "copy.jpg", quality=60)
    small = tmp_path / "small.png"
    with Image.open(str(images[1].path)) as opened:
        opened.resize((128, 128)).save(small)
    fresh = painting(tmp_path / "fresh.png", 9)
    others = (copy, dataclasses.replace(copy, path=str(small), source="small.png"), fresh)
    found = prepare(make_run(images=images, validation_images=others), base).held_out
    assert found and [example.source for example in found.usable] == [fresh.source]
    assert [entry.status for entry in found.entries][:2] == ["left_out", "left_out"]
    assert "another version of 2.png, which is trained on" in found.entries[0].reasons[0]
    assert "another version of 1.png, which is trained on" in found.entries[1].reasons[0]


def test_the_best_checkpoint_is_chosen_by_a_tenth_that_is_not_trained_on(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(count=10, deliver="best", epochs=2, checkpoint_interval=1)
    data = prepare(run, base)
    assert (len(data.usable), len(data.held_out.usable if data.held_out else ())) == (9, 1)
    result, _, events = trained(base, run)
    assert result.steps == 18 and all(each.held_out for each in result.probes)
    held = min(result.probes[1:], key=lambda each: each.held_out or 0.0)
    assert result.delivered_epoch == held.epoch
    assert any("1 of 10 images is held out" in warning for warning in result.warnings)
    assert len(load(Path(checkpoints(events)[-1].folder)).state.pictures) == 9
    report = build_report(run, base, data, result)
    assert (report["pictures_used"], report["pictures_held_out"]) == (10, 1)
    reasons = [each["reasons"] for each in report["pictures"]]
    assert sum(HELD_OUT in each for each in reasons) == 1
    assert report["validation_pictures"] == []


def test_the_same_images_are_held_out_in_any_order_and_another_seed_takes_others(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(count=10, deliver="best")
    chosen = [
        {example.identity for example in found.held_out.usable}
        for each in (
            run,
            dataclasses.replace(run, images=run.images[::-1]),
            *(make_run(count=10, deliver="best", seed=seed) for seed in (1, 2, 3)),
        )
        if (found := prepare(each, base)).held_out
    ]
    assert chosen[0] == chosen[1] and len(set(map(frozenset, chosen))) > 1


def test_an_image_with_a_near_copy_in_the_set_is_never_held_out(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    images = [painting(tmp_path / f"{n}.png", n) for n in range(5)]
    images += [another(one, tmp_path / f"copy_{n}.jpg", quality=60) for n, one in enumerate(images)]
    single = painting(tmp_path / "single.png", 9)
    run = make_run(images=(*images, single), deliver="best")
    found = prepare(run, base)
    assert found.held_out and [one.source for one in found.held_out.usable] == [single.source]
    with pytest.raises(LowQualityData, match="0 of which differ"):
        prepare(dataclasses.replace(run, images=tuple(images)), base)


def test_with_too_few_images_the_best_checkpoint_is_refused_with_a_remedy(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(count=9, deliver="best")
    with pytest.raises(LowQualityData, match="9 images can be used.*Send validation_images"):
        prepare(run, base)
    with pytest.raises(LowQualityData):  # its only validation image is trained on
        prepare(dataclasses.replace(run, validation_images=run.images[:1]), base)
    assert not prepare(make_run(count=9), base).held_out


def test_the_intake_reports_held_out_images_and_the_refusal(make_run: MakeRun) -> None:
    found = validation.validate(make_run(count=10, deliver="best", epochs=2))
    assert (found.usable, found.steps, found.problem) == (10, 18, "")
    found = validation.validate(make_run(count=9, deliver="best", epochs=2))
    assert (found.usable, found.steps) == (9, 18) and "validation_images" in found.problem
    images = make_run(count=4).images
    found = validation.validate(make_run(count=3, validation_images=(images[0], images[3])))
    assert [each.status for each in found.validation_images] == ["left_out", "used"]


def test_a_resumed_job_holds_out_the_same_images(base: BaseModel, make_run: MakeRun) -> None:
    run = make_run(count=10, deliver="best", epochs=2, checkpoint_interval=1)
    _, whole, _ = trained(base, run)
    _, _, events = trained(base, run, should_stop=stop_after(12))
    folder = checkpoints(events)[-1].folder
    _, weights, _ = trained(base, dataclasses.replace(run, claim=2, resume_from=folder))
    assert same(whole, weights)


def test_a_job_that_began_with_all_of_its_images_goes_on_with_them(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier releases held none out, and chose by the training images."""
    run = make_run(count=3, deliver="best", epochs=2, checkpoint_interval=1)
    with monkeypatch.context() as earlier:
        earlier.setattr(held_out, "for_the_choice", lambda data, *_: data)
        _, whole, _ = trained(base, run)
        _, _, events = trained(base, run, should_stop=stop_after(4))
    folder = Path(checkpoints(events)[-1].folder)
    assert len(json.loads((folder / "state.json").read_bytes())["pictures"]) == 3
    _, weights, _ = trained(base, dataclasses.replace(run, claim=2, resume_from=str(folder)))
    assert same(whole, weights)
