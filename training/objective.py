"""What the UNet learns: the noise (arXiv:2006.11239) or velocity (arXiv:2202.00512) in a latent."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.base_model import BaseModel
from training.dataset import Latents
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


def denoising_losses(
    base: BaseModel,
    batch: tuple[Latents, Tensor],
    *,
    empty_text: Tensor,
    caption_dropout: float,
    weights: Tensor,
    generator: torch.Generator,
    autocast: AbstractContextManager[Any],
) -> tuple[Tensor, Tensor]:
    """Noise each picture of a batch to a random timestep and compare what the UNet makes of it.

    Args:
        base: The base model with the LoRA on.
        batch: Latent distributions, [n, 4, h, w], and embeddings, [n, 77, d].
        empty_text: Embedding of the empty prompt, [77, d].
        caption_dropout: Part of the pictures that get the empty prompt (arXiv:2207.12598).
        weights: Loss weight of every timestep.
        generator: Source of every random number here, on the base's device.
        autocast: Mixed precision for the forward pass.

    Returns:
        Each picture's mean squared error, [n] float32: bare and without gradient; and weighted,
        with its gradient.
    """
    latents, text = batch
    draw: dict[str, Any] = {"generator": generator, "device": base.device}
    # A fresh sample of the posterior each time, as if the VAE had encoded the picture again.
    clean = latents.mean + latents.std * torch.randn(latents.mean.shape, **draw)
    noise = torch.randn(clean.shape, **draw)
    steps = torch.randint(base.scheduler.config.num_train_timesteps, (len(text),), **draw)
    without = torch.rand(len(text), **draw) < caption_dropout
    text = torch.where(without[:, None, None], empty_text, text)
    noisy = base.scheduler.add_noise(clean, noise, steps)
    with autocast:
        predicted = base.unet(noisy.to(base.dtype), steps, encoder_hidden_states=text).sample
    target = noise
    if base.scheduler.config.prediction_type == "v_prediction":
        target = base.scheduler.get_velocity(clean, noise, steps)
    errors = F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))
    return errors.detach(), errors * weights[steps]
