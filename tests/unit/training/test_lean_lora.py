"""The lean LoRA computes what PEFT computes, and a training with it ends where a plain one ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.kinds import TrainerOptions
from jobs.style import HyperParameters
from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import Weights, checkpoints, in_one_go, lora_of, stop_after, trained
from training.style import loop_state, objective, trainer
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from training.style.lean_lora import LeanLora, suits
from training.style.results.probe import mixed_precision
from training.style.trainer import LoRATrainer

ROUNDING = 1e-5
"""Relative, in float32: the same numbers are added in another order."""
LOSS_BOUND, WEIGHT_BOUND = 1e-4, 2e-2
"""Relative, after 200 steps in float32, to a training in float64. A rounding error of the first
steps grows with every later one: AdamW divides by the gradient's own size, so that weights whose
gradient is nearly zero go either way."""
PLAIN_MARGIN = 3.0
"""The fast path may be this much further from float64 than the plain one, which rounds too."""


def wake(base: BaseModel) -> None:
    """Give the LoRA weights that have an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in base.unet.parameters():
            if weight.requires_grad:
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(0.05 * drawn)


def loss_of(base: BaseModel, dtype: torch.dtype) -> Tensor:
    """The UNet's mean square for two images; the dropout's masks are the same each time."""
    generator = torch.Generator().manual_seed(4)
    noisy = torch.randn((2, 4, 16, 16), generator=generator).to(dtype)
    text = torch.randn((2, 77, base.unet.config.cross_attention_dim), generator=generator)
    torch.manual_seed(5)
    predicted = base.unet(
        noisy, torch.tensor([3, 700]), encoder_hidden_states=text.to(dtype)
    ).sample
    mean: Tensor = predicted.float().square().mean()
    return mean


def plain_gradient(base: BaseModel, autocast: torch.dtype | None = None) -> Tensor:
    """PEFT's own, flat."""
    weights = [weight for weight in base.unet.parameters() if weight.requires_grad]
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        computed = loss_of(base, autocast or torch.float32)
    return torch.cat([part.reshape(-1) for part in torch.autograd.grad(computed, weights)])


def lean_gradient(base: BaseModel, dtype: torch.dtype = torch.float32) -> Tensor:
    """The lean LoRA's, flat; for two passes, of which each is a half."""
    lean = LeanLora(base.unet, dtype)
    with lean:
        for _ in range(2):
            torch.autograd.backward(loss_of(base, dtype) / 2)
            lean.gather()
    assert lean.flat.grad is not None
    return lean.flat.grad


def away(found: Tensor, expected: Tensor) -> float:
    """Their distance, relative to the expected one's length."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("target", ["attention", "attention+ff"])
@pytest.mark.parametrize(("dropout", "alpha"), [(0.0, 4.0), (0.3, 3.0)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_peft_s(
    base: BaseModel, target: str, dropout: float, alpha: float, checkpointing: bool
) -> None:
    parameters = HyperParameters(rank=2, alpha=alpha, dropout=dropout, target=target)
    base.attach(parameters, checkpointing=checkpointing)
    wake(base)
    assert suits(base.unet)
    expected = plain_gradient(base)
    assert expected.norm() > 0
    assert away(lean_gradient(base), expected) < ROUNDING


def test_in_half_precision_the_gradient_is_no_further_from_the_exact_one_than_under_autocast(
    base: BaseModel,
) -> None:
    base.attach(HyperParameters(rank=2, alpha=4.0, dropout=0.0))
    wake(base)
    exact = plain_gradient(base)
    frozen = [weight for weight in base.unet.parameters() if not weight.requires_grad]
    single = [weight.data for weight in frozen]
    try:
        for weight in frozen:
            weight.data = weight.data.to(torch.bfloat16)
        autocast = away(plain_gradient(base, torch.bfloat16), exact)
        lean = away(lean_gradient(base, torch.bfloat16), exact)
    finally:
        for weight, data in zip(frozen, single, strict=True):
            weight.data = data
    assert 0 < lean < 1.5 * autocast


def test_a_lora_that_is_switched_off_has_no_effect_and_leaving_gives_peft_s_layers_back(
    base: BaseModel,
) -> None:
    bare = loss_of(base, torch.float32)
    base.attach(HyperParameters(rank=2, alpha=3.0, dropout=0.0))
    wake(base)
    before, with_lora = lora_of(base), float(loss_of(base, torch.float32).detach())
    lean = LeanLora(base.unet, torch.float32)
    with lean:
        assert float(loss_of(base, torch.float32).detach()) == pytest.approx(with_lora, rel=1e-6)
        base.unet.disable_adapters()
        assert torch.equal(loss_of(base, torch.float32), bare)
        base.unet.enable_adapters()
    assert all(torch.equal(weight, before[name]) for name, weight in lora_of(base).items())
    assert float(loss_of(base, torch.float32).detach()) == with_lora
    assert not any("forward" in vars(module) for module in base.unet.modules())


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_a_training_on_the_fast_path_ends_where_the_plain_one_does(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    run = make_run(count=4, epochs=3, optimizer=optimizer, gradient_accumulation_steps=2)
    fast, fast_weights, _ = trained(base, run)
    monkeypatch.setattr(base, "fast", False)
    plain, plain_weights, _ = trained(base, run)
    assert fast.losses == pytest.approx(plain.losses, rel=ROUNDING)
    assert distance(fast_weights, plain_weights) < 1e-3


def distance(left: Weights, right: Weights) -> float:
    """Relative to the length of all that was learnt."""
    learnt = sum(float(weight.norm() ** 2) for name, weight in right.items() if "lora_B" in name)
    apart = sum(float((left[name] - right[name]).norm() ** 2) for name in right)
    return float((apart / learnt) ** 0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
@pytest.mark.parametrize("before", [True, False])
def test_a_checkpoint_of_one_path_is_continued_on_the_other(
    base: BaseModel,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    before: bool,
) -> None:
    """Checkpoints look the same, so jobs move between versions and settings."""
    run = make_run(count=3, epochs=4, optimizer=optimizer)
    monkeypatch.setattr(base, "fast", before)
    _, weights, _ = trained(base, run)
    _, _, events = trained(base, run, should_stop=stop_after(5))
    monkeypatch.setattr(base, "fast", not before)
    again = dataclasses.replace(run, resume_from=checkpoints(events)[-1].folder)
    _, resumed, _ = trained(base, again)
    assert distance(resumed, weights) < 1e-3


def entries(base: BaseModel, run: Any) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor of the optimizer in the newest checkpoint."""
    data = prepare(run, base)
    once = LoRATrainer(run, base, data)
    try:
        once.train()
    finally:
        base.detach()
    assert once.newest is not None
    return {name: (each.shape, each.dtype) for name, each in once.newest.optimizer.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_checkpoints_have_the_same_tensors_on_both_paths(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    run = make_run(count=3, epochs=1, optimizer=optimizer)
    fast = entries(base, run)
    monkeypatch.setattr(base, "fast", False)
    plain = entries(base, run)
    # Prodigy keeps one zero for a weight that began as zeros; either form can be restored.
    assert fast.keys() == plain.keys()
    assert {k: v for k, v in fast.items() if not k.endswith("/p0")} == {
        k: v for k, v in plain.items() if not k.endswith("/p0")
    }


def test_two_hundred_steps_stay_near_those_in_double_precision(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bounds are stated above; docs/benchmarks.md repeats them."""
    run = make_run(count=4, epochs=50, dropout=0.0, checkpoint_interval=1000)
    fast, fast_weights, _ = trained(base, run, through=in_one_go)
    monkeypatch.setattr(base, "fast", False)
    plain, plain_weights, _ = trained(base, run, through=in_one_go)
    exact, exact_weights = in_double_precision(base, run, monkeypatch)
    assert fast.steps == 200
    assert fast.losses == pytest.approx(exact, rel=LOSS_BOUND)
    off = {
        name: distance({k: w.double() for k, w in weights.items()}, exact_weights)
        for name, weights in (("fast", fast_weights), ("plain", plain_weights))
    }
    assert off["fast"] < WEIGHT_BOUND
    assert off["fast"] < PLAIN_MARGIN * off["plain"] + 1e-6, off
    assert plain.losses == pytest.approx(exact, rel=LOSS_BOUND)


def in_double_precision(
    base: BaseModel, run: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[float], Weights]:
    """The plain loop with the same random numbers, every sum in float64."""
    begin, losses_of = loop_state.begin, objective.denoising_losses

    def begin_double(*arguments: Any) -> Any:
        state = begin(*arguments)
        for weight in state.lora.values():
            weight.data = weight.data.double()
        return state

    def losses_double(base: BaseModel, batch: Any, *arguments: Any, **named: Any) -> Any:
        latents, text = batch
        twice = dataclasses.replace(latents, mean=latents.mean.double(), std=latents.std.double())
        named["empty_text"] = named["empty_text"].double()
        return losses_of(base, (twice, text.double()), *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop_state, "begin", begin_double)
        patch.setattr(trainer, "denoising_losses", losses_double)
        patch.setattr(base, "dtype", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(trainer, "Examiner", _NoExaminer)
        data = prepare(run, base)
        base.unet.double()
        try:
            result = LoRATrainer(run, base, data).train()
            weights = lora_of(base)
        finally:
            base.take_off()
            base.unet.to(torch.float32)  # `float` is `double` here
    return list(result.losses), weights


class _NoExaminer:
    """Looks at nothing: the probe is not part of the training."""

    probe_seconds = sample_seconds = 0.0

    def __init__(self, *_: Any) -> None:
        pass

    def examine(self, _: Any) -> bool:
        """Nothing is due."""
        return True


def test_memory_that_runs_out_on_the_fast_path_leaves_a_network_that_can_start_over(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(count=4, epochs=2)
    calls = iter(range(1000))

    def fails_once(*_: Any) -> None:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    expected, weights, _ = trained(base, run)
    handle = base.unet.conv_in.register_forward_pre_hook(fails_once)
    try:
        result, again, _ = trained(base, run)
    finally:
        handle.remove()
    assert result.steps == expected.steps
    assert distance(again, weights) < 1e-3


@pytest.mark.gpu
def test_on_a_gpu_the_gradient_is_no_further_from_the_exact_one_than_under_autocast(
    stand_in: Path,
) -> None:
    found: dict[str, Tensor] = {}
    for precision in ("no", "fp16"):
        base = BaseModel.load(TrainerOptions(str(stand_in), mixed_precision=precision))
        base.attach(HyperParameters(rank=2, alpha=4.0, dropout=0.0))
        wake(base)
        weights = [weight for weight in base.unet.parameters() if weight.requires_grad]
        with mixed_precision(base):
            loss = loss_on(base) * SCALE
        parts = torch.autograd.grad(loss, weights)
        found[precision] = torch.cat([part.reshape(-1) for part in parts]) / SCALE
        if precision == "fp16":
            lean = LeanLora(base.unet, base.dtype)
            with lean:
                torch.autograd.backward(loss_on(base) * SCALE)
                lean.gather()
            assert lean.flat.grad is not None
            found["lean"] = lean.flat.grad / SCALE
        base.detach()
    exact = found["no"]
    assert away(found["lean"], exact) < 1.5 * away(found["fp16"], exact)


SCALE = 1024.0
"""Of the loss, so that fp16 gradients do not vanish."""


def loss_on(base: BaseModel) -> Tensor:
    """The UNet's mean square on the base's device and in its dtype."""
    generator = torch.Generator().manual_seed(4)
    noisy = torch.randn((2, 4, 16, 16), generator=generator).to(base.device, base.dtype)
    width = base.unet.config.cross_attention_dim
    text = torch.randn((2, 77, width), generator=generator).to(base.device, base.dtype)
    levels = torch.tensor([3, 700], device=base.device)
    mean: Tensor = base.unet(noisy, levels, encoder_hidden_states=text).sample.float().square()
    return mean.mean()


@pytest.mark.gpu
def test_on_a_gpu_latents_in_tf32_are_those_in_float32_but_for_its_rounding(stand_in: Path) -> None:
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    fast, exact = (
        BaseModel.load(TrainerOptions(str(stand_in), fast_training=on)).encode_images(pixels)[0]
        for on in (True, False)
    )
    assert away(fast, exact) < 1e-2
