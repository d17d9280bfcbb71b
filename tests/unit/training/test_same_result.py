"""The fast loop trains the same as the plain loop, with caches, fusion and work on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from jobs.style import TrainingImage, TrainingRun
from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import Weights, in_one_go, lora_of, trained
from training.style.dataset import prepare
from training.style.examples import Dataset
from training.style.families.sd15 import BaseModel
from training.style.objective import Chance
from training.style.plan import Plan

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4
"""Relative; the weights' is of the length of all that was learnt. In float32 only the order of
additions differs."""


def plainly_trained(base: BaseModel, run: TrainingRun) -> tuple[list[float], Weights]:
    """As in the popular scripts: every step encodes the image and reads the loss.

    Only what is random is drawn as the product draws it: the LoRA's first weights, the order, noise
    and timesteps, and the dropout's masks.
    """
    parameters, data = run.parameters, prepare(run, base)
    plan = Plan(data.shapes, parameters)
    weights = base.attach(parameters)
    noise_seed, dropout_seed = np.random.SeedSequence(parameters.seed).generate_state(2)
    torch.manual_seed(int(dropout_seed))
    generator = torch.Generator().manual_seed(int(noise_seed))
    optimizer = torch.optim.AdamW(
        weights, lr=parameters.learning_rate, weight_decay=parameters.weight_decay, foreach=False
    )
    losses: list[list[float]] = [[] for _ in range(parameters.epochs)]
    try:
        for step in range(plan.total_steps):
            (batch,) = plan.batches(step)
            each, weighted = plain_losses(base, run, data, batch, generator)
            torch.autograd.backward(weighted)
            torch.nn.utils.clip_grad_norm_(weights, parameters.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses[step // plan.steps_per_epoch] += each
        return [sum(epoch) / len(epoch) for epoch in losses], lora_of(base)
    finally:
        base.detach()


def plain_losses(
    base: BaseModel, run: TrainingRun, data: Dataset, batch: list[int], generator: torch.Generator
) -> tuple[list[float], Tensor]:
    """Each image's error, and the batch's mean with the min-SNR weights, in float32."""
    drawn = Chance.draw(
        (len(batch), 4, run.parameters.resolution // 8, run.parameters.resolution // 8),
        timesteps=1000,
        caption_dropout=run.parameters.caption_dropout,
        generator=generator,
    )
    captions = [
        "" if dropped else run.images[index].caption
        for index, dropped in zip(batch, drawn.uncaptioned.tolist(), strict=True)
    ]
    images = [data.batch([index])[0] for index in batch]
    latents = torch.cat([image.mean for image in images])
    latents = latents + drawn.sample * torch.cat([image.std for image in images])
    noisy = base.scheduler.add_noise(latents, drawn.noise, drawn.timesteps)
    with torch.no_grad():
        text = base.encode_prompts(captions)
    predicted = base.unet(noisy, drawn.timesteps, encoder_hidden_states=text).sample
    each = F.mse_loss(predicted, drawn.noise, reduction="none").mean(dim=(1, 2, 3))
    signal = base.scheduler.alphas_cumprod[drawn.timesteps]
    snr = signal / (1 - signal)
    return each.tolist(), (each * (run.parameters.snr_gamma / snr).clamp(max=1.0)).mean()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_losses_and_weights_are_those_of_the_plain_loop(
    base: BaseModel, make_run: MakeRun, batch_size: int
) -> None:
    run = make_run(
        count=4,
        epochs=4,
        batch_size=batch_size,
        dropout=0.1,
        caption_dropout=0.3,
        snr_gamma=5.0,
        lr_schedule="constant",
        warmup_ratio=0.0,
        max_grad_norm=0.05,  # which clips
    )
    plain_losses, plain = plainly_trained(base, run)
    result, weights, _ = trained(base, run, through=in_one_go)
    assert result.losses == pytest.approx(plain_losses, rel=LOSS_TOLERANCE)
    assert weights.keys() == plain.keys()
    learnt = sum(float(weight.norm() ** 2) for name, weight in plain.items() if "lora_B" in name)
    apart = sum(float((weights[name] - plain[name]).norm() ** 2) for name in plain)
    assert learnt > 0 and (apart / learnt) ** 0.5 < WEIGHT_TOLERANCE


def test_latents_are_distributed_as_the_vae_s_own_samples(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = np.kron(pixels, np.ones((8, 8, 1), dtype=np.uint8))  # 64 x 64: nothing is scaled
    path = tmp_path / "squares.png"
    Image.fromarray(pixels).save(path)
    image = TrainingImage("s3://media/training/squares.png", str(path), "squares")
    latents, _ = prepare(make_run(images=(image,), min_images=1), base).batch([0])
    generator = torch.Generator().manual_seed(4)
    shape = (4000, *latents.mean.shape[1:])
    drawn = Chance.draw(shape, timesteps=1000, caption_dropout=0.0, generator=generator)
    cached = latents.mean + latents.std * drawn.sample

    encoded = encoded_each_time(base, pixels, 4000, generator)
    spread = encoded.std(dim=0)
    # The difference of two means of 4,000 samples is a 45th of their spread, of two spreads a 63rd.
    assert float(((cached.mean(dim=0) - encoded.mean(dim=0)) / spread).abs().max()) < 5 / 45
    assert float((cached.std(dim=0) / spread - 1).abs().max()) < 5 / 63


def encoded_each_time(
    base: BaseModel, pixels: NDArray[np.uint8], times: int, generator: torch.Generator
) -> Tensor:
    """The image's latents as the VAE samples them, again each time."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1.0
    with torch.no_grad():
        posterior = base.vae.encode(image).latent_dist
        sampled = torch.cat([posterior.sample(generator) for _ in range(times)])
    return sampled * float(base.vae.config.scaling_factor)


def test_noise_is_normal_and_timesteps_are_uniform() -> None:
    drawn = Chance.draw(
        (20_000, 4, 2, 2),
        timesteps=1000,
        caption_dropout=0.0,
        generator=torch.Generator().manual_seed(6),
    )
    for numbers in (drawn.noise.flatten(), drawn.sample.flatten()):
        assert abs(float(numbers.mean())) < 5 / len(numbers) ** 0.5
        assert float(numbers.std()) == pytest.approx(1.0, abs=0.01)
        assert float((numbers**4).mean()) == pytest.approx(3.0, abs=0.1)  # a normal one's
    assert abs(float((drawn.noise * drawn.sample).mean())) < 0.01, "they know nothing of each other"
    counts = torch.bincount(drawn.timesteps, minlength=1000)
    assert len(counts) == 1000
    chi = float(((counts - 20.0) ** 2 / 20.0).sum())
    assert 999 - 5 * 45 < chi < 999 + 5 * 45  # 999 degrees of freedom: their standard deviation 45
