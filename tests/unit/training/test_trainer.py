"""The training loop: it learns, clips, skips what is not finite, and reports its course."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from jobs.kinds import TrainerOptions
from jobs.style import HyperParameters
from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import (
    HalfPrecision,
    Weights,
    close,
    in_one_go,
    lora_of,
    same,
    spoil,
    stop_after,
    trained,
)
from training.style import loop_state, trainer
from training.style.dataset import prepare
from training.style.examples import Dataset
from training.style.families.sd15 import BaseModel
from training.style.plan import Plan
from training.style.trainer import LoRATrainer
from utils.errors import TrainingDiverged, TrainingFailed
from utils.events import Progress, Stage, Started

# ---- learning ------------------------------------------------------------------------------------


def fixed_loss(base: BaseModel, data: Dataset) -> float:
    """The loss over every image at four fixed timesteps and fixed noise."""
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


def test_ten_images_teach_the_lora_every_part_of_it_and_nothing_else(
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
    torch.manual_seed(12345)  # left behind by another run
    _, again, _ = trained(base, run)
    _, fresh, _ = trained(BaseModel.load(options), run)
    assert same(first, again) and same(first, fresh)


def test_another_seed_gives_other_weights(base: BaseModel, make_run: MakeRun) -> None:
    assert not same(
        trained(base, make_run(epochs=1))[1], trained(base, make_run(epochs=1, seed=7))[1]
    )


def test_gradient_checkpointing_changes_nothing_but_the_order_of_additions(
    base: BaseModel, stand_in: Path, make_run: MakeRun
) -> None:
    """Also with dropout: the recomputation draws the same masks."""
    run = make_run(epochs=1, dropout=0.3)
    checkpointed = BaseModel.load(
        TrainerOptions(str(stand_in), allow_cpu=True, gradient_checkpointing="true")
    )
    assert close(trained(base, run)[1], trained(checkpointed, run)[1])


# ---- the loop's promises -------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_after_they_are_unscaled_and_before_every_update(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    if scaled:
        monkeypatch.setattr(trainer, "one_run_accelerator", HalfPrecision(1024.0))
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

    def in_half_precision(parameters: HyperParameters, **how: Any) -> list[torch.nn.Parameter]:
        weights = attach(parameters, **how)
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
        hooked: Any = base.unet.get_parameter(name)
        hooked.register_hook(torch.zeros_like)
        return state

    monkeypatch.setattr(loop_state, "begin", with_one_frozen)
    with pytest.raises(TrainingFailed, match="1 of 48.*learnt nothing in 3 updates"):
        trained(base, make_run(epochs=9))
    with pytest.raises(TrainingFailed, match="learnt nothing in 2 updates"):
        trained(base, make_run(epochs=1, batch_size=2))


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
    with pytest.raises(TrainingDiverged, match="before step 21: 18 steps in a row"):
        trained(base, make_run(count=10, epochs=2), through=in_one_go)


def test_an_epoch_without_a_finite_loss_is_a_divergence(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda call: call >= 3)
    with pytest.raises(TrainingDiverged, match="epoch 2"):
        trained(base, make_run(epochs=3), through=in_one_go)


def test_the_reported_loss_is_unweighted(base: BaseModel, make_run: MakeRun) -> None:
    """Of one single step, which no update precedes: the weights cannot show in it."""
    one = {"epochs": 1, "batch_size": 3}
    losses = [trained(base, make_run(snr_gamma=gamma, **one))[0].loss for gamma in (0.0, 0.01)]
    assert losses[0] == losses[1]


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
    plan = Plan((0,) * 4, run.parameters)
    assert rates == [plan.learning_rate(step) for step in range(8)]


def test_accumulated_batches_are_one_step_over_all_their_images(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five images at once, and as 2 + 2 + 1: the same gradient, up to rounding."""

    def without_chance(owner: BaseModel, batch: Any, _: Any, **__: Any) -> Any:
        latents, text = batch
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


# ---- events --------------------------------------------------------------------------------------


def test_events_report_the_start_the_progress_and_the_end_in_order(
    base: BaseModel, make_run: MakeRun
) -> None:
    result, _, events = trained(base, make_run(epochs=3))
    assert events[0] == Started(
        "task-1",
        0,
        9,
        facts={"epoch": 0, "total_epochs": 3, "images_used": 3},
        warnings=result.warnings,
    )
    progress = [event for event in events if isinstance(event, Progress)]
    assert {event.stage for event in progress} == {Stage.TRAINING}
    assert [event.done for event in progress] == sorted({event.done for event in progress})
    last = progress[-1]
    assert (last.done, last.total) == (9, 9)
    assert last.facts == {"epoch": 3, "total_epochs": 3, "loss": result.loss}
    assert last.per_second and last.per_second > 0


def test_the_first_report_of_progress_gives_no_rate_for_it_would_be_that_of_a_cold_start(
    base: BaseModel, make_run: MakeRun
) -> None:
    result, _, events = trained(base, make_run(epochs=3))
    first = next(event for event in events if isinstance(event, Progress))
    assert first.done == 1 and first.per_second is None
    assert result.steps_per_second


def test_progress_comes_a_few_times_a_second_at_most(base: BaseModel, make_run: MakeRun) -> None:
    result, _, events = trained(base, make_run(count=8, epochs=4))
    progress = [event for event in events if isinstance(event, Progress)]
    assert 1 <= len(progress) <= result.seconds / 0.25 + 2


def test_the_result_describes_the_run(base: BaseModel, make_run: MakeRun) -> None:
    run = make_run(epochs=2)
    result, _, _ = trained(base, run)
    assert (result.epochs, result.steps, result.skipped_steps) == (2, 6, 0)
    assert len(result.losses) == 2 and result.loss == result.losses[-1]
    assert result.seconds > 0 and (result.steps_per_second or 0) > 0
    assert result.peak_memory_bytes > 50_000_000
    assert (result.resumed_from, result.stopped) == (None, None)
    assert result.parameters == run.parameters
    assert any("CPU" in warning for warning in result.warnings)
    assert any("Only 3 images" in warning for warning in result.warnings)


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


def test_at_64_pixels_the_middle_of_sd15_is_excused_from_learning_and_nothing_else(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Self-attention over a single position gives its query and key no gradient."""
    middle = "mid_block.attentions.0.transformer_blocks.0"
    parts = {
        f"{middle}.attn1.to_q": False,
        f"{middle}.attn1.to_k": False,
        f"{middle}.attn1.to_v": True,
        f"{middle}.attn2.to_q": True,
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": True,
    }
    parameters = HyperParameters(rank=2, resolution=64)
    base.attach(parameters)
    config = type("Config", (), {"block_out_channels": (320, 640, 1280, 1280)})()
    monkeypatch.setattr(type(base.unet), "config", config)
    for part, must_learn in parts.items():
        name = f"{part}.lora_B.default.weight"
        state: Any = type("State", (), {"lora": {"x.lora_B.y": torch.ones(1)}, "updates": 3})()
        state.lora[name] = torch.zeros(1)
        if must_learn:
            with pytest.raises(TrainingFailed, match=part):
                loop_state.assert_moved(state, base, parameters)
        else:
            loop_state.assert_moved(state, base, parameters)


def test_feed_forward_layers_learn_where_they_are_asked_for(
    base: BaseModel, make_run: MakeRun
) -> None:
    how = {"target": "attention+ff", "rslora": True, "noise_offset": 0.1, "epochs": 1}
    _, weights, _ = trained(base, make_run(**how))
    ups = {name: weight for name, weight in weights.items() if ".lora_B." in name}
    assert len(ups) == 60 and sum(".ff." in name for name in ups) == 12
    assert all(weight.any() for weight in ups.values())
