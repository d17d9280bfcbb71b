"""The training loop: it learns, it clips, it stops within a step, and it resumes to the same
bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.unit.training.conftest import MakeRun
from training import loop_state, trainer
from training.base_model import BaseModel
from training.checkpoint import load
from training.dataset import Dataset, prepare
from training.lora_config import HyperParameters, TrainerOptions, TrainingRun
from training.objective import denoising_losses, min_snr_weights
from training.plan import Plan
from training.trainer import LoRATrainer, TrainingResult
from utils.errors import CheckpointUnusable, StopReason, TrainingDiverged, TrainingFailed
from utils.events import CheckpointSaved, Event, Progress, Stage, Started

Weights = dict[str, Tensor]


def lora_of(base: BaseModel) -> Weights:
    """A copy of the attached LoRA's weights."""
    weights = base.unet.named_parameters()
    return {name: weight.detach().clone() for name, weight in weights if "lora_" in name}


def same(left: Weights, right: Weights) -> bool:
    """Whether two LoRAs are equal bit for bit."""
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def stop_after(checks: int) -> Callable[[], StopReason | None]:
    """Answers `None` so many times, then asks to stop."""
    answers = iter([None] * checks)
    return lambda: next(answers, StopReason.SHUTDOWN)


def trained(
    base: BaseModel, run: TrainingRun, **how: Any
) -> tuple[TrainingResult, Weights, list[Event]]:
    """One whole run, after which the base is bare again."""
    events: list[Event] = []
    try:
        result = LoRATrainer(run, base, prepare(run, base), emit=events.append, **how).train()
        return result, lora_of(base), events
    finally:
        base.detach()


def checkpoints(events: list[Event]) -> list[CheckpointSaved]:
    """The checkpoints that a run told of."""
    return [event for event in events if isinstance(event, CheckpointSaved)]


# ---- learning
# --------------------------------------------------------------------------------------


def fixed_loss(base: BaseModel, data: Dataset) -> float:
    """The loss over every picture at four fixed timesteps and fixed noise."""
    base.unet.eval()
    losses = []
    for index in range(len(data.usable)):
        for timestep in (100, 300, 500, 700):
            latents, text = data.batch([index])
            noise = torch.randn(
                latents.mean.shape, generator=torch.Generator().manual_seed(timestep)
            )
            steps = torch.tensor([timestep])
            noisy = base.scheduler.add_noise(latents.mean, noise, steps)
            with torch.no_grad():
                predicted = base.unet(noisy, steps, encoder_hidden_states=text).sample
            losses.append(float((predicted - noise).pow(2).mean()))
    return float(np.mean(losses))


def test_ten_pictures_teach_the_lora_every_part_of_it_and_nothing_else(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(count=10, epochs=5, learning_rate=5e-3)
    data = prepare(run, base)
    frozen = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    before = fixed_loss(base, data)
    result = LoRATrainer(run, base, data).train()
    after = fixed_loss(base, data)
    assert after < 0.95 * before
    assert result.losses[-1] < result.losses[0]
    lora = lora_of(base)
    assert all(weight.any() for weight in lora.values())
    base.detach()
    assert all(torch.equal(base.unet.state_dict()[name], frozen[name]) for name in frozen)


def test_the_same_run_twice_gives_the_same_weights_on_a_warm_and_on_a_fresh_base(
    base: BaseModel, options: TrainerOptions, make_run: MakeRun
) -> None:
    run = make_run(count=3, epochs=2)
    _, first, _ = trained(base, run)
    torch.manual_seed(12345)  # what another run left behind
    _, again, _ = trained(base, run)
    _, fresh, _ = trained(BaseModel.load(options), run)
    assert same(first, again) and same(first, fresh)


def test_another_seed_gives_other_weights(base: BaseModel, make_run: MakeRun) -> None:
    assert not same(
        trained(base, make_run(epochs=1))[1], trained(base, make_run(epochs=1, seed=7))[1]
    )


def test_gradient_checkpointing_changes_no_bit(
    base: BaseModel, stand_in: Path, make_run: MakeRun
) -> None:
    """Also with dropout: the recomputation draws the same masks."""
    run = make_run(epochs=1, dropout=0.3)
    checkpointed = BaseModel.load(
        TrainerOptions(str(stand_in), allow_cpu=True, gradient_checkpointing="true")
    )
    assert same(trained(base, run)[1], trained(checkpointed, run)[1])


# ---- the loop's promises
# ---------------------------------------------------------------------------


def test_gradients_are_clipped_before_every_update(base: BaseModel, make_run: MakeRun) -> None:
    norms: list[float] = []

    def note(optimizer: Any, *_: Any) -> None:
        gradients = [w.grad for group in optimizer.param_groups for w in group["params"]]
        norms.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))))

    handle = register_optimizer_step_pre_hook(note)
    try:
        trained(base, make_run(epochs=1, count=5, max_grad_norm=0.001))
    finally:
        handle.remove()
    assert len(norms) == 5
    assert all(norm == pytest.approx(0.001, rel=0.01) for norm in norms)


def test_weights_that_are_not_float32_are_refused_before_the_first_step(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = base.attach

    def in_half_precision(parameters: HyperParameters) -> list[torch.nn.Parameter]:
        weights = attach(parameters)
        for weight in weights:
            weight.data = weight.data.half()
        return weights

    monkeypatch.setattr(base, "attach", in_half_precision)
    with pytest.raises(TrainingFailed, match="float32"):
        trained(base, make_run())


def test_a_part_of_the_lora_that_does_not_move_fails_the_run(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = loop_state.begin

    def with_one_frozen(*arguments: Any) -> Any:
        state = begin(*arguments)
        name = next(name for name in state.lora if ".lora_B." in name)
        state.lora[name].register_hook(torch.zeros_like)
        return state

    monkeypatch.setattr(loop_state, "begin", with_one_frozen)
    with pytest.raises(TrainingFailed, match="1 of 48.*learnt nothing in 3 updates"):
        trained(base, make_run(epochs=9))
    with pytest.raises(TrainingFailed, match="learnt nothing in 2 updates"):
        trained(base, make_run(epochs=1, batch_size=2))


def spoil(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Turn the losses of some calls into NaN."""
    calls = iter(range(10_000))

    def spoilt(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        losses, weighted = denoising_losses(*arguments, **named)
        return (losses * math.nan, weighted * math.nan) if bad(next(calls)) else (losses, weighted)

    monkeypatch.setattr(trainer, "denoising_losses", spoilt)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda call: call in (1, 4))
    result, weights, _ = trained(base, make_run(epochs=2))
    assert (result.steps, result.skipped_steps) == (6, 2)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert all(math.isfinite(loss) for loss in result.losses)
    assert "2 steps were skipped" in result.warnings[-1]


def test_too_many_skipped_steps_in_a_row_are_a_divergence(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda call: call >= 2)
    with pytest.raises(TrainingDiverged, match="step 13: 11 steps in a row"):
        trained(base, make_run(count=10, epochs=2))


def test_an_epoch_without_a_finite_loss_is_a_divergence(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda call: call >= 3)
    with pytest.raises(TrainingDiverged, match="epoch 2"):
        trained(base, make_run(epochs=3))


def test_a_base_that_predicts_samples_is_refused(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.scheduler.config, "prediction_type", "sample", raising=False)
    monkeypatch.setitem(base.scheduler.config, "prediction_type", "sample")
    with pytest.raises(TrainingFailed, match="sample"):
        LoRATrainer(make_run(), base, prepare(make_run(), base))


def scheduler_like(predicts: str, kept: list[float]) -> Any:
    """What `min_snr_weights` reads of a scheduler."""
    config = type("Config", (), {"prediction_type": predicts})()
    return type("Scheduler", (), {"config": config, "alphas_cumprod": torch.tensor(kept)})()


def test_min_snr_divides_by_snr_for_noise_and_by_snr_plus_one_for_velocity() -> None:
    kept = [0.9, 0.5, 0.1]  # SNR 9, 1 and 1/9
    noise = min_snr_weights(scheduler_like("epsilon", kept), 5.0)
    velocity = min_snr_weights(scheduler_like("v_prediction", kept), 5.0)
    assert noise.tolist() == pytest.approx([5 / 9, 1.0, 1.0], rel=1e-5)
    assert velocity.tolist() == pytest.approx([5 / 10, 1 / 2, (1 / 9) / (10 / 9)], rel=1e-5)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_min_snr_is_finite_where_a_schedule_ends_in_pure_noise(predicts: str) -> None:
    weights = min_snr_weights(scheduler_like(predicts, [0.5, 0.0]), 5.0)
    assert weights.tolist() == [1.0 if predicts == "epsilon" else 0.5, float(predicts == "epsilon")]


def test_gamma_zero_turns_min_snr_off() -> None:
    assert min_snr_weights(scheduler_like("epsilon", [0.99, 0.0]), 0.0).tolist() == [1.0, 1.0]


def test_the_reported_loss_is_unweighted(base: BaseModel, make_run: MakeRun) -> None:
    """Of one single step, which no update precedes: the weights cannot show in it."""
    one = {"epochs": 1, "batch_size": 3}
    losses = [trained(base, make_run(snr_gamma=gamma, **one))[0].loss for gamma in (0.0, 0.01)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_scheduler_says_that_the_base_predicts(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, predicts: str
) -> None:
    data = prepare(make_run(), base)
    config = type("Config", (), {"prediction_type": predicts, "num_train_timesteps": 1000})()
    monkeypatch.setattr(type(base.scheduler), "config", config)
    latents, text = data.batch([0, 1])
    seen: dict[str, Tensor] = {}

    def perfect(noisy: Tensor, steps: Tensor, **_: Any) -> Any:
        generator = torch.Generator().manual_seed(11)
        clean = latents.mean + latents.std * torch.randn(noisy.shape, generator=generator)
        noise = torch.randn(noisy.shape, generator=generator)
        kept = base.scheduler.alphas_cumprod[steps][:, None, None, None]
        seen["noisy"] = noisy - (kept.sqrt() * clean + (1 - kept).sqrt() * noise)
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        return type("Out", (), {"sample": noise if predicts == "epsilon" else velocity})()

    monkeypatch.setattr(base, "unet", perfect)
    losses, _ = denoising_losses(
        base,
        latents,
        text,
        empty_text=data.embeddings[""],
        caption_dropout=0.0,
        weights=torch.ones(1000),
        generator=torch.Generator().manual_seed(11),
        autocast=torch.autocast("cpu", enabled=False),
    )
    assert seen["noisy"].abs().max() < 1e-6
    assert losses.max() < 1e-9


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_captions_are_dropped_as_often_as_asked(
    base: BaseModel, make_run: MakeRun, dropout: float, expected: float
) -> None:
    data = prepare(make_run(), base)
    latents, text = data.batch([0] * 200)
    empty = torch.zeros_like(data.embeddings[""])
    seen: list[Tensor] = []

    class Watching:
        """Stands where the UNet stands."""

        def __call__(self, noisy: Tensor, _steps: Tensor, encoder_hidden_states: Tensor) -> Any:
            seen.append(encoder_hidden_states.flatten(1).any(dim=1))
            return type("Out", (), {"sample": noisy})()

    unet, base.unet = base.unet, Watching()
    try:
        denoising_losses(
            base,
            latents,
            text,
            empty_text=empty,
            caption_dropout=dropout,
            weights=torch.ones(1000),
            generator=torch.Generator().manual_seed(1),
            autocast=torch.autocast("cpu", enabled=False),
        )
    finally:
        base.unet = unet
    dropped = 1.0 - float(seen[0].float().mean())
    assert dropped == pytest.approx(expected, abs=0.12)


# ---- the plan
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pictures", "batch", "accumulation", "sizes"),
    [
        (5, 1, 1, [[1]] * 5),
        (5, 2, 1, [[2], [2], [1]]),
        (5, 2, 2, [[2, 2], [1]]),
        (3, 16, 1, [[3]]),
        (3, 16, 64, [[3]]),
        (7, 1, 4, [[1, 1, 1, 1], [1, 1, 1]]),
    ],
)
def test_every_epoch_sees_every_picture_once_in_steps_of_the_right_size(
    pictures: int, batch: int, accumulation: int, sizes: list[list[int]]
) -> None:
    parameters = HyperParameters(
        epochs=3, batch_size=batch, gradient_accumulation_steps=accumulation
    )
    plan = Plan(pictures, parameters)
    assert plan.steps_per_epoch == len(sizes) and plan.total_steps == 3 * len(sizes)
    for epoch in range(3):
        steps = [plan.batches(epoch * len(sizes) + i) for i in range(len(sizes))]
        assert [[len(b) for b in step] for step in steps] == sizes
        assert sorted(i for step in steps for b in step for i in b) == list(range(pictures))


def test_each_epoch_has_an_order_of_its_own_that_depends_on_the_seed_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = Plan(20, HyperParameters(epochs=5, seed=seed, batch_size=16))
        return [i for step in (0, 1) for b in plan.batches(epoch * 2 + step) for i in b]

    assert order(1, 0) == order(1, 0) != order(1, 1)
    assert order(2, 0) != order(1, 0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_warms_up_from_above_zero_peaks_and_falls_over_the_whole_job(
    schedule: str,
) -> None:
    plan = Plan(10, HyperParameters(epochs=10, warmup_ratio=0.1, lr_schedule=schedule))
    rates = [plan.learning_rate(step) for step in range(plan.total_steps)]
    assert rates[0] > 0 and rates[:10] == sorted(rates[:10])
    assert rates[10] == max(rates) == pytest.approx(1e-4)
    if schedule == "constant":
        assert set(rates[10:]) == {rates[10]}
    else:
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 0.02 * rates[10]


def test_the_optimizer_uses_the_rate_of_the_plan(base: BaseModel, make_run: MakeRun) -> None:
    rates: list[float] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    run = make_run(count=4, epochs=2, warmup_ratio=0.25)
    try:
        trained(base, run)
    finally:
        handle.remove()
    plan = Plan(4, run.parameters)
    assert rates == [plan.learning_rate(step) for step in range(8)]


def test_accumulated_batches_are_one_step_over_all_their_pictures(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five pictures at once, and as 2 + 2 + 1: the same gradient, up to rounding."""

    def without_chance(owner: BaseModel, latents: Any, text: Tensor, **_: Any) -> Any:
        steps = torch.full((len(text),), 500)
        out = owner.unet(latents.mean, steps, encoder_hidden_states=text).sample
        errors = (out - 1.0).pow(2).mean(dim=(1, 2, 3))
        return errors.detach(), errors

    monkeypatch.setattr(trainer, "denoising_losses", without_chance)
    gradients: list[Weights] = []

    def note(optimizer: Any, *_: Any) -> None:
        weights = optimizer.param_groups[0]["params"]
        gradients.append({str(i): w.grad.clone() for i, w in enumerate(weights)})

    handle = register_optimizer_step_pre_hook(note)
    try:
        one = {"count": 5, "epochs": 1, "dropout": 0.0}
        at_once, _, _ = trained(base, make_run(batch_size=5, **one))
        in_parts, _, _ = trained(base, make_run(batch_size=2, gradient_accumulation_steps=3, **one))
    finally:
        handle.remove()
    assert len(gradients) == 2
    assert in_parts.loss == pytest.approx(at_once.loss, rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-7)


# ---- stopping and resuming
# -------------------------------------------------------------------------

HARD = {  # dropout, captions dropped, an odd last batch, and accumulation: everything at once
    "count": 5,
    "epochs": 3,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "caption_dropout": 0.5,
}  # two steps an epoch: one of 2 + 2 pictures, one of a single picture


@pytest.fixture(scope="module")
def unbroken(warm_base: BaseModel) -> dict[str, Any]:
    """Filled by the first test that needs it: the hard run without a stop."""
    return {}


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_stopped_anywhere_and_resumed_ends_with_the_same_bits(
    base: BaseModel,
    options: TrainerOptions,
    make_run: MakeRun,
    unbroken: dict[str, Any],
    stop: int,
) -> None:
    run = make_run(**HARD)
    if not unbroken:
        result, weights, _ = trained(base, run)
        unbroken.update(result=result, weights=weights)
    stopped, _, events = trained(base, run, should_stop=stop_after(stop))
    assert (stopped.stopped, stopped.steps) == (StopReason.SHUTDOWN, stop)
    saved = checkpoints(events)[-1]
    name = f"epoch-{stop // 2:04d}" + (f"-step-{stop:04d}" if stop % 2 else "")
    assert (saved.name, saved.epoch, saved.step) == (name, stop // 2, stop)

    torch.manual_seed(999)  # another process, another claim
    other = BaseModel.load(options) if stop == 1 else base
    again = dataclasses.replace(run, claim=2, resume_from=saved.folder)
    result, weights, events = trained(other, again)
    assert same(weights, unbroken["weights"])
    assert result.losses == unbroken["result"].losses
    assert (result.resumed_from, result.steps, result.epochs) == (stop // 2, 6, 3)
    started = next(event for event in events if isinstance(event, Started))
    assert (started.epoch, started.step, started.total_steps) == (stop // 2, stop, 6)


def test_a_run_stopped_at_every_step_ends_with_the_same_bits(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(count=3, epochs=2, dropout=0.2)
    _, whole, _ = trained(base, run)
    resume_from, weights = None, {}
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
    assert saved.state.parameters == run.parameters and saved.state.base_model == base.hash


def test_a_checkpoint_of_other_pictures_or_parameters_is_refused(
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


# ---- what is told
# ----------------------------------------------------------------------------------


def test_events_tell_the_start_the_progress_and_the_end_in_order(
    base: BaseModel, make_run: MakeRun
) -> None:
    result, _, events = trained(base, make_run(epochs=3))
    assert events[0] == Started("task-1", 3, 9, 0, 0, 3, result.warnings)
    progress = [event for event in events if isinstance(event, Progress)]
    assert {event.stage for event in progress} == {Stage.TRAINING}
    assert [event.step for event in progress] == sorted({event.step for event in progress})
    last = progress[-1]
    assert (last.epoch, last.step, last.total_steps, last.loss) == (3, 9, 9, result.loss)
    assert last.steps_per_second and last.steps_per_second > 0


def test_progress_comes_a_few_times_a_second_at_most(base: BaseModel, make_run: MakeRun) -> None:
    result, _, events = trained(base, make_run(count=8, epochs=4))
    progress = [event for event in events if isinstance(event, Progress)]
    assert 1 <= len(progress) <= result.seconds / 0.25 + 2 < result.steps


def test_the_result_says_how_it_went(base: BaseModel, make_run: MakeRun) -> None:
    run = make_run(epochs=2)
    result, _, _ = trained(base, run)
    assert (result.epochs, result.steps, result.skipped_steps) == (2, 6, 0)
    assert len(result.losses) == 2 and result.loss == result.losses[-1]
    assert result.seconds > 0 and (result.steps_per_second or 0) > 0
    assert result.peak_memory_bytes > 50_000_000
    assert (result.resumed_from, result.stopped) == (None, None)
    assert result.parameters == run.parameters
    assert any("CPU" in warning for warning in result.warnings)
    assert any("Only 3 pictures" in warning for warning in result.warnings)


def test_more_than_4000_steps_are_a_warning(base: BaseModel, make_run: MakeRun) -> None:
    result, _, _ = trained(base, make_run(count=5, epochs=1000), should_stop=stop_after(0))
    assert any("5000 steps are many" in warning for warning in result.warnings)


def test_a_run_leaves_nothing_of_accelerate_behind(base: BaseModel, make_run: MakeRun) -> None:
    from accelerate.state import (  # pylint: disable=import-outside-toplevel
        AcceleratorState,
        GradientState,
        PartialState,
    )

    trained(base, make_run(epochs=1))
    for kind in (AcceleratorState, GradientState, PartialState):
        assert not kind._shared_state  # pylint: disable=protected-access


def test_at_64_pixels_the_middle_of_a_deep_unet_is_excused_from_learning(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = LoRATrainer(make_run(), base, prepare(make_run(), base))
    monkeypatch.setitem(base.unet.config, "block_out_channels", (32, 32, 64, 64))
    monkeypatch.setattr(base.unet.config, "block_out_channels", (32, 32, 64, 64), raising=False)
    idle = loop._idle  # pylint: disable=protected-access
    middle = "mid_block.attentions.0.transformer_blocks.0"
    assert idle(f"{middle}.attn1.to_q.lora_B.default.weight")
    assert not idle(f"{middle}.attn1.to_v.lora_B.default.weight")
    assert not idle(f"{middle}.attn2.to_q.lora_B.default.weight")
    assert not idle(
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.default.weight"
    )
