"""A style that can be measured: only the samples with the LoRA have its colours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from jobs.kinds import TrainerOptions
from jobs.style import HyperParameters, TrainingImage, TrainingRun
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from training.style.results import preview
from training.style.trainer import LoRATrainer

WARM, COLD = "ember", "lagoon"
LESSONS = 40


class Averages(torch.nn.Module):
    """An autoencoder that can be followed by hand: a latent is its eight by eight pixels' mean."""

    config = SimpleNamespace(scaling_factor=1.0)

    def encode(self, pixels: Tensor) -> Any:
        """Three means of colours, and their own mean."""
        colours = F.avg_pool2d(pixels, 8)
        mean = torch.cat([colours, colours.mean(dim=1, keepdim=True)], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=0.1 + 0 * mean))

    def decode(self, latents: Tensor) -> Any:
        """Each latent as a square of one colour."""
        return SimpleNamespace(sample=F.interpolate(latents[:, :3], scale_factor=8))


@pytest.fixture(name="painter", scope="module")
def fixture_painter(stand_in: Path) -> BaseModel:
    """A tiny base model that can paint: it was taught to, on squares of all colours alike."""
    base = BaseModel.load(TrainerOptions(str(stand_in), allow_cpu=True))
    chance = torch.Generator().manual_seed(1)
    texts = base.encode_prompts(["", "a square", WARM, COLD])
    base.unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(base.unet.parameters(), lr=4e-3)
    for step in range(LESSONS):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 8) * (1 - step / LESSONS)
        colours = 0.6 * torch.randn((8, 3, 1, 1), generator=chance)
        flat = torch.cat([colours, colours.mean(dim=1, keepdim=True)], dim=1).expand(8, 4, 8, 8)
        clean = flat + 0.1 * torch.randn((8, 4, 8, 8), generator=chance)
        noise = torch.randn((8, 4, 8, 8), generator=chance)
        timesteps = torch.randint(1000, (8,), generator=chance)
        said = texts[torch.randint(len(texts), (8,), generator=chance)]
        noisy = base.scheduler.add_noise(clean, noise, timesteps)
        predicted = base.unet(noisy, timesteps, encoder_hidden_states=said).sample
        torch.autograd.backward(F.mse_loss(predicted, noise))
        optimizer.step()
        optimizer.zero_grad()
    base.take_off()
    base.vae = Averages()
    return base


def images(folder: Path, captions: dict[str, str]) -> tuple[TrainingImage, ...]:
    """Four warm images and four cold ones of coloured squares."""
    folder.mkdir()
    random = np.random.default_rng(2)
    made = []
    for number in range(8):
        kind, colour = ((WARM, (235, 70, 40)), (COLD, (40, 70, 235)))[number % 2]
        squares = (colour + random.normal(0, 25, (8, 8, 3))).clip(0, 255).astype(np.uint8)
        path = folder / f"{kind}_{number}.png"
        Image.fromarray(np.kron(squares, np.ones((8, 8, 1), dtype=np.uint8))).save(path)
        made.append(TrainingImage(path.name, str(path), captions[kind]))
    return tuple(made)


def warmth(base: BaseModel, prompt: str, *, with_lora: bool) -> float:
    """How much more red than blue there is in samples, of 255."""
    painted = preview.paint(base, [prompt, prompt], 3, with_lora=with_lora, resolution=64, steps=8)
    values = np.stack([np.asarray(image, dtype=float) for image in painted])
    return float((values[..., 0] - values[..., 2]).mean())


def contrast(base: BaseModel, *, with_lora: bool = True) -> float:
    """How much warmer the one prompt is painted than the other, from the same noise."""
    warm, cold = (warmth(base, prompt, with_lora=with_lora) for prompt in (WARM, COLD))
    return warm - cold


def learn(base: BaseModel, folder: Path, captions: dict[str, str]) -> None:
    """Train a LoRA, which stays on the base."""
    parameters = HyperParameters(
        epochs=24,
        batch_size=8,
        learning_rate=1e-2,
        rank=8,
        dropout=0.0,
        caption_dropout=0.0,
        snr_gamma=0.0,
        resolution=64,
        alpha=16.0,
    )
    shown = images(folder / "pictures", captions)
    run = TrainingRun("task-1", 1, 1, shown, parameters, str(folder / "work"))
    LoRATrainer(run, base, prepare(run, base)).train()


def test_the_colours_of_each_caption_show_with_the_lora_and_not_without(
    painter: BaseModel, tmp_path: Path
) -> None:
    try:
        learn(painter, tmp_path, {WARM: WARM, COLD: COLD})
        assert contrast(painter) > 70
        assert abs(contrast(painter, with_lora=False)) < 40
    finally:
        painter.take_off()


def test_captions_of_the_wrong_images_teach_the_wrong_colours(
    painter: BaseModel, tmp_path: Path
) -> None:
    """So the test above fails where a shuffle pairs images with others' captions."""
    try:
        learn(painter, tmp_path, {WARM: COLD, COLD: WARM})
        assert contrast(painter) < -40
    finally:
        painter.take_off()
