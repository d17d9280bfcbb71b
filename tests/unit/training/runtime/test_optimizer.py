"""Optimizers: each learns, is stopped and resumed to the same bits, or is refused in good time."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from config import LocalSettings, load_local
from jobs.style import HyperParameters
from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import checkpoints, same, spoil, stop_after, trained
from training.runtime import optimizer
from training.runtime.device import one_run_accelerator
from training.style import loop_state
from training.style.families.sd15 import BaseModel
from training.style.loop_state import LoopState
from training.style.plan import Course, Plan
from utils.errors import ConfigurationError, TrainingFailed


def test_prodigy_stopped_and_resumed_ends_with_the_same_bits(
    base: BaseModel, make_run: MakeRun
) -> None:
    run = make_run(optimizer="prodigy", epochs=3, dropout=0.1)
    whole, weights, _ = trained(base, run)
    stopped, _, events = trained(base, run, should_stop=stop_after(5))
    assert stopped.steps == 5
    again = dataclasses.replace(run, resume_from=checkpoints(events)[-1].folder)
    result, resumed, _ = trained(base, again)
    assert same(resumed, weights) and result.losses == whole.losses


def test_prodigy_finds_a_rate_and_keeps_it_to_the_last_digit() -> None:
    whole, found = downhill(steps=300)
    halfway, _ = downhill(steps=150)
    resumed, kept = downhill(steps=150, start=halfway)
    assert found > 1000 * 1e-6  # its first rate
    assert kept == found
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def downhill(
    steps: int, start: dict[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], float]:
    """Prodigy on its way to a minimum: its state after some steps, and the rate it has found."""
    place = start["place"].clone() if start else torch.zeros(3)
    weight = torch.nn.Parameter(place)
    made = optimizer.create("prodigy", [weight], learning_rate=1e-4, weight_decay=1e-2)
    if start:
        state = {key: tensor for key, tensor in start.items() if key != "place"}
        optimizer.restore(made, state, {"w": weight})
    for _ in range(steps):
        weight.grad = 2 * (weight.detach() - torch.tensor([1.0, -2.0, 3.0]))
        made.step()
    state = {
        key: value.clone() for key, value in optimizer.state_tensors(made, {"w": weight}).items()
    }
    return state | {"place": weight.detach().clone()}, made.param_groups[0]["d"]


def test_prodigy_prints_nothing(
    base: BaseModel, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(base, make_run(optimizer="prodigy", epochs=1))
    assert not capsys.readouterr().out


def test_the_schedule_and_a_halving_act_on_the_rate_that_prodigy_finds() -> None:
    asked = HyperParameters(optimizer="prodigy", learning_rate=3e-4, epochs=10, warmup_ratio=0.2)
    course = Course.of(asked)
    halved = course.at_half_the_rate(1)
    assert halved is not None
    for one, peak in ((course, 1.0), (halved, 0.5)):
        plan = Plan((0,) * 10, one.planned, one.rate_unit)
        rates = [plan.learning_rate(step) for step in range(plan.total_steps)]
        assert rates[20] == max(rates) == pytest.approx(peak)
        assert rates[0] < peak / 10 and rates[-1] < peak / 100


def test_nested_entries_and_numbers_of_an_optimizer_s_state_come_back_as_they_were() -> None:
    """8-bit AdamW's state is nested, and of bytes."""

    class Nested(torch.optim.SGD):
        """As 8-bit AdamW keeps its state."""

    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    one, other = Nested(weights, lr=1.0), Nested(weights, lr=1.0)
    state: dict[str, Any] = {
        "step": 3,
        "quantised": {"state1": torch.arange(4, dtype=torch.uint8), "max": torch.tensor([0.1])},
    }
    one.load_state_dict({**one.state_dict(), "state": {0: state, 1: state}})
    one.param_groups[0]["found"] = 0.1 + 0.2
    named = dict(zip(["a.lora_A.weight", "b.lora_B.weight"], weights, strict=True))
    optimizer.restore(other, optimizer.state_tensors(one, named), named)
    assert repr(other.state_dict()) == repr(one.state_dict())
    assert other.param_groups[0]["found"] == 0.1 + 0.2


def test_eight_bits_need_a_gpu() -> None:
    weights = [torch.nn.Parameter(torch.ones(4))]
    with pytest.raises(TrainingFailed, match="needs a GPU. Set the optimizer to adamw or prodigy"):
        optimizer.create("adamw8bit", weights, learning_rate=1e-4, weight_decay=1e-2)


def test_an_optimizer_whose_library_is_missing_is_refused_in_settings_and_parameters_by_its_name(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="library prodigyopt .* is not installed on this worker"):
        HyperParameters(optimizer="prodigy").require_libraries()
    with pytest.raises(TrainingFailed, match="cannot be trained here: .* library prodigyopt"):
        begin(base, "prodigy")
    base.detach()
    monkeypatch.setenv("OPTIMIZER", "adamw8bit")
    with pytest.raises(ConfigurationError, match="library bitsandbytes .* is not installed"):
        settings()


def begin(base: BaseModel, name: str) -> LoopState:
    """A loop with an optimizer of this name."""
    course = Course.of(HyperParameters(optimizer=name, rank=2, alpha=4.0))
    with one_run_accelerator(base.device, base.dtype) as accelerator:
        return loop_state.begin(base, course, accelerator)


def settings() -> LocalSettings:
    """The defaults, and the environment."""
    return load_local(_env_file=None)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["prodigy", "adamw"])
def test_a_gradient_that_is_not_finite_moves_neither_weights_nor_optimizer(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, name: str, bad: float, fast: bool
) -> None:
    """Prodigy would keep the value in its rate for ever; no gradient scaler looks out for it."""
    monkeypatch.setattr(base, "fast", fast)
    parameters = HyperParameters(optimizer=name, resolution=64, rank=2)
    with one_run_accelerator(base.device, base.dtype) as accelerator:
        assert accelerator.scaler is None
        state = loop_state.begin(base, Course.of(parameters), accelerator)
        step(state, accelerator, value=1.0)
        before = everything(state)
        step(state, accelerator, value=bad)
        assert everything(state).keys() == before.keys()
        assert all(torch.equal(everything(state)[key], before[key]) for key in before)
        counted = state.tally.read()
        assert (counted.updates, counted.skipped_in_a_row) == (1, 1)
        step(state, accelerator, value=1.0)
        after = everything(state)
        assert any(not torch.equal(after[key], before[key]) for key in state.lora)
        after.pop("group/growth_rate", None)  # Prodigy's limit, which is none
        assert all(tensor.isfinite().all() for tensor in after.values())


def step(state: LoopState, accelerator: Accelerator, *, value: float) -> None:
    """One step on gradients of ones, the first weight's with `value` in it."""
    for weight in state.lora.values():
        if weight.grad is None:
            weight.grad = torch.ones_like(weight)
        weight.grad.fill_(1.0)
    first = next(iter(state.lora.values()))
    assert first.grad is not None
    first.grad[0, 0] = value
    norm = torch.nn.utils.get_total_norm(
        [weight.grad for weight in state.stepped if weight.grad is not None]
    )
    loop_state.update(state, norm, accelerator)


def everything(state: LoopState) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's state, copied."""
    found = optimizer.state_tensors(state.optimizer, state.lora)
    return {name: tensor.detach().clone() for name, tensor in (state.lora | found).items()}


class Operations(TorchDispatchMode):
    """Counts operations, and values that the host reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        self.reads += str(func) == "aten._local_scalar_dense.default"
        return func(*args, **(kwargs or {}))


def test_prodigy_handles_all_weights_at_once_and_the_host_reads_two_values_a_step(
    base: BaseModel,
) -> None:
    parameters = HyperParameters(optimizer="prodigy", resolution=64, rank=2)
    with one_run_accelerator(base.device, base.dtype) as accelerator:
        state = loop_state.begin(base, Course.of(parameters), accelerator)
        assert len(state.stepped) == 1 < len(state.lora)
        step(state, accelerator, value=1.0)
        for weight in state.lora.values():
            assert weight.grad is not None
            weight.grad.fill_(1.0)
        with Operations() as seen:
            state.optimizer.step()
    base.detach()
    assert seen.reads == 2
    assert seen.count < 40


def test_a_whole_training_with_prodigy_goes_round_steps_that_are_not_finite(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda call: call in (2, 3))
    result, weights, _ = trained(base, make_run(optimizer="prodigy", epochs=4))
    assert result.skipped_steps == 2
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
