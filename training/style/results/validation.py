"""The intake of a run without its base model: the images it would use, and its steps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jobs.style import TrainingRun
from training.style.dataset import prepare
from training.style.examples import ImageReport
from training.style.plan import Plan
from utils.errors import LowQualityData

_PIXELS_PER_LATENT = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Validation:
    """The intake report of a run that is not trained.

    Attributes:
        images: The report of each image.
        warnings: Sentences about the images as a whole.
        steps: Optimizer steps of the whole job.
        validation_images: The report of each validation image.
        problem: Why the run cannot be trained although its images can be used; else empty.
    """

    images: tuple[ImageReport, ...]
    warnings: tuple[str, ...]
    steps: int
    validation_images: tuple[ImageReport, ...] = ()
    problem: str = ""

    @property
    def usable(self) -> int:
        """The number of images that would be trained on."""
        return sum(image.status != "left_out" for image in self.images)

    @property
    def buckets(self) -> dict[str, int]:
        """The number of images for each size that images are scaled and cropped to."""
        return dict(Counter(image.trained_as for image in self.images if image.trained_as))


def validate(run: TrainingRun) -> Validation:
    """Vet a run's images and plan its steps, without a base model and without a GPU.

    Captions are not cut to the length that the base model reads, because its tokenizer is not
    loaded.
    """
    stand_in: Any = _NoBaseModel()
    lenient, problem = dataclasses.replace(run, min_images=0), ""
    try:
        found = prepare(lenient, stand_in)
    except LowQualityData as error:  # nothing can be held out
        problem = str(error)
        last = dataclasses.replace(run.parameters, deliver="last")
        found = prepare(dataclasses.replace(lenient, parameters=last), stand_in)
    steps = Plan(found.shapes, run.parameters).total_steps if found.usable else 0
    others = found.held_out.entries if found.held_out else ()
    return Validation(found.entries, found.warnings, steps, others, problem)


class _NoBaseModel:
    """Takes the place of the base model: latents and embeddings that are all zero."""

    def fit_prompt(self, prompt: str) -> str:
        """The whole prompt."""
        return prompt

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros in the shape of the images' latents."""
        count, _, height, width = pixels.shape
        shape = (count, 4, height // _PIXELS_PER_LATENT, width // _PIXELS_PER_LATENT)
        return torch.zeros(shape), torch.zeros(shape)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """A zero for each prompt."""
        return torch.zeros(len(prompts), 1)
