"""GPU memory that a training step of Stable Diffusion 1.5 needs without gradient checkpointing.

The bytes that autograd keeps per image were counted at full size with tensors that have no content
(`tests/unit/training/families/test_memory.py` counts them again): attention is fused and keeps no
matrix, and under autocast the norms keep single precision. They grow with the pixels. No GPU has
measured the total; recovery from a lack of memory turns checkpointing on if the estimate was too
low.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from jobs.style import NUMBERS_PER_WEIGHT, WEIGHTS_PER_RANK, HyperParameters

_GIB = 1024**3
_SIDE = 512
"""Pixels of the image that the bytes below are for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a training step in half precision, with dropout, which keeps a fifth more.

    Attributes:
        reserve: Short-lived tensors, the libraries' workspaces, fragments.
        image: Kept per image of 512 x 512 pixels at rank 16, by target.
        rank: Kept per image and further rank.
        single: In single precision so many times as much is kept.
    """

    reserve: int
    image: Mapping[str, int]
    rank: int
    single: float


SD15 = Memory(
    reserve=round(1.5 * _GIB),
    image={"attention": round(1.32 * _GIB), "attention+ff": round(1.65 * _GIB)},
    rank=round(0.0011 * _GIB),
    single=1.5,
)


def kept_bytes(memory: Memory, parameters: HyperParameters, dtype: torch.dtype) -> int:
    """Bytes that the forward pass of one batch keeps for the backward pass.

    Args:
        memory: Of the base model's family.
        parameters: Resolution, batch size, target and rank.
        dtype: Of the frozen base.
    """
    per_image = memory.image[parameters.target] + memory.rank * max(0, parameters.rank - 16)
    images = parameters.batch_size * (parameters.resolution / _SIDE) ** 2
    return round(per_image * images * (memory.single if dtype == torch.float32 else 1))


def bytes_without_checkpointing(
    memory: Memory, parameters: HyperParameters, dtype: torch.dtype
) -> int:
    """Free memory that a step without gradient checkpointing needs, after the base is loaded."""
    weights = WEIGHTS_PER_RANK[parameters.target] * parameters.rank
    numbers = 1 + NUMBERS_PER_WEIGHT[parameters.optimizer]  # with the gradient
    return memory.reserve + kept_bytes(memory, parameters, dtype) + 4 * weights * numbers
