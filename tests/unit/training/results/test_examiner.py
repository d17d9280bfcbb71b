"""Looking at the LoRA on its way: nothing of it is lost by a stop, and nothing changes by it."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from jobs.kinds import TrainerOptions
from jobs.layout import PREVIEW_FOLDER
from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import checkpoints, same, stop_after, trained
from training.style.checkpoint import load
from training.style.families.sd15 import BaseModel
from training.style.results import examiner, preview
from training.style.results.examiner import Examiner
from training.style.results.probe import Interrupted, Probe, Probed

OFTEN = {"count": 3, "epochs": 3, "checkpoint_interval": 1, "dropout": 0.1}
PLENTY = 1e6  # of time for samples


@pytest.fixture
def second_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe finds that the second epoch is the best, regardless of the weights."""
    values = {0: 1.0, 1: 0.8, 2: 0.5, 3: 0.6}

    def measure(_: Probe, epoch: int, step: int) -> Probed:
        return Probed(epoch, step, values[epoch])

    monkeypatch.setattr(Probe, "measure", measure)


@pytest.mark.usefixtures("second_is_best")
def test_the_best_checkpoint_is_delivered_where_it_is_asked_for(
    base: BaseModel, make_run: MakeRun
) -> None:
    others = make_run(count=5).images[3:]
    run = make_run(**OFTEN, deliver="best", validation_images=others)
    result, weights, events = trained(base, run)
    second = load(Path(checkpoints(events)[1].folder))
    assert same(weights, {name: second.lora[name] for name in weights})
    assert (result.best_epoch, result.delivered_epoch, result.epochs) == (2, 2, 3)
    result, weights, events = trained(base, make_run(**OFTEN))
    last = load(Path(checkpoints(events)[-1].folder))
    assert same(weights, {name: last.lora[name] for name in weights})
    assert (result.best_epoch, result.delivered_epoch) == (2, 3)
    assert any("deliver: best" in warning for warning in result.warnings)
    assert not last.best


@pytest.mark.usefixtures("second_is_best")
@pytest.mark.parametrize("stop", [5, 8])
def test_a_later_checkpoint_is_enough_to_deliver_an_earlier_one(
    base: BaseModel, make_run: MakeRun, stop: int
) -> None:
    run = make_run(**OFTEN, deliver="best", validation_images=make_run(count=5).images[3:])
    _, whole, _ = trained(base, run)
    _, _, events = trained(base, run, should_stop=stop_after(stop))
    resume = dataclasses.replace(run, claim=2, resume_from=checkpoints(events)[-1].folder)
    result, weights, _ = trained(base, resume)
    assert same(weights, whole) and result.delivered_epoch == 2


@pytest.mark.parametrize("stop", [1, 3, 8])
def test_a_run_stopped_and_resumed_has_found_the_same(
    base: BaseModel, options: TrainerOptions, make_run: MakeRun, stop: int
) -> None:
    run = make_run(**OFTEN, deliver="best", validation_images=make_run(count=5).images[3:])
    whole, best, _ = trained(base, run)
    assert [each.epoch for each in whole.probes] == [0, 1, 2, 3]
    _, _, events = trained(base, run, should_stop=stop_after(stop))
    newest = checkpoints(events)[-1].folder if stop else None
    other = BaseModel.load(options) if stop == 3 else base
    result, weights, _ = trained(other, dataclasses.replace(run, resume_from=newest))
    assert result.probes == whole.probes and same(weights, best)
    assert result.delivered_epoch == whole.delivered_epoch


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_probe_that_a_stop_cut_short_is_made_again_by_the_resumed_run(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    run = make_run(**OFTEN)
    whole, weights, _ = trained(base, run)
    stopped: list[int] = []
    measure = Probe.measure

    def cut_short(self: Probe, epoch: int, step: int) -> Probed:
        if epoch == at:
            stopped.append(step)
            raise Interrupted
        return measure(self, epoch, step)

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "measure", cut_short)
        # The reason comes with the interruption, as from the inbox.
        result, _, events = trained(
            base, run, should_stop=lambda: stop_after(0)() if stopped else None
        )
    assert result.stopped and result.steps == 3 * at
    newest = checkpoints(events)[-1].folder if at else None
    again = trained(base, dataclasses.replace(run, resume_from=newest))
    assert again[0].probes == whole.probes and same(again[1], weights)


def test_looking_changes_no_bit_of_what_is_trained(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(**OFTEN, preview_share=PLENTY, sample_steps=1)
    seen, weights, _ = trained(base, run)
    monkeypatch.setattr(Examiner, "examine", lambda self, state: True)
    blind, same_weights, _ = trained(base, run)
    assert same(weights, same_weights) and seen.losses == blind.losses
    assert seen.samples and not blind.samples


def test_samples_of_checkpoints_are_small_images_that_survive_a_stop(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(
        **OFTEN, preview_share=PLENTY, sample_steps=2, sample_prompts=("a boat", "a tree")
    )
    whole, _, _ = trained(base, run)
    rows = [f"{row}/{n}" for row in ("base", 1, 2, 3) for n in (0, 1)]
    assert sorted(whole.samples) == sorted(rows)
    assert whole.sample_seconds > 0 and whole.probe_seconds > 0
    assert preview.sampled_epochs(whole.samples) == [1, 2, 3]
    with Image.open(io.BytesIO(preview.row_of(whole.samples, "2")[1])) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
    small = Path(run.work_folder) / PREVIEW_FOLDER
    steps = {"0", *(str(each.step) for each in whole.probes[1:])}
    found = {str(path.relative_to(small)) for path in small.rglob("*.*")}
    assert found == {f"{step}/{n}.webp" for step in steps for n in (0, 1)}
    with Image.open(small / "0" / "1.webp") as image:
        assert (image.format, image.size) == ("WEBP", (64, 64))
    # Before the seventh step it is asked before each of the sampler's steps, too: in three rows.
    _, _, events = trained(base, run, should_stop=stop_after(6 + 3 * 2 * 2))
    resume = dataclasses.replace(run, resume_from=checkpoints(events)[-1].folder, preview_share=0.0)
    resumed, _, _ = trained(base, resume)
    kept = {key for key in rows if key[0] in "b12"}
    assert set(resumed.samples) == kept
    assert all(torch.equal(resumed.samples[key], whole.samples[key]) for key in kept)


def test_samples_take_no_more_than_their_share_and_no_long_pause(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not trained(base, make_run(**OFTEN, preview_share=0.0))[0].samples
    monkeypatch.setattr(examiner, "LONGEST_PAUSE_SECONDS", 0.0)
    assert not trained(base, make_run(**OFTEN, preview_share=PLENTY))[0].samples


def test_a_probe_without_memory_is_reported_and_training_goes_on(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any) -> Probed:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Probe, "measure", too_large)
    result, _, _ = trained(base, make_run(epochs=2))
    assert [each.training for each in result.probes] == [None, None]
    assert (result.best_epoch, result.delivered_epoch) == (None, 2)
    assert any("could not be measured" in warning for warning in result.warnings)


def test_samples_that_cannot_be_painted_cost_nothing_but_themselves(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(**OFTEN, preview_share=PLENTY)
    monkeypatch.setattr(Examiner, "_images", lambda self, with_lora: 1 / 0)
    result, _, _ = trained(base, run)
    assert result.epochs == 3 and not result.samples


def test_too_many_rows_of_samples_are_thinned_and_the_newest_stays() -> None:
    samples: dict[str, torch.Tensor] = {}
    for row in ("base", *(str(epoch) for epoch in range(10, 1010, 10))):
        samples = preview.with_row(samples, row, [Image.new("RGB", (64, 64))])
    shown = preview.sampled_epochs(samples)
    assert len(shown) <= preview.MOST_SAMPLED_EPOCHS and shown[-1] == 1000 and shown[0] < 500
    assert preview.row_of(samples, "base")
