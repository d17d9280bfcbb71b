"""The fast settings of a GPU, as far as they can be tested without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from jobs.style import HyperParameters
from tests.unit.training.style.test_lean_lora import (
    ROUNDING,
    away,
    lean_gradient,
    plain_gradient,
    wake,
)
from training.runtime.device import prefer_speed, tf32
from training.style.families.sd15 import BaseModel

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _settings_as_before() -> Iterator[None]:
    """The settings are the process's own."""
    benchmark = torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = False
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


def is_channels_last(network: nn.Conv2d) -> bool:
    """Whether the weight's channels are next to each other in memory."""
    return network.weight.is_contiguous(memory_format=torch.channels_last)


def test_on_a_gpu_cudnn_searches_and_weights_are_channels_last() -> None:
    network = nn.Conv2d(4, 8, 3)
    before = network.weight.detach().clone()
    prefer_speed(GPU, network)
    assert torch.backends.cudnn.benchmark and is_channels_last(network)
    assert torch.equal(network.weight, before)


def test_on_a_cpu_nothing_changes() -> None:
    network = nn.Conv2d(4, 8, 3)
    prefer_speed(CPU, network)
    assert not torch.backends.cudnn.benchmark and not is_channels_last(network)


def test_with_deterministic_algorithms_cudnn_does_not_search() -> None:
    torch.use_deterministic_algorithms(True)
    network = nn.Conv2d(4, 8, 3)
    prefer_speed(GPU, network)
    assert not torch.backends.cudnn.benchmark and is_channels_last(network)


def test_tf32_is_on_within_the_block_only_and_off_again_after_an_error() -> None:
    torch.set_float32_matmul_precision("highest")
    with contextlib.suppress(ZeroDivisionError), tf32(GPU):
        assert torch.get_float32_matmul_precision() == "high"
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("device", "enabled"), [(CPU, True), (GPU, False)])
def test_tf32_is_for_a_gpu_on_the_fast_path(device: torch.device, enabled: bool) -> None:
    torch.set_float32_matmul_precision("highest")
    with tf32(device, enabled=enabled):
        assert torch.get_float32_matmul_precision() == "highest"


def test_in_the_other_layout_the_gradient_and_the_latents_are_the_same(base: BaseModel) -> None:
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    base.attach(HyperParameters(rank=2, alpha=4.0, dropout=0.0))
    wake(base)
    gradient, (mean, std) = plain_gradient(base), base.encode_images(pixels)
    prefer_speed(GPU, base.unet, base.vae)
    assert is_channels_last(base.unet.conv_in)
    try:
        assert away(lean_gradient(base), gradient) < ROUNDING
        for found, expected in zip(base.encode_images(pixels), (mean, std), strict=True):
            assert away(found, expected) < ROUNDING
        base.detach()  # the layout is no change of the weights
    finally:
        for network in (base.unet, base.vae):
            network.to(memory_format=torch.contiguous_format)
