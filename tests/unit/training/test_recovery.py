"""Memory that runs out and numbers that run away: training finds a way round, and reports it."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from jobs.kinds import TrainerOptions
from jobs.style import HyperParameters, TrainingImage
from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import (
    checkpoints,
    close,
    in_one_go,
    lora_of,
    same,
    spoil,
    stop_after,
    trained,
)
from training.style import checkpoint, recovery, trainer
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from training.style.objective import denoising_losses
from training.style.plan import Course, Plan
from training.style.results import report
from training.style.results.probe import Probe, Probed
from utils.errors import CheckpointUnusable, GpuOutOfMemory, TrainingDiverged
from utils.events import Event, Started


class SmallMemory:
    """Forward passes run out of memory as on a GPU that is too small for them.

    Attributes:
        seen: Images of each pass that was tried.
        armed: Whether memory is short at present.
    """

    def __init__(
        self, unet: Any, *, images: int, needs_checkpointing: bool = False, after: int = 0
    ) -> None:
        """Describe the limits.

        Args:
        images: As many fit.
        needs_checkpointing: And only with gradient checkpointing.
        after: Passes that go well first: something else takes memory from then on.
        """
        self._unet, self._images, self._after = unet, images, after
        self._needs_checkpointing = needs_checkpointing
        self.seen: list[int] = []

    @contextmanager
    def __call__(self) -> Iterator[list[int]]:
        """Short until the block ends."""
        handle = self._unet.register_forward_pre_hook(self._allocate)
        try:
            yield self.seen
        finally:
            handle.remove()

    def _allocate(self, unet: Any, arguments: tuple[Tensor, ...]) -> None:
        if not unet.training:  # the probe, of which these tests are not
            return
        self.seen.append(len(arguments[0]))
        short = len(arguments[0]) > self._images or (
            self._needs_checkpointing and not unet.is_gradient_checkpointing
        )
        if short and len(self.seen) > self._after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def rates_of(run: Callable[[], Any]) -> list[float]:
    """The learning rate of each update that a run makes."""
    rates: list[float] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    try:
        run()
    finally:
        handle.remove()
    return rates


# ---- memory --------------------------------------------------------------------------------------


def test_without_memory_checkpointing_comes_first_and_changes_nothing_but_roundings(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(count=4, batch_size=2, dropout=0.1)
    _, roomy, _ = trained(base, run)
    with SmallMemory(base.unet, images=2, needs_checkpointing=True)() as seen:
        result, weights, _ = trained(base, run)
    assert seen[:2] == [2, 2] and set(seen) == {2}
    assert close(weights, roomy)
    assert result.parameters == run.parameters
    assert [w for w in result.warnings if "emory" in w] == [
        "Memory ran out: from epoch 1 on, gradient checkpointing was on."
    ]


def test_then_batches_are_halved_until_they_fit_and_a_step_has_as_many_images_as_before(
    base: BaseModel, make_run: MakeRun
) -> None:
    """Started again, the run is the one that would have been asked for so."""
    run = make_run(count=8, batch_size=4, dropout=0.1)
    with SmallMemory(base.unet, images=1)() as seen:
        result, weights, events = trained(base, run)
    assert seen[:4] == [4, 4, 2, 1]
    small = dataclasses.replace(run.parameters, batch_size=1, gradient_accumulation_steps=4)
    assert result.parameters == small
    assert (result.steps, result.epochs, result.resumed_from) == (4, 2, None)
    _, asked_for, _ = trained(base, dataclasses.replace(run, parameters=small))
    assert close(weights, asked_for)
    assert result.warnings[-2:] == (
        "Memory ran out: from epoch 1 on, a batch had 2 instead of 4 images, and a step 2 "
        "batches.",
        "Memory ran out: from epoch 1 on, a batch had 1 instead of 2 images, and a step 4 "
        "batches.",
    )
    starts = [event for event in events if isinstance(event, Started)]
    assert [len(start.warnings) for start in starts] == sorted(len(s.warnings) for s in starts)
    assert {start.total for start in starts} == {4}


def test_it_goes_on_from_the_newest_checkpoint_and_ends_where_a_roomy_run_ends(
    base: BaseModel, make_run: MakeRun
) -> None:
    """Up to rounding, since the noise of images of one shape is drawn at once.

    (The LoRA's dropout is off: its masks are drawn batch by batch.)
    """
    run = make_run(count=6, epochs=4, batch_size=2, dropout=0.0, checkpoint_interval=1)
    roomy, expected, _ = trained(base, run)
    # Three passes an epoch; the memory goes in the third epoch.
    with SmallMemory(base.unet, images=1, after=7)() as seen:
        result, weights, events = trained(base, run)
    assert seen[:11] == [2] * 9 + [1, 1]
    assert close(weights, expected) and not same(weights, expected)
    assert result.losses == pytest.approx(roomy.losses, rel=1e-3)
    assert (result.steps, result.resumed_from) == (12, None)
    assert [saved.name for saved in checkpoints(events)] == [
        *("epoch-0001", "epoch-0002", "epoch-0002-retake-1", "epoch-0002-retake-2"),
        *("epoch-0003-retake-2", "epoch-0004-retake-2"),
    ]
    assert "from epoch 3 on, a batch had 1 instead of 2 images" in result.warnings[-1]


def test_smaller_batches_of_several_shapes_change_nothing_but_rounding(
    base: BaseModel, make_run: MakeRun, mixed: tuple[TrainingImage, ...]
) -> None:
    how = {"batch_size": 3, "gradient_accumulation_steps": 2, "dropout": 0.0, "epochs": 1}
    run = make_run(images=mixed, resolution=128, **how)
    roomy, expected, _ = trained(base, run)
    with SmallMemory(base.unet, images=1)():
        result, weights, _ = trained(base, run)
    assert result.steps == roomy.steps == 2  # three wide images and one, then the last
    assert result.parameters.batch_size == 1
    assert result.losses == pytest.approx(roomy.losses, rel=1e-3)
    assert close(weights, expected)


def test_recovery_does_not_need_the_checkpoint_on_the_disk(
    base: BaseModel, make_run: MakeRun
) -> None:
    """The desk removes each one when it is uploaded."""
    run = make_run(count=4, batch_size=2, checkpoint_interval=1, dropout=0.0)
    _, expected, _ = trained(base, run)
    data = prepare(run, base)

    def uploaded(event: Any) -> None:
        for saved in checkpoints([event]):
            for file in Path(saved.folder).iterdir():
                file.unlink()

    with SmallMemory(base.unet, images=1, after=3)():
        recovery.train(run, base, data, emit=uploaded)
    assert close(lora_of(base), expected)


def test_another_worker_goes_on_with_the_smaller_batches_and_to_the_same_bits(
    base: BaseModel, options: TrainerOptions, make_run: MakeRun
) -> None:
    run = make_run(count=5, epochs=3, batch_size=2, dropout=0.1, caption_dropout=0.5)
    with SmallMemory(base.unet, images=1)():
        whole, weights, _ = trained(base, run)
        _, _, events = trained(base, run, should_stop=stop_after(6))
    saved = checkpoints(events)[-1]
    assert saved.name == "epoch-0001-step-0004-retake-2"
    roomy = BaseModel.load(options)
    again = dataclasses.replace(run, claim=2, resume_from=saved.folder)
    result, resumed, events = trained(roomy, again)
    assert same(resumed, weights)
    assert result.parameters == whole.parameters and result.losses == whole.losses
    assert result.warnings == whole.warnings and result.resumed_from == 1
    assert [each.name for each in checkpoints(events)] == ["epoch-0003-retake-2"]
    # A worker that has none of this begins afresh, as asked.
    assert trained(roomy, dataclasses.replace(run, claim=3))[0].parameters == run.parameters
    with pytest.raises(CheckpointUnusable, match="batch_size was 2, is 1"):
        trained(roomy, make_run(count=5, epochs=3, batch_size=1, resume_from=saved.folder))


def test_renamed_images_are_resumed_in_the_order_in_which_the_run_began(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(count=5, epochs=3, batch_size=2, dropout=0.1)
    _, weights, _ = trained(base, run)
    _, _, events = trained(base, run, should_stop=stop_after(4))
    renamed = tuple(
        dataclasses.replace(image, source=f"s3://media/{number}.png")
        for number, image in enumerate(reversed(run.images))
    )
    again = dataclasses.replace(
        run, claim=2, images=renamed, resume_from=checkpoints(events)[-1].folder
    )
    _, resumed, _ = trained(base, again)
    assert same(resumed, weights)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (slice(1, 6), r"5 then, 5 now.*new are image_5\.png; 1 missing"),
        (slice(0, 4), r"5 then, 4 now.*1 missing"),
        (slice(0, 6), r"5 then, 6 now.*new are image_5\.png"),
    ],
)
def test_a_run_with_other_images_is_not_resumed_and_the_difference_is_named(
    base: BaseModel, make_run: MakeRun, images: slice, reason: str
) -> None:
    _, _, events = trained(base, make_run(count=5), should_stop=stop_after(5))
    saved = checkpoints(events)[-1].folder
    other = dataclasses.replace(make_run(count=5), images=make_run(count=10).images[images])
    with pytest.raises(CheckpointUnusable, match=reason):
        trained(base, dataclasses.replace(other, claim=2, resume_from=saved))


def test_a_start_that_was_changed_is_a_checkpoint_from_which_the_same_run_follows(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(count=3, batch_size=3, dropout=0.1)
    with SmallMemory(base.unet, images=1)():
        _, weights, events = trained(base, run)
    first = checkpoints(events)[-2]
    assert (first.name, first.epoch, first.step) == ("epoch-0000-retake-2", 0, 0)
    result, resumed, _ = trained(base, dataclasses.replace(run, resume_from=first.folder))
    assert same(resumed, weights) and result.resumed_from == 0


def test_when_not_even_one_image_fits_the_run_fails_for_want_of_memory(
    base: BaseModel, make_run: MakeRun
) -> None:
    with SmallMemory(base.unet, images=0)() as seen:
        with pytest.raises(GpuOutOfMemory, match="even a single image"):
            trained(base, make_run(count=4, batch_size=4))
    assert seen == [4, 4, 2, 1]


def test_a_run_that_ran_out_of_memory_is_freed_before_the_next_start(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the exception is kept, as a log handler may."""
    alive: list[weakref.ref[Any]] = []
    kept: list[Exception] = []
    left: list[int] = []

    def hungry(*arguments: Any, **named: Any) -> Any:
        if alive and not left:
            left.append(sum(each() is not None for each in alive))
        losses, weighted = denoising_losses(*arguments, **named)
        if not alive:
            alive.extend((weakref.ref(losses), weakref.ref(weighted)))
            alive.extend(weakref.ref(w) for w in base.unet.parameters() if w.requires_grad)
            in_a_circle = [weighted]
            in_a_circle.append(cast(Any, in_a_circle))
            kept.append(torch.OutOfMemoryError("CUDA out of memory."))
            raise kept[0]
        return losses, weighted

    monkeypatch.setattr(trainer, "denoising_losses", hungry)
    gc.disable()  # cycles must be broken up on purpose
    try:
        trained(base, make_run(epochs=1))
    finally:
        gc.enable()
    assert len(alive) > 10 and left == [0]


@pytest.mark.parametrize(
    ("batch", "accumulation", "parts"),
    [
        (16, 1, [(8, 2), (4, 4), (2, 8), (1, 16)]),
        (6, 2, [(3, 4), (1, 12)]),
        (7, 1, [(1, 7)]),
        (16, 64, [(8, 128), (4, 256), (2, 512), (1, 1024)]),
    ],
)
def test_smaller_batches_leave_every_step_its_images(
    batch: int, accumulation: int, parts: list[tuple[int, int]]
) -> None:
    asked = HyperParameters(batch_size=batch, gradient_accumulation_steps=accumulation, epochs=2)
    found = []
    smaller = Course.of(asked).with_less_memory(1, checkpointing_is_on=True)
    while smaller:
        now, planned = smaller.parameters, smaller.planned
        smaller = smaller.with_less_memory(1, checkpointing_is_on=True)
        found.append((now.batch_size, now.gradient_accumulation_steps))
        assert batch % now.batch_size == 0
        shapes = tuple(index % 3 for index in range(13))
        before, after = Plan(shapes, asked), Plan(shapes, planned)
        steps = range(before.total_steps)
        assert [before.batches(step) for step in steps] == [after.batches(step) for step in steps]
    assert found == parts


# ---- divergence ----------------------------------------------------------------------------------


def test_a_divergence_goes_back_to_the_last_checkpoint_and_on_at_half_the_rate(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(count=3, epochs=6, checkpoint_interval=2)
    # Three steps an epoch: the second checkpoint is at step 12, and step 14 is the last good one;
    # the sixth epoch's end brings it out.
    spoil(monkeypatch, lambda call: 14 <= call < 17)
    monkeypatch.setattr(trainer, "MAX_SKIPPED_IN_A_ROW", 2)
    outcome: list[Any] = []
    rates = rates_of(lambda: outcome.append(trained(base, run)))
    result, weights, events = outcome[0]
    plan = Plan((0,) * 3, run.parameters)
    assert rates == [plan.learning_rate(step) for step in range(18)] + [
        plan.learning_rate(step) / 2 for step in range(12, 18)
    ]
    assert all(weight.isfinite().all() for weight in weights.values())
    assert (result.epochs, result.steps, result.skipped_steps) == (6, 18, 0)
    assert result.parameters == dataclasses.replace(run.parameters, learning_rate=5e-4)
    assert result.warnings[-1] == (
        "Training diverged: from epoch 5 on, it was repeated at half the learning rate, 0.0005."
    )
    names = [saved.name for saved in checkpoints(events)]
    assert names == ["epoch-0002", "epoch-0004", "epoch-0004-retake-1", "epoch-0006-retake-1"]


class Measurements:
    """Takes the place of the probe: its values by start and epoch; the last start's are repeated.

    Args:
        starts: The loss on the training images by epoch, for each start of the run.
    """

    def __init__(self, *starts: dict[int, float]) -> None:
        self._starts = list(starts)

    def __call__(self, epoch: int, step: int) -> Probed:
        found = Probed(epoch, step, self._starts[0][epoch])
        if len(self._starts) > 1 and epoch == max(self._starts[0]):
            del self._starts[0]
        return found


GOOD = {0: 1.0, 2: 0.9, 4: 0.8, 6: 0.7}


def test_a_loss_that_climbs_and_stays_is_a_divergence_although_it_is_finite(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(epochs=6, checkpoint_interval=2)
    monkeypatch.setattr(Probe, "measure", Measurements({0: 1.0, 2: 1.6, 4: 1.7}, GOOD))
    result, weights, events = trained(base, run)
    monkeypatch.setattr(Probe, "measure", Measurements(GOOD))
    _, expected, _ = trained(base, make_run(epochs=6, checkpoint_interval=2, learning_rate=5e-4))
    assert same(weights, expected), "no checkpoint on the way up is a place to go back to"
    names = [saved.name for saved in checkpoints(events)]
    assert names[0] == "epoch-0000-retake-1"
    assert any("at half the learning rate" in warning for warning in result.warnings)


def test_a_climb_goes_back_to_the_checkpoint_before_it(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    climb = {0: 1.0, 2: 0.9, 4: 1.6, 6: 1.6}
    monkeypatch.setattr(Probe, "measure", Measurements(climb, GOOD))
    result, _, events = trained(base, make_run(epochs=6, checkpoint_interval=2))
    names = [saved.name for saved in checkpoints(events)]
    assert names[:2] == ["epoch-0002", "epoch-0002-retake-1"]
    assert [each.training for each in result.probes] == [1.0, 0.9, 0.8, 0.7]


def test_a_peak_that_passes_is_no_divergence_but_at_the_end_it_is_one(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(epochs=6, checkpoint_interval=2)
    monkeypatch.setattr(Probe, "measure", Measurements(GOOD | {2: 1.6}))
    result, _, _ = trained(base, run, through=in_one_go)
    assert result.epochs == 6
    monkeypatch.setattr(Probe, "measure", Measurements(GOOD | {6: 1.6}))
    with pytest.raises(TrainingDiverged, match="after epoch 6 .* is 1.6000; without the LoRA"):
        trained(base, run, through=in_one_go)


def test_the_checkpoint_of_a_resumed_run_is_as_it_was_when_it_is_needed_again(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, whether the steps since have been few or many."""
    monkeypatch.setattr(trainer, "MAX_SKIPPED_IN_A_ROW", 2)
    run = make_run(count=6, epochs=2, dropout=0.1)
    _, _, events = trained(base, run, should_stop=stop_after(4))
    again = dataclasses.replace(run, claim=2, resume_from=checkpoints(events)[-1].folder)
    spoil(monkeypatch, lambda call: call < 3)
    _, at_once, _ = trained(base, again)
    spoil(monkeypatch, lambda call: 5 <= call < 8)
    result, later, _ = trained(base, again)
    assert same(at_once, later)
    assert result.resumed_from == 0 and "from epoch 1 on" in result.warnings[-1]


def test_without_a_checkpoint_it_begins_again_at_half_the_rate(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what the lower rate would have given."""
    run = make_run(epochs=4)
    spoil(monkeypatch, lambda call: 3 <= call < 6)  # an epoch without a finite loss
    result, weights, events = trained(base, run)
    slow = make_run(epochs=4, learning_rate=5e-4)
    _, expected, _ = trained(base, slow)
    assert same(weights, expected)
    assert result.parameters == slow.parameters and result.resumed_from is None
    assert checkpoints(events)[0].name == "epoch-0000-retake-1"


def test_a_second_divergence_ends_the_job(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda call: call >= 3)
    run = make_run(epochs=3)
    events: list[Event] = []
    with pytest.raises(TrainingDiverged, match="epoch 1 .* Half of the rate asked for has been"):
        recovery.train(run, base, prepare(run, base), emit=events.append)
    assert sum(isinstance(event, Started) for event in events) == 2


def test_once_means_once_in_a_job_and_not_once_a_worker(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(epochs=6, checkpoint_interval=1)
    spoil(monkeypatch, lambda call: 3 <= call < 6)
    _, _, events = trained(base, run, should_stop=stop_after(8))
    saved = checkpoints(events)[-1]
    assert saved.name == "epoch-0001-step-0005-retake-1"
    spoil(monkeypatch, lambda call: call >= 4)
    again = dataclasses.replace(run, claim=2, resume_from=saved.folder)
    events.clear()
    with pytest.raises(TrainingDiverged, match="Half of the rate"):
        recovery.train(again, base, prepare(again, base), emit=events.append)
    assert sum(isinstance(event, Started) for event in events) == 1
    base.detach()
    spoil(monkeypatch, lambda call: False)
    result, _, _ = trained(base, again)
    assert result.parameters.learning_rate == run.parameters.learning_rate / 2
    assert "half the learning rate" in result.warnings[-1]


def test_a_stop_in_mid_trouble_is_no_place_to_go_back_to(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint is void from the new start on: the restart's own comes later in the order."""
    monkeypatch.setattr(trainer, "MAX_SKIPPED_IN_A_ROW", 3)
    run = make_run(count=10, epochs=2)
    spoil(monkeypatch, lambda call: call >= 6)
    _, _, events = trained(base, run, should_stop=stop_after(8))
    saved = checkpoints(events)[-1]
    assert not checkpoint.load(Path(saved.folder)).is_sound
    spoil(monkeypatch, lambda call: call < 2)
    again = dataclasses.replace(run, claim=2, resume_from=saved.folder)
    result, weights, events = trained(base, again)
    assert "from epoch 1 on" in result.warnings[-1]
    assert checkpoints(events)[0].name == "epoch-0000-retake-1"
    spoil(monkeypatch, lambda call: False)
    assert same(weights, trained(base, make_run(count=10, epochs=2, learning_rate=5e-4))[1])


def test_no_checkpoint_is_made_between_skipped_steps_but_at_the_next_sound_epoch(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda call: call == 5)  # the last step of the second epoch
    _, _, events = trained(base, make_run(epochs=4, checkpoint_interval=2), through=in_one_go)
    assert [saved.name for saved in checkpoints(events)] == ["epoch-0003", "epoch-0004"]
    folders = [Path(saved.folder) for saved in checkpoints(events)]
    assert all(checkpoint.load(folder).is_sound for folder in folders)


def test_weights_that_are_no_numbers_are_a_divergence_and_never_a_checkpoint(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "fast", False)  # else the network has copies of the weights
    data = prepare(run := make_run(epochs=2, checkpoint_interval=1), base)
    events: list[Any] = []
    steps = itertools.count()

    def spoil_a_weight() -> None:
        """Before the last step of the second epoch."""
        if next(steps) == 5:
            weight = next(w for w in base.unet.parameters() if w.requires_grad)
            weight.data[0] = torch.inf

    with pytest.raises(TrainingDiverged, match="after epoch 2 the weights are not finite"):
        in_one_go(run, base, data, emit=events.append, should_stop=spoil_a_weight)
    assert [saved.name for saved in checkpoints(events)] == ["epoch-0001"]


def test_one_job_may_run_out_of_memory_and_diverge(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(count=4, epochs=3, batch_size=2, checkpoint_interval=1)
    spoil(monkeypatch, lambda call: 4 <= call < 8)  # the second epoch, in batches of one image
    with SmallMemory(base.unet, images=1)():
        result, _, events = trained(base, run)
    assert result.parameters == dataclasses.replace(
        run.parameters, batch_size=1, gradient_accumulation_steps=2, learning_rate=5e-4
    )
    assert len({saved.name for saved in checkpoints(events)}) == len(checkpoints(events))
    data = prepare(run, base)
    content = report.build_report(run, base, data, result)
    assert content["hyperparameters"]["batch_size"] == 1
    assert content["hyperparameters_asked"]["batch_size"] == 2
    told = json.dumps(content["warnings"])
    assert "gradient checkpointing" in told and "1 instead of 2" in told and "diverged" in told


def test_a_rate_that_cannot_be_halved_is_left_alone() -> None:
    assert Course.of(HyperParameters(learning_rate=1e-7)).at_half_the_rate(1) is None


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_that_is_too_small_training_finds_a_batch_that_fits_and_leaves_no_memory(
    stand_in: Path, make_run: MakeRun
) -> None:
    base = BaseModel.load(TrainerOptions(str(stand_in), gradient_checkpointing="false"))
    run = make_run(count=10, epochs=2, batch_size=8, resolution=512)
    data = prepare(run, base)

    def peak(batch_size: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        parameters = dataclasses.replace(run.parameters, batch_size=batch_size, epochs=1)
        in_one_go(dataclasses.replace(run, parameters=parameters), base, data)
        base.take_off()
        return torch.cuda.max_memory_reserved()

    most, some = peak(8), peak(2)
    assert some < most
    total = torch.cuda.get_device_properties(0).total_memory
    base.detach()
    before = torch.cuda.memory_allocated()
    try:
        # Too little for eight images without checkpointing, and enough for two.
        torch.cuda.set_per_process_memory_fraction((some + most) / 2 / total)
        result = recovery.train(run, base, data)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.steps == 4 and any("Memory ran out" in each for each in result.warnings)
    base.detach()
    assert not base.drifted
    assert torch.cuda.memory_allocated() <= before + 2**20
