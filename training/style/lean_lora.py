"""A leaner LoRA for the training loop: fewer kernels per layer, and one tensor per step.

A training step of SD1.5 at batch 1 is bound by kernel launches, and more than half of the launches
come from PEFT's layers under autocast. For each of 128 layers PEFT casts the input to float32,
casts A, B and the input back to half precision, multiplies the activation by the scaling, and adds
it to the layer's own output. This module computes the same function without that work:

- **One buffer.** All trainable weights are views of one float32 tensor. Clipping, the optimizer
  and the checks of the gradient handle that tensor instead of 256 small ones.
- **Copies once per step.** After each update one kernel writes a copy of the buffer in the base's
  dtype, with each B already multiplied by its layer's scaling: s·(x·Aᵀ)·Bᵀ = (x·Aᵀ)·(s·B)ᵀ. The
  layers read views of that copy, so a pass casts nothing and needs no autocast. The gradient of the
  buffer is the copies' gradient times the same factors (chain rule).
- **Two kernels per layer.** `addmm` adds the product with B to the layer's own output.

The float32 weights remain the ones that are trained, saved and exported: rounding to half precision
happens in every forward pass, as under autocast, and never accumulates. This is the mixed-precision
scheme of Micikevicius et al., "Mixed Precision Training" (arXiv:1710.03740, section 3.1: a master
copy of the weights in single precision), applied to the LoRA of Hu et al. (arXiv:2106.09685).

`benchmarks.counts` counts the launches; tests/unit/training/test_lean_lora.py compares gradients
and whole trainings with the plain path.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Self

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LeanLora:
    """A network whose LoRA layers compute with copies of one flat buffer of weights.

    A context manager. Inside it the network's LoRA parameters are the copies: they have the
    base's dtype, contain the scaling, and receive the gradients. Leaving it gives the network its
    float32 parameters and PEFT's own forward back, with what was learnt.

    Attributes:
        weights: The float32 weights by their name in the network, in the order of its parameters.
            They are views of `flat`, their gradients views of its gradient.
        flat: All of them as one parameter, [n] float32. Its gradient is never None.

    Args:
        network: A network with an active PEFT LoRA on linear layers, its weights float32.
        dtype: Of the copies: that of the network's frozen weights.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        layers = {name: each for name, each in network.named_modules() if isinstance(each, Linear)}
        self._layers = tuple(layers.values())
        self._trained = {n: w for n, w in network.named_parameters() if w.requires_grad}
        own = list(self._trained.values())
        self.flat = nn.Parameter(torch.cat([weight.detach().reshape(-1) for weight in own]))
        self.flat.grad = torch.zeros_like(self.flat)
        self.weights = {n: nn.Parameter(p) for n, p in self._views(self.flat.detach()).items()}
        for name, gradient in self._views(self.flat.grad).items():
            self.weights[name].grad = gradient
        self._factors = _factors(layers, self._trained)
        self._copy = torch.empty_like(self.flat, dtype=dtype, requires_grad=False)
        self._gradients = torch.empty_like(self._copy)

    def __enter__(self) -> Self:
        self.refresh()
        for name, copy in self._views(self._copy).items():
            self._trained[name].data = copy
        for layer in self._layers:
            layer.forward = functools.partial(_forward, layer)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            del layer.forward  # the class's own remains
        for name, weight in self._trained.items():
            weight.grad = None
            weight.data = self.weights[name].data

    def refresh(self) -> None:
        """Write the copies again, after the weights have changed."""
        torch.mul(self.flat.detach(), self._factors, out=self._copy)

    def gather(self) -> None:
        """Add the gradients of the copies to the weights', in float32, and drop the former."""
        found = []
        for weight in self._trained.values():
            found.append(
                torch.zeros_like(weight).reshape(-1)
                if weight.grad is None
                else weight.grad.reshape(-1)
            )
            weight.grad = None
        torch.cat(found, out=self._gradients)
        assert self.flat.grad is not None
        self.flat.grad.addcmul_(self._gradients.to(self.flat.dtype), self._factors)

    def zero_grad(self) -> None:
        """Reset the gradients of the weights."""
        assert self.flat.grad is not None
        self.flat.grad.zero_()

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a flat tensor in the shapes of the weights."""
        sizes = [weight.numel() for weight in self._trained.values()]
        parts = torch.split(flat, sizes)
        return {
            name: part.view(weight.shape)
            for (name, weight), part in zip(self._trained.items(), parts, strict=True)
        }


def suits(network: nn.Module) -> bool:
    """Whether every trainable weight belongs to a plain LoRA on a linear layer."""
    known = {
        id(weight)
        for layer in network.modules()
        if isinstance(layer, Linear) and not layer.lora_variant and not layer.merged
        for part in (layer.lora_A, layer.lora_B)
        for weight in part.parameters()
    }
    return all(id(weight) in known for weight in network.parameters() if weight.requires_grad)


def _factors(layers: Mapping[str, Linear], trained: Mapping[str, Tensor]) -> Tensor:
    """The factor of each weight in the copy, [n] float32: 1 for A, the scaling for B."""
    parts = []
    for name, weight in trained.items():
        path, _, rest = name.partition(".lora_B.")
        adapter = rest.partition(".")[0]
        factor = layers[path].scaling[adapter] if rest else 1.0
        parts.append(torch.full((weight.numel(),), factor, device=weight.device))
    return torch.cat(parts)


def _forward(layer: Linear, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """A linear layer with its LoRA, whose B contains the scaling.

    Args:
        layer: The layer. Its one active adapter is used unless it is switched off.
        x: [..., in], of the dtype of the layer's weights.

    Returns:
        [..., out].
    """
    base = layer.base_layer
    if layer.disable_adapters:
        return F.linear(x, base.weight, base.bias)
    (adapter,) = layer.active_adapters
    dropout = layer.lora_dropout[adapter]
    dropped = dropout(x) if isinstance(dropout, nn.Dropout) and dropout.training else None
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    computed: Tensor = _LinearWithLora.apply(  # type: ignore[no-untyped-call]
        x, dropped, base.weight, base.bias, a, b
    )
    return computed


class _LinearWithLora(torch.autograd.Function):  # pylint: disable=abstract-method
    """x·Wᵀ + bias + (dropped·Aᵀ)·Bᵀ in three matrix products, and its gradient in five.

    Autograd would take two more for the gradient, and about twenty small operations on views,
    which take a CPU as long as the products of a narrow network.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        """Compute.

        Args:
            ctx: For the backward pass.
            x: [..., in].
            dropped: `x` after dropout, for the LoRA; None where it is `x` itself.
            weight, bias: Of the frozen layer, [out, in] and [out].
            a, b: The LoRA, [rank, in] and [out, rank].

        Returns:
            [..., out].
        """
        rows = x.reshape(-1, x.shape[-1])
        inner = rows if dropped is None else dropped.reshape(rows.shape)
        transposed = weight.t()
        found = rows.mm(transposed) if bias is None else torch.addmm(bias, rows, transposed)
        low = inner.mm(a.t())
        ctx.save_for_backward(inner, low, weight, a, b)
        ctx.shape, ctx.drops = x.shape, dropped is not None
        return found.addmm_(low, b.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """A gradient for each argument of `forward`; None for those that are frozen."""
        inner, low, weight, a, b = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_low = rows.mm(b)
        of_b, of_a = rows.t().mm(low), of_low.t().mm(inner)
        of_x = rows.mm(weight) if ctx.needs_input_grad[0] else None
        of_dropped = None
        if ctx.drops and ctx.needs_input_grad[1]:
            of_dropped = of_low.mm(a).view(ctx.shape)
        elif of_x is not None:
            of_x.addmm_(of_low, a)
        if of_x is not None:
            of_x = of_x.view(ctx.shape)
        return of_x, of_dropped, None, None, of_a, of_b
