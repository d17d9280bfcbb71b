"""The objective: the noise (arXiv:2006.11239) or velocity (arXiv:2202.00512) in a latent."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.style.examples import Latents
from training.style.families.sd15 import BaseModel
from utils.errors import TrainingFailed


def min_snr_weights(scheduler: Any, gamma: float) -> Tensor:
    """Min-SNR loss weights (arXiv:2303.09556) of every timestep; all 1 where `gamma` is 0.

    Args:
        scheduler: The base's noise schedule; its prediction type decides the divisor.
        gamma: The ratio above which timesteps count less.

    Returns:
        [timesteps] float32.

    Raises:
        TrainingFailed: The base predicts neither noise nor velocity.
    """
    predicts = scheduler.config.prediction_type
    if predicts not in ("epsilon", "v_prediction"):
        raise TrainingFailed(
            f"The base model predicts {predicts!r}; only models that predict epsilon or "
            "v_prediction can be trained."
        )
    kept: Tensor = scheduler.alphas_cumprod.to(torch.float32)
    if not gamma:
        return torch.ones_like(kept)
    snr = kept / (1.0 - kept)
    if predicts == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1.0)
    # min(snr, gamma) / snr, written so that pure noise (SNR 0) gets its limit, 1, and no NaN.
    return (gamma / snr).clamp(max=1.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Chance:
    """Everything that is random about n images.

    Attributes:
        sample: Standard normal, [n, 4, h, w]: the latent's place in its distribution.
        noise: Standard normal, [n, 4, h, w]: what is mixed into it.
        timesteps: How much of it, [n].
        uncaptioned: Which images get the empty prompt (arXiv:2207.12598), [n].
    """

    sample: Tensor
    noise: Tensor
    timesteps: Tensor
    uncaptioned: Tensor

    @classmethod
    def draw(
        cls,
        shape: tuple[int, ...],
        *,
        timesteps: int,
        caption_dropout: float,
        noise_offset: float = 0.0,
        generator: torch.Generator,
    ) -> Chance:
        """Draw it all.

        Args:
            shape: n, 4, h, w.
            timesteps: How many the noise schedule has.
            caption_dropout: Part of the images that get the empty prompt.
            noise_offset: Size of a part of the noise that is one value a channel: an image's mean
                can be learnt, too.
            generator: Source of every number, on the device where they are needed.
        """
        draw: dict[str, Any] = {"generator": generator, "device": generator.device}
        sample, noise = torch.randn(shape, **draw), torch.randn(shape, **draw)
        if noise_offset:
            noise += noise_offset * torch.randn((*shape[:2], 1, 1), **draw)
        return cls(
            sample=sample,
            noise=noise,
            timesteps=torch.randint(timesteps, shape[:1], **draw),
            uncaptioned=torch.rand(shape[:1], **draw) < caption_dropout,
        )

    def split(self, size: int) -> list[Chance]:
        """The same, `size` images at a time; the last has the rest."""
        parts = (getattr(self, field.name).split(size) for field in dataclasses.fields(self))
        return [Chance(*part) for part in zip(*parts, strict=True)]


def denoising_losses(
    base: BaseModel,
    batch: tuple[Latents, Tensor],
    chance: Chance,
    *,
    empty_text: Tensor,
    weights: Tensor,
    autocast: AbstractContextManager[Any],
) -> tuple[Tensor, Tensor]:
    """Noise each image of a batch and compare what the UNet makes of it with what is true.

    Args:
        base: The base model with the LoRA on.
        batch: Latent distributions, [n, 4, h, w], and embeddings, [n, 77, d].
        chance: Everything random about these images.
        empty_text: Embedding of the empty prompt, [77, d].
        weights: Loss weight of every timestep.
        autocast: Mixed precision for the forward pass.

    Returns:
        Each image's mean squared error, [n] float32: bare and without gradient; and weighted,
        with its gradient.
    """
    latents, text = batch
    text = torch.where(chance.uncaptioned[:, None, None], empty_text, text)
    # A fresh sample of the posterior each time, as if the VAE had encoded the image again.
    clean = latents.mean + latents.std * chance.sample
    noisy = base.scheduler.add_noise(clean, chance.noise, chance.timesteps)
    with autocast:
        predicted = base.unet(
            noisy.to(base.dtype), chance.timesteps, encoder_hidden_states=text
        ).sample
    target = chance.noise
    if base.scheduler.config.prediction_type == "v_prediction":
        target = base.scheduler.get_velocity(clean, chance.noise, chance.timesteps)
    errors = F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))
    return errors.detach(), errors * weights[chance.timesteps]
