"""The intake of a run without its base model: which images it would use, and in how many steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from jobs.lora_config import TrainingRun
from training.style.dataset import ImageReport, prepare
from training.style.plan import Plan

_PIXELS_PER_LATENT = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Validation:
    """The intake report of a run that is not trained.

    Attributes:
        images: The report of each image.
        warnings: Sentences about the images as a whole.
        steps: Optimizer steps of the whole job.
    """

    images: tuple[ImageReport, ...]
    warnings: tuple[str, ...]
    steps: int

    @property
    def usable(self) -> int:
        """Images that would be trained on."""
        return sum(image.status != "left_out" for image in self.images)


def validate(run: TrainingRun) -> Validation:
    """Vet a run's images and plan its steps, without a base model and without a GPU.

    Without the tokenizer, captions are not cut to the length that the base model reads.
    """
    stand_in: Any = _NoBaseModel()
    found = prepare(dataclasses.replace(run, min_images=0), stand_in)
    steps = Plan(found.shapes, run.parameters).total_steps if found.examples else 0
    return Validation(found.reports, found.warnings, steps)


class _NoBaseModel:
    """Takes the place of the base model: latents of the right shape, all zero."""

    def fit_prompt(self, prompt: str) -> str:
        """The prompt, uncut."""
        return prompt

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each image."""
        count, _, height, width = pixels.shape
        sides = (height // _PIXELS_PER_LATENT, width // _PIXELS_PER_LATENT)
        zeros = torch.zeros(count, 4, *sides)
        return zeros, zeros

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """One embedding per prompt."""
        return torch.zeros(len(prompts), 1)
