"""The UNet as it will be used: without dropout and gradients, and afterwards as if nobody had
looked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from training.style.families.sd15 import BaseModel


@contextlib.contextmanager
def evaluating(base: BaseModel, *, with_lora: bool = True) -> Iterator[None]:
    """Evaluation mode without gradients, with the LoRA on or off; afterwards all is as before, and
    the LoRA on.

    Gradient checkpointing needs no switch: without gradients the UNet does none.
    """
    modes = [(module, module.training) for module in base.unet.modules()]
    trained = [(weight, weight.requires_grad) for weight in base.unet.parameters()]
    base.unet.eval()
    if not with_lora:
        base.unet.disable_adapters()
    try:
        with torch.no_grad():
            yield
    finally:
        base.unet.enable_adapters()
        for weight, requires_grad in trained:  # the adapter's switch flips these
            weight.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


def mixed_precision(base: BaseModel) -> torch.autocast:
    """For a forward pass: the frozen weights may be in half precision, the LoRA is in single."""
    half = base.dtype != torch.float32
    return torch.autocast(base.device.type, dtype=base.dtype, enabled=half)
