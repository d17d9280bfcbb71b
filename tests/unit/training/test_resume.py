"""Stopping and resuming: anywhere, and to the same bits as a run that was not stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.kinds import TrainerOptions
from jobs.style import TrainingImage
from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import (
    HalfPrecision,
    Weights,
    checkpoints,
    same,
    spoil,
    stop_after,
    trained,
)
from training.style import trainer
from training.style.checkpoint import load
from training.style.families.sd15 import BaseModel
from training.style.plan import Course
from utils.errors import CheckpointUnusable, StopReason
from utils.events import Started

HARD = {  # three frames, dropout, captions dropped, tags shuffled, odd batches: everything at once
    "resolution": 128,
    "epochs": 3,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "caption_dropout": 0.5,
    "shuffle_tags": True,
    "trigger_word": "inkstyle",
}  # two steps an epoch, each of two batches: three wide images, a high one and a square one


@pytest.fixture(scope="module")
def unbroken() -> dict[str, Any]:
    """Filled by the first test that needs it: the hard run without a stop."""
    return {}


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_stopped_anywhere_and_resumed_ends_with_the_same_bits(
    base: BaseModel,
    options: TrainerOptions,
    make_run: MakeRun,
    mixed: tuple[TrainingImage, ...],
    unbroken: dict[str, Any],
    stop: int,
) -> None:
    run = make_run(**HARD, images=mixed)
    if not unbroken:
        unbroken["result"], unbroken["weights"], _ = trained(base, run)
    stopped, _, events = trained(base, run, should_stop=stop_after(stop))
    assert (stopped.stopped, stopped.steps) == (StopReason.SHUTDOWN, stop)
    saved = checkpoints(events)[-1]
    name = f"epoch-{stop // 2:04d}" + (f"-step-{stop:04d}" if stop % 2 else "")
    assert (saved.name, saved.epoch, saved.step) == (name, stop // 2, stop)

    torch.manual_seed(999)  # another process, another claim
    again = dataclasses.replace(run, claim=2, resume_from=saved.folder)
    result, weights, events = trained(BaseModel.load(options) if stop == 1 else base, again)
    assert same(weights, unbroken["weights"])
    assert result.losses == unbroken["result"].losses
    assert (result.resumed_from, result.steps, result.epochs) == (stop // 2, 6, 3)
    started = next(event for event in events if isinstance(event, Started))
    assert (started.facts["epoch"], started.done, started.total) == (stop // 2, stop, 6)


def test_a_run_stopped_at_every_step_ends_with_the_same_bits(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(count=3, epochs=2, dropout=0.2)
    _, whole, _ = trained(base, run)
    resume_from: str | None = None
    weights: Weights = {}
    for claim in range(1, 7):
        part = dataclasses.replace(run, claim=claim, resume_from=resume_from)
        result, weights, events = trained(base, part, should_stop=stop_after(1))
        resume_from = checkpoints(events)[-1].folder
    assert result.stopped is None  # the sixth step was the last
    assert same(weights, whole)


def test_skipped_steps_and_the_sums_of_a_half_epoch_survive_a_stop(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(count=3, epochs=2)
    spoil(monkeypatch, lambda call: call == 1)
    whole, weights, _ = trained(base, run)
    spoil(monkeypatch, lambda call: call == 1)
    _, _, events = trained(base, run, should_stop=stop_after(2))
    saved = checkpoints(events)[-1]
    spoil(monkeypatch, lambda call: False)
    result, again, _ = trained(base, dataclasses.replace(run, resume_from=saved.folder))
    assert same(again, weights) and result.losses == whole.losses
    assert result.skipped_steps == whole.skipped_steps == 1


def test_with_a_gradient_scaler_the_first_steps_are_skipped_and_a_stop_keeps_its_scale(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A huge scale overflows the gradients: the scaler halves it until they are finite."""
    monkeypatch.setattr(base, "fast", False)  # the fast path needs no autocast, which overflows
    half = HalfPrecision(2.0**22)
    monkeypatch.setattr(trainer, "one_run_accelerator", half)
    run = make_run(count=4, epochs=3)
    whole, weights, _ = trained(base, run)
    assert 1 <= whole.skipped_steps <= 8, whole.skipped_steps
    final = half.last
    _, _, events = trained(base, run, should_stop=stop_after(whole.skipped_steps + 1))
    saved = checkpoints(events)[-1]
    result, again, _ = trained(base, dataclasses.replace(run, resume_from=saved.folder))
    assert same(again, weights) and half.last == final
    assert (result.skipped_steps, result.losses) == (whole.skipped_steps, whole.losses)


def test_a_stop_before_the_first_step_saves_nothing(base: BaseModel, make_run: MakeRun) -> None:
    result, _, events = trained(base, make_run(), should_stop=stop_after(0))
    assert (result.stopped, result.steps, result.loss) == (StopReason.SHUTDOWN, 0, None)
    assert result.steps_per_second is None and not checkpoints(events)


def test_checkpoints_come_at_their_interval_and_at_the_end_and_never_twice(
    base: BaseModel, make_run: MakeRun
) -> None:
    _, _, events = trained(base, make_run(epochs=5, checkpoint_interval=2))
    names = [saved.name for saved in checkpoints(events)]
    assert names == ["epoch-0002", "epoch-0004", "epoch-0005"]
    _, _, events = trained(
        base, make_run(epochs=4, checkpoint_interval=2), should_stop=stop_after(6)
    )
    assert [saved.name for saved in checkpoints(events)] == ["epoch-0002"]


def test_a_checkpoint_holds_the_trained_weights_and_whose_they_are(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(epochs=1, claim=5)
    _, weights, events = trained(base, run)
    saved = load(Path(checkpoints(events)[-1].folder))
    assert same(dict(sorted(saved.lora.items())), dict(sorted(weights.items())))
    assert (saved.state.task_id, saved.state.claim) == ("task-1", 5)
    assert saved.state.course == Course.of(run.parameters)
    assert saved.state.base_model == base.hash


def test_a_checkpoint_of_other_images_or_parameters_is_refused(
    base: BaseModel, make_run: MakeRun
) -> None:
    _, _, events = trained(base, make_run(epochs=1))
    folder = checkpoints(events)[-1].folder
    with pytest.raises(CheckpointUnusable, match="3 then, 4 now"):
        trained(base, make_run(epochs=1, count=4, resume_from=folder))
    with pytest.raises(CheckpointUnusable, match="epochs was 1, is 2"):
        trained(base, make_run(epochs=2, resume_from=folder))


def test_resuming_a_finished_run_trains_nothing_more(base: BaseModel, make_run: MakeRun) -> None:
    run = make_run(epochs=2)
    first, weights, events = trained(base, run)
    again = dataclasses.replace(run, resume_from=checkpoints(events)[-1].folder)
    result, same_weights, events = trained(base, again)
    assert same(weights, same_weights)
    assert (result.steps, result.losses) == (first.steps, first.losses)
    assert not checkpoints(events)


def test_a_checkpoint_is_not_continued_with_another_vae_or_text_encoder(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(epochs=2, checkpoint_interval=1)
    _, _, events = trained(base, run, should_stop=stop_after(4))
    again = dataclasses.replace(run, claim=2, resume_from=checkpoints(events)[-1].folder)
    monkeypatch.setattr(base, "encoders_hash", "cd" * 32)
    with pytest.raises(CheckpointUnusable, match="VAE or text encoder are others"):
        trained(base, again)
