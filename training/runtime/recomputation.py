"""Gradient checkpointing for frozen blocks with a LoRA: less memory, for little time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Recomputation:
    """Computes a block without keeping what its gradient needs, which is computed again for that.

    An argument for diffusers' `enable_gradient_checkpointing`. torch's own checkpointing must serve
    any code, and so watches every tensor that is kept, in both passes. Here a block's inputs and
    few trainable weights are all that a gradient can be asked for. At batch 1, the time of a step
    is mostly spent around the kernels, and that watching was most of checkpointing's cost: see
    docs/benchmarks.md. Gradients are torch's, except for the order of additions if a block's input
    is used elsewhere too.

    The idea is Chen et al.'s, "Training Deep Nets with Sublinear Memory Cost" (2016).
    """

    def __init__(self) -> None:
        self._trainable: dict[nn.Module, tuple[nn.Parameter, ...]] = {}

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        """Compute a block.

        Args:
            block: Returns one tensor. Its trainable weights must be those of the first call.
            inputs: Arguments of its forward. Values that are not tensors pass through.
        """
        weights = self._trainable.get(block)
        if weights is None:
            weights = tuple(weight for weight in block.parameters() if weight.requires_grad)
            self._trainable[block] = weights
        recomputed: Callable[..., Any] = _Recomputed.apply
        return recomputed(block, len(inputs), *inputs, *weights)


class _Recomputed(torch.autograd.Function):  # pylint: disable=abstract-method
    """The block as one operation of its inputs and its trainable weights."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, count: int, *arguments: Any) -> Tensor:
        """Compute without a gradient, and keep the values that are needed to compute again.

        Args:
            ctx: For the backward pass.
            block: The block to compute.
            count: How many of the arguments are its inputs.
            arguments: The inputs, and the block's trainable weights.
        """
        inputs, weights = arguments[:count], arguments[count:]
        device = next(given.device for given in inputs if isinstance(given, Tensor))
        ctx.block, ctx.weights = block, weights
        ctx.others = [None if isinstance(given, Tensor) else given for given in inputs]
        ctx.tensors = [i for i, given in enumerate(inputs) if isinstance(given, Tensor)]
        ctx.save_for_backward(*(inputs[index] for index in ctx.tensors))
        ctx.generator = _generator(device)
        ctx.random = ctx.generator.get_state()
        ctx.autocast = {
            "device_type": device.type,
            "enabled": torch.is_autocast_enabled(device.type),
            "dtype": torch.get_autocast_dtype(device.type),
        }
        computed: Tensor = block(*inputs)
        return computed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute again, with a gradient this time.

        Returns:
            A gradient for each argument of `forward`; None if none is needed.
        """
        inputs: list[Any] = list(ctx.others)
        needed: Sequence[bool] = ctx.needs_input_grad[2:]
        for index, saved in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            inputs[index] = saved.detach().requires_grad_(needed[index])
        again = torch.autocast(**ctx.autocast)
        with torch.enable_grad(), again, _back_at(ctx.random, ctx.generator):
            computed = ctx.block(*inputs)
        arguments = [*inputs, *ctx.weights]
        wanted = [argument for argument, need in zip(arguments, needed, strict=True) if need]
        found = iter(torch.autograd.grad(computed, wanted, gradients))
        return None, None, *(next(found) if need else None for need in needed)


@contextlib.contextmanager
def _back_at(state: Tensor, generator: torch.Generator) -> Iterator[None]:
    """Repeat the random numbers of an earlier pass: dropout's masks."""
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)


def _generator(device: torch.device) -> torch.Generator:
    """The global source of random numbers of a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
