"""Whole runs, for tests: started, stopped, compared."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.style import TrainingRun
from training.runtime.device import one_run_accelerator
from training.style import recovery, trainer
from training.style.dataset import prepare
from training.style.examples import Dataset
from training.style.families.sd15 import BaseModel
from training.style.objective import denoising_losses
from training.style.results.report import TrainingResult
from training.style.trainer import LoRATrainer
from utils.errors import StopReason
from utils.events import CheckpointSaved, Event

Weights = dict[str, Tensor]


def lora_of(base: BaseModel) -> Weights:
    """A copy of the attached LoRA's weights."""
    weights = base.unet.named_parameters()
    return {name: weight.detach().clone() for name, weight in weights if "lora_" in name}


def same(left: Weights, right: Weights) -> bool:
    """Whether two LoRAs are equal bit for bit."""
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def close(left: Weights, right: Weights) -> bool:
    """Whether two LoRAs are equal but for rounding."""
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=1e-3, atol=2e-5) for name in left
    )


def stop_after(checks: int) -> Callable[[], StopReason | None]:
    """Answers `None` so many times, then asks to stop."""
    answers = iter([None] * checks)
    return lambda: next(answers, StopReason.SHUTDOWN)


def in_one_go(run: TrainingRun, base: BaseModel, data: Dataset, **how: Any) -> TrainingResult:
    """A run that gives up at the first trouble."""
    return LoRATrainer(run, base, data, **how).train()


def trained(
    base: BaseModel,
    run: TrainingRun,
    *,
    through: Callable[..., TrainingResult] = recovery.train,
    **how: Any,
) -> tuple[TrainingResult, Weights, list[Event]]:
    """One whole run, after which the base is bare again."""
    events: list[Event] = []
    try:
        result = through(run, base, prepare(run, base), emit=events.append, **how)
        return result, lora_of(base), events
    finally:
        base.detach()


def checkpoints(events: list[Event]) -> list[CheckpointSaved]:
    """The checkpoints that a run reported."""
    return [event for event in events if isinstance(event, CheckpointSaved)]


def spoil(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Turn the losses of some calls into NaN."""
    calls = iter(range(10_000))

    def spoilt(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        losses, weighted = denoising_losses(*arguments, **named)
        return (losses * math.nan, weighted * math.nan) if bad(next(calls)) else (losses, weighted)

    monkeypatch.setattr(trainer, "denoising_losses", spoilt)


class HalfPrecision:
    """Accelerate with fp16, as on a GPU: a CPU has the autocast and the gradient scaler too."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.last: float | None = None

    @contextlib.contextmanager
    def __call__(self, device: torch.device, _dtype: torch.dtype) -> Iterator[Any]:
        with one_run_accelerator(device, torch.float32) as accelerator:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)
            accelerator.native_amp = True
            accelerator.state._mixed_precision = "fp16"  # pylint: disable=protected-access
            yield accelerator
            self.last = accelerator.scaler.get_scale()
