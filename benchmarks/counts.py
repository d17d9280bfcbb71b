"""`python -m benchmarks.counts`: kernels, kept memory and arithmetic of a step, without a GPU.

Runs one step of SD1.5 in full size (859.5 million parameters, half precision, 64 x 64 latents) on
fake tensors, which have shapes and no values, and counts what torch dispatches:

- **launches**: operations that start a kernel; views and allocations do not.
- **kept**: bytes that autograd keeps from the forward for the backward pass, weights left out.
- **FLOPs**: of matrix products, convolutions and attention, by torch's own counter.

Fake tensors of a CPU build are CPU tensors. Two things differ on CUDA: its autocast computes the
norms in float32, which is imitated here, and it has one kernel for dropout where a CPU has three
operations. So the counts with dropout are higher than on CUDA. Counts do not show the time
that a kernel takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import sd15
from jobs.style import HyperParameters
from training.runtime import optimizer as optimizers
from training.runtime.recomputation import Recomputation
from training.style.families.lora_config import peft_config
from training.style.lean_lora import LeanLora

HALF = torch.float16
NO_KERNEL = ("prim.", "aten._unsafe_view", "aten.empty", "aten.detach", "aten.new_empty")
# pylint: disable=protected-access  # the names of torch's kernels
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        torch.ops.aten._scaled_dot_product_flash_attention
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}
# pylint: enable=protected-access
"""The CPU's attention, of which torch's table has no formula, and the GPU's, which is as large."""
MOST_LAUNCHES, MOST_KEPT = 2600, 0.9
"""The goal for the fast path without checkpointing and dropout; GiB."""


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """One way to make a step.

    Attributes:
        name: For the table.
        fast: With the lean LoRA; else with PEFT's layers under autocast.
        checkpointing: Gradient checkpointing.
        dropout: Before the LoRA.
        batch: Images.
    """

    name: str
    fast: bool
    checkpointing: bool
    dropout: float
    batch: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Counted:
    """The counts of one step.

    Attributes:
        forward, backward, update: Launches. The update is clipping, AdamW and the copies.
        kept_gib: Kept between forward and backward pass.
        teraflops: Of forward and backward pass.
    """

    forward: int
    backward: int
    update: int
    kept_gib: float
    teraflops: float

    @property
    def launches(self) -> int:
        """Of forward and backward pass."""
        return self.forward + self.backward


SHIPPED = (
    Way("shipped defaults (checkpointing, dropout 0.1)", True, True, 0.1),
    Way("checkpointing off, dropout 0.1", True, False, 0.1),
    Way("checkpointing off, dropout 0: the goal", True, False, 0.0),
)
WAYS = SHIPPED + tuple(
    dataclasses.replace(way, name=f"FAST_TRAINING=false, {way.name.partition(':')[0]}", fast=False)
    for way in SHIPPED
)


class _Launches(TorchDispatchMode):
    """Counts operations that start a kernel, and the FLOPs by torch's table of formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view and not str(func).startswith(NO_KERNEL)
        found = func(*args, **(kwargs or {}))
        packet = func._overloadpacket  # pylint: disable=protected-access
        if formula := flop_registry.get(ATTENTION.get(packet, packet)):
            self.flops += formula(*args, **(kwargs or {}), out_val=found)
        return found

    def lap(self) -> int:
        """The count since the last lap."""
        counted, self.count = self.count, 0
        return counted


@contextlib.contextmanager
def _norms_as_on_cuda() -> Iterator[None]:
    """Under autocast, group and layer norms get float32, as CUDA's autocast gives them."""

    def promoted(norm: Any) -> Any:
        def promoting(*args: Any, **named: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                args = tuple(_single(each) for each in args)
                named = {name: _single(each) for name, each in named.items()}
            return norm(*args, **named)

        return promoting

    names = ("group_norm", "layer_norm")
    own = {name: promoted(getattr(nn.functional, name)) for name in names}
    with mock.patch.multiple(nn.functional, **own):
        yield


def _single(value: Any) -> Any:
    return value.to(torch.float32) if isinstance(value, Tensor) else value


def fake_unet(way: Way) -> UNet2DConditionModel:
    """SD1.5's UNet with a LoRA, in the fake mode that is active."""
    with torch.device("meta"):
        unet = sd15.unet()
        unet.requires_grad_(False)
        unet.add_adapter(peft_config(HyperParameters(dropout=way.dropout)))
    for module in unet.modules():
        for name, weight in module._parameters.items():  # pylint: disable=protected-access
            if weight is not None:
                dtype = torch.float32 if weight.requires_grad else HALF
                made = torch.empty(weight.shape, dtype=dtype, device="cpu")
                setattr(module, name, nn.Parameter(made, requires_grad=weight.requires_grad))
    unet.train()
    if way.checkpointing:
        unet.enable_gradient_checkpointing(Recomputation())
    return unet


@contextlib.contextmanager
def _keeping(unet: nn.Module) -> Iterator[dict[Any, int]]:
    """Bytes of the storages that autograd keeps, less the network's own."""
    # pylint: disable=protected-access
    own = {weight.untyped_storage()._cdata for weight in unet.parameters()}
    storages: list[Any] = []  # held, so that no address is used twice
    kept: dict[Any, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages.append(storage)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


# pylint: disable-next=too-many-locals  # one for each part of a step
def count(way: Way) -> Counted:
    """Count one optimizer step."""
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        unet = fake_unet(way)
        lean = stack.enter_context(LeanLora(unet, HALF)) if way.fast else None
        weights = [weight for weight in unet.parameters() if weight.requires_grad]
        stepped = [lean.flat] if lean else weights
        made = optimizers.create("adamw", stepped, learning_rate=1e-4, weight_decay=0.01)
        for weight in stepped:
            weight.grad = torch.zeros_like(weight)
        made.step()  # the first one makes the optimizer's state
        if not lean:
            made.zero_grad()
        noisy = torch.randn(way.batch, 4, 64, 64, dtype=HALF)
        text = torch.randn(way.batch, 77, 768, dtype=HALF)
        levels = torch.randint(1000, (way.batch,))
        stack.enter_context(_norms_as_on_cuda())
        launches = stack.enter_context(_Launches())
        with _keeping(unet) as kept:
            with torch.autocast("cpu", dtype=HALF, enabled=not way.fast):
                predicted = unet(noisy, levels, encoder_hidden_states=text).sample
        forward, loss = launches.lap(), predicted.float().square().mean()
        torch.autograd.backward(loss)
        backward = launches.lap()
        if lean:
            lean.gather()
        torch.nn.utils.clip_grad_norm_(stepped, 1.0)
        made.step()
        if lean:
            lean.zero_grad()
            lean.refresh()
        size = sum(kept.values()) / 2**30
        return Counted(forward, backward, launches.lap(), size, launches.flops / 1e12)


def main(
    output: Annotated[Path, typer.Option(help="File that receives the counts as JSON.")] = Path(
        "build/benchmarks/counts.json"
    ),
) -> None:
    """Count the ways, print a table, write it as JSON; exit with 1 where the goal is missed."""
    table = Table(title="One step of SD1.5 in full size, batch 1, counted with fake tensors")
    table.add_column("way")
    for heading in ("forward", "backward", "launches", "update", "kept, GiB", "TFLOP"):
        table.add_column(heading, justify="right")
    found = {}
    for way in WAYS:
        counted = count(way)
        found[way.name] = dataclasses.asdict(counted) | {"launches": counted.launches}
        numbers = (counted.forward, counted.backward, counted.launches, counted.update)
        table.add_row(
            way.name,
            *(f"{number:,}" for number in numbers),
            f"{counted.kept_gib:.2f}",
            f"{counted.teraflops:.2f}",
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    Console(width=120).print(table)
    goal = found[SHIPPED[-1].name]
    if goal["launches"] > MOST_LAUNCHES or goal["kept_gib"] > MOST_KEPT:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
