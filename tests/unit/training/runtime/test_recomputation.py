"""Gradient checkpointing gives the gradients that training without it gives, from less memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from jobs.style import HyperParameters
from training.runtime.recomputation import Recomputation
from training.style.families.sd15 import BaseModel

ROUNDING = 1e-5
"""Relative. The same numbers are added, in another order where a block's input has other uses."""


@contextlib.contextmanager
def learning(
    base: BaseModel, *, checkpointing: bool, dropout: float = 0.0
) -> Iterator[Callable[[], Tensor]]:
    """A LoRA that has learnt something, and what computes its loss on two images."""
    weights = base.attach(HyperParameters(rank=2, dropout=dropout), checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in weights:
            weight.normal_(0.0, 0.05, generator=generator)
    noisy = torch.randn((2, 4, 16, 16), generator=generator)
    text = torch.randn((2, 77, base.unet.config.cross_attention_dim), generator=generator)
    torch.manual_seed(4)

    def loss() -> Tensor:
        predicted = base.unet(noisy, torch.tensor([3, 700]), encoder_hidden_states=text).sample
        mean: Tensor = predicted.float().square().mean()
        return mean

    try:
        yield loss
    finally:
        base.detach()


def mixed(dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision, or none."""
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)


def gradient_of(
    base: BaseModel,
    *,
    checkpointing: bool,
    dropout: float = 0.0,
    forward: torch.dtype | None = None,
    backward: torch.dtype | None = None,
) -> Tensor:
    """The LoRA's gradient, with a mixed precision for the forward pass and one around both."""
    with learning(base, checkpointing=checkpointing, dropout=dropout) as loss:
        weights = [weight for weight in base.unet.parameters() if weight.requires_grad]
        with mixed(backward):
            with mixed(forward):
                computed = loss()
            found = torch.autograd.grad(computed, weights)
        return torch.cat([part.flatten() for part in found])


def away(gradient: Tensor, expected: Tensor) -> float:
    """Their distance, relative to the expected one's length."""
    return float((gradient - expected).norm() / expected.norm())


def bytes_kept(base: BaseModel, *, checkpointing: bool) -> int:
    """The tensors that the forward pass keeps for the gradient, apart from the model."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with contextlib.ExitStack() as stack:
        loss = stack.enter_context(learning(base, checkpointing=checkpointing))
        stack.enter_context(hooks)
        computed = loss()
        model = {weight.untyped_storage().data_ptr() for weight in base.unet.parameters()}
        assert computed.requires_grad
        return sum(size for place, size in kept.items() if place not in model)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradient_is_the_one_without_it(base: BaseModel, dropout: float) -> None:
    """With dropout, too: the second pass draws the masks of the first."""
    expected = gradient_of(base, checkpointing=False, dropout=dropout)
    assert away(gradient_of(base, checkpointing=True, dropout=dropout), expected) < ROUNDING


@pytest.mark.parametrize("backward", [None, torch.bfloat16])
def test_in_mixed_precision_the_second_pass_is_as_precise_as_the_first(
    base: BaseModel, backward: torch.dtype | None
) -> None:
    half = torch.bfloat16
    expected = gradient_of(base, checkpointing=False, forward=half)
    gradient = gradient_of(base, checkpointing=True, forward=half, backward=backward)
    assert away(gradient, expected) < away(gradient_of(base, checkpointing=False), expected) / 3


def test_the_memory_kept_for_the_gradient_is_less_than_half(base: BaseModel) -> None:
    without = bytes_kept(base, checkpointing=False)
    assert 0 < bytes_kept(base, checkpointing=True) < without / 2


def test_random_numbers_go_on_as_if_nothing_was_computed_twice(base: BaseModel) -> None:
    gradient_of(base, checkpointing=False, dropout=0.3)
    without = torch.get_rng_state()
    gradient_of(base, checkpointing=True, dropout=0.3)
    assert torch.equal(torch.get_rng_state(), without)


class Block(nn.Module):
    """A frozen layer and a trainable one, and a description of them."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.trained = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, given: Tensor, scale: float | None, also: Tensor) -> Tensor:
        """Also draws."""
        self.calls += 1
        if self.calls == 2:
            self.during()
        computed: Tensor = self.trained(torch.tanh(self.frozen(given * (scale or 1.0) + also)))
        return computed

    during: Callable[[], object] = staticmethod(lambda: None)


def gradients(compute: Callable[..., Tensor], block: Block, given: Tensor) -> list[Tensor]:
    """Of what is given and of the trained layer."""
    computed = compute(given, 2.0, torch.ones(2, 3)).sum()
    return list(torch.autograd.grad(computed, [given, *block.trained.parameters()]))


def test_a_value_that_is_no_tensor_passes_through_and_what_needs_a_gradient_gets_it() -> None:
    block, given = Block(), torch.randn(2, 3, requires_grad=True)
    found = gradients(functools.partial(Recomputation(), block), block, given)
    assert block.calls == 2
    for gradient, expected in zip(found, gradients(block, block, given), strict=True):
        assert torch.equal(gradient, expected)


def test_a_block_before_all_that_is_trained_is_computed_once() -> None:
    block = Block().requires_grad_(False)
    computed = Recomputation()(block, torch.randn(2, 3), None, torch.ones(2, 3))
    assert not computed.requires_grad
    assert block.calls == 1


def test_a_second_pass_that_fails_leaves_the_random_numbers_where_they_were() -> None:
    block, given = Block(), torch.randn(2, 3, requires_grad=True)

    def out_of_memory() -> None:
        torch.rand(5)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    block.during = out_of_memory
    computed = Recomputation()(block, given, None, torch.ones(2, 3)).sum()
    before = torch.get_rng_state()
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.backward(computed)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_on_a_gpu_the_second_pass_draws_the_masks_of_the_first_in_mixed_precision() -> None:
    block = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64)).to("cuda")
    given = torch.randn(8, 64, device="cuda", requires_grad=True)
    found = []
    for compute in (block, functools.partial(Recomputation(), block)):
        torch.manual_seed(5)
        with torch.autocast("cuda", dtype=torch.float16):
            computed = compute(given).float().square().mean()
        found.append(torch.autograd.grad(computed, [given, *block.parameters()]))
    for expected, gradient in zip(*found, strict=True):
        assert torch.equal(gradient, expected)
