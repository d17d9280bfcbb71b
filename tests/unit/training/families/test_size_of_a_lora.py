"""The front desk's estimate of a training's files holds for SD1.5's real layers."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from jobs.style import NUMBERS_PER_WEIGHT, OPTIMIZERS, TARGETS, WEIGHTS_PER_RANK, HyperParameters
from training.runtime import optimizer
from training.style.families.lora_config import peft_config


@pytest.mark.parametrize("target", TARGETS)
def test_a_lora_has_as_many_weights_for_each_rank_as_estimated(target: str) -> None:
    with torch.device("meta"):  # SD1.5's shapes without their memory
        unet = UNet2DConditionModel(cross_attention_dim=768)
        unet.add_adapter(peft_config(HyperParameters(rank=4, target=target)))
    weights = sum(weight.numel() for weight in unet.parameters() if weight.requires_grad)
    assert weights == 4 * WEIGHTS_PER_RANK[target]


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_a_checkpoint_has_no_more_numbers_for_each_weight_than_estimated(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(1000))
    made = optimizer.create(name, [weight], learning_rate=1e-4, weight_decay=1e-2)
    weight.grad = torch.ones(1000)
    made.step()
    state = optimizer.state_tensors(made, {"weight": weight}).values()
    numbers = weight.numel() + sum(tensor.numel() for tensor in state if tensor.dim())
    assert numbers <= NUMBERS_PER_WEIGHT[name] * weight.numel()
    assert set(NUMBERS_PER_WEIGHT) == set(OPTIMIZERS)
