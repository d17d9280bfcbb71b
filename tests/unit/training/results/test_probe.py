"""The probe: a loss that can be compared, measured without a trace."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch

from jobs.style import TrainingImage
from tests.unit.training.conftest import MakeRun
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from training.style.results import probe
from training.style.results.probe import (
    Interrupted,
    Probe,
    Probed,
    best_of,
    passes,
    verdict,
)
from training.style.trainer import LoRATrainer


def test_the_same_weights_have_the_same_loss_after_any_other_drawing(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(dropout=0.5)
    data = prepare(run, base)
    base.attach(run.parameters)
    first = Probe(base, data).measure(0, 0)
    torch.randn(100)
    assert Probe(base, data).measure(0, 0) == first
    assert first.training is not None and 0.1 < first.training < 10


def test_the_order_of_the_images_does_not_matter_where_all_are_looked_at(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "CPU_PASSES", 16)
    run = make_run(count=4)
    data = prepare(run, base)
    turned = dataclasses.replace(data, usable=data.usable[::-1])
    base.attach(run.parameters)
    values = [Probe(base, each).measure(0, 0).training for each in (data, turned)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_in_batches_it_is_what_it_is_image_by_image_with_fewer_passes(
    base: BaseModel,
    make_run: MakeRun,
    mixed: tuple[TrainingImage, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images of different frames are never in one batch."""
    monkeypatch.setattr(probe, "CPU_PASSES", 16)
    run = make_run(images=mixed, resolution=128)
    data = prepare(run, base)
    assert len(set(data.shapes)) > 1
    base.attach(run.parameters)
    calls: list[int] = []
    handle = base.unet.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    found, counts = [], []
    for sizes in ({"cpu": 1}, probe.BATCHES):
        monkeypatch.setattr(probe, "BATCHES", sizes)
        calls.clear()
        found.append(Probe(base, data).measure(0, 0).training)
        counts.append(list(calls))
    handle.remove()
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert counts[0] == [1] * 16 and sum(counts[1]) == 16
    assert max(counts[1]) == 4 and len(counts[1]) <= 6


def test_it_falls_where_training_learns(base: BaseModel, make_run: MakeRun) -> None:
    run = make_run(count=4, epochs=6, learning_rate=5e-3, checkpoint_interval=2)
    result = LoRATrainer(run, base, prepare(run, base)).train()
    values = [each.training or 0.0 for each in result.probes]
    assert [each.epoch for each in result.probes] == [0, 2, 4, 6]
    assert [each.step for each in result.probes] == [0, 8, 16, 24]
    assert values[-1] < 0.98 * values[0]
    assert not [warning for warning in result.warnings if "learnt next to nothing" in warning]


def test_a_rate_that_teaches_nothing_is_reported(base: BaseModel, make_run: MakeRun) -> None:
    run = make_run(epochs=2, learning_rate=1e-7)
    result = LoRATrainer(run, base, prepare(run, base)).train()
    assert any("learnt next to nothing" in warning for warning in result.warnings)


def test_measuring_leaves_training_as_it_was(base: BaseModel, make_run: MakeRun) -> None:
    run = make_run()
    data = prepare(run, base)
    base.attach(run.parameters)
    unet = base.unet
    unet.mid_block.eval()  # modes are restored one by one

    def condition() -> list[object]:
        return [
            [(name, module.training) for name, module in unet.named_modules()],
            [(name, w.requires_grad, w.grad) for name, w in unet.named_parameters()],
            torch.get_rng_state().tolist(),
            random.getstate(),
            torch.is_grad_enabled(),
        ]

    before = condition()
    Probe(base, data).measure(0, 0)
    assert condition() == before


def test_a_stop_need_not_wait_for_it(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ASK_SECONDS", 0.0)
    run = make_run()
    data = prepare(run, base)
    base.attach(run.parameters)
    with pytest.raises(Interrupted):
        Probe(base, data, lambda: True).measure(0, 0)
    assert base.unet.training


@pytest.mark.parametrize(("images", "expected"), [(1, 4), (4, 16), (5, 16), (16, 16), (200, 16)])
def test_every_image_is_looked_at_once_before_any_twice(images: int, expected: int) -> None:
    chosen = passes(images, 16)
    assert len(chosen) == len(set(chosen)) == expected
    seen = [index for index, _ in chosen]
    counts = [seen.count(index) for index in range(images)]
    assert max(counts) - min(counts) <= 1
    assert {level for _, level in chosen} == {0, 1, 2, 3}
    assert max(seen) < images


def test_of_many_images_evenly_spaced_ones_are_looked_at() -> None:
    seen = [index for index, _ in passes(160, 16)]
    assert seen == list(range(0, 160, 10))


# ---- held-out images ---------------------------------------------------------------------------


def test_held_out_images_are_measured_and_never_trained_on(
    base: BaseModel, make_run: MakeRun
) -> None:
    everything = make_run(count=6).images
    run = make_run(count=3, epochs=1, validation_images=everything[3:])
    data = prepare(run, base)
    assert data.held_out is not None
    assert [entry.source for entry in data.held_out.entries] == [p.source for p in everything[3:]]
    assert data.identities == prepare(run, base).identities
    result = LoRATrainer(run, base, data).train()
    values = [(each.training, each.held_out) for each in result.probes]
    assert all(left and right and left != right for left, right in values)
    assert result.steps == 3


def test_a_training_image_among_them_is_left_out_and_a_broken_one_fails_nothing(
    base: BaseModel, make_run: MakeRun
) -> None:
    images = make_run(count=4).images
    missing = dataclasses.replace(images[3], path=None, problem="could not be found")
    run = make_run(count=3, validation_images=(images[0], missing))
    others = prepare(run, base).held_out
    assert others is not None and not others.usable and not others.warnings
    assert [entry.status for entry in others.entries] == ["left_out", "left_out"]
    assert "training images" in others.entries[0].reasons[0]
    base.attach(run.parameters)
    assert Probe(base, prepare(run, base)).measure(0, 0).held_out is None


# ---- consequences ------------------------------------------------------------------------


def probes(training: list[float | None], others: list[float] | None = None) -> list[Probed]:
    """Measurements ten epochs apart."""
    held: Sequence[float | None] = others or [None] * len(training)
    return [Probed(10 * n, 100 * n, *pair) for n, pair in enumerate(zip(training, held))]


def test_the_best_is_the_lowest_by_held_out_images_and_the_earliest_of_equals() -> None:
    assert best_of(probes([1.0, 0.8, 0.7, 0.7])) == Probed(20, 200, 0.7)
    told_by_others = best_of(probes([1.0, 0.9, 0.8, 0.7], [1.0, 0.9, 0.95, 0.99]))
    assert told_by_others is not None and told_by_others.epoch == 10
    assert best_of(probes([0.1, None, 0.9])) == Probed(20, 200, 0.9)  # the base itself is no LoRA
    assert best_of(probes([1.0])) is None and best_of([]) is None


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (probes([1.0, 1.0, 0.9999]), "learnt next to nothing"),
        (probes([1.0, 1.2, 1.4]), "A lower learning_rate is needed"),
        (probes([1.0, 0.9, 0.8, 0.7], [1.0, 0.9, 0.95, 0.99]), "After epoch 10 the LoRA began"),
        (probes([1.0, 0.8, 0.9]), "got worse after epoch 10"),
        (probes([1.0, None, 0.8]), "could not be measured at 1"),
    ],
)
def test_trouble_is_a_sentence(found: list[Probed], said: str) -> None:
    sentences = verdict(found)
    assert len(sentences) == 1 and said in sentences[0]


@pytest.mark.parametrize(
    "found",
    [
        probes([1.0, 0.9, 0.8]),
        probes([1.0, 0.9, 0.8], [1.0, 0.95, 0.95]),
        probes([1.0, 0.8, 0.801]),
        probes([1.0]),
        [],
    ],
)
def test_training_that_goes_well_needs_no_word(found: list[Probed]) -> None:
    assert not verdict(found)
