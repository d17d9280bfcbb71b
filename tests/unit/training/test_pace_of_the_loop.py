"""Between two epochs' ends no step waits for the device, nor the device for a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.kinds import TrainerOptions
from jobs.style import TrainingRun
from tests.unit.training.conftest import MakeRun
from training.style import loop_state
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from training.style.trainer import LoRATrainer

READING = ("tolist", "cpu", "numpy")
"""Tensors' methods that hand values to the host, and that torch does not dispatch on a CPU."""


class Reads(TorchDispatchMode):
    """Counts how often the host asks for a tensor's value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # pylint: disable-next=protected-access
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads_of(base: BaseModel, run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> int:
    data, reads = prepare(run, base), Reads()

    def counting(method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            reads.count += 1
            return method(*arguments, **named)

        return counted

    with monkeypatch.context() as patch:
        for name in READING:
            patch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
        try:
            with reads:
                LoRATrainer(run, base, data).train()
        finally:
            base.detach()
    return reads.count


def test_the_host_reads_no_more_in_an_epoch_of_eight_steps_than_in_one_of_a_single_step(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = reads_of(base, make_run(count=8, epochs=3, batch_size=1), monkeypatch)
    few = reads_of(base, make_run(count=8, epochs=3, batch_size=8), monkeypatch)
    assert 0 < many <= few


@pytest.mark.gpu
def test_on_a_gpu_no_step_synchronises(
    stand_in: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, steps = BaseModel.load(TrainerOptions(str(stand_in))), 0
    # pylint: disable-next=protected-access
    update, backward = loop_state.update, LoRATrainer._backward

    def strictly(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            # The first step brings the schedule's tables to the device.
            torch.cuda.set_sync_debug_mode("error" if steps else "default")
            try:
                return call(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return called

    def counted(*arguments: Any) -> None:
        nonlocal steps
        strictly(update)(*arguments)
        steps += 1

    monkeypatch.setattr(LoRATrainer, "_backward", strictly(backward))
    monkeypatch.setattr(loop_state, "update", counted)
    run = make_run(count=4, epochs=2)
    LoRATrainer(run, base, prepare(run, base)).train()
    assert steps == 8
