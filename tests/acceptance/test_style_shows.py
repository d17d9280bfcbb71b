"""A style that can be measured shows with its LoRA, and neither without it nor with another's.

The stand-in paints noise, so it gets a VAE that stores the mean colour of each square of 8 x 8
pixels, and its UNet is trained for a minute on plain coloured squares. Then the product trains
styles on it, and diffusers' own pipeline paints with the published file.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from jobs.kinds import TrainerOptions
from jobs.layout import WEIGHTS
from jobs.style import HyperParameters, TrainingImage, TrainingRun
from training.style.families.sd15 import BaseModel
from training.style.stand_in_model import build_stand_in
from training.style.work import StyleWork

SIDE, SQUARE, COUNT = 64, 8, 8
PRETRAINING = 200
PROMPTS = [f"a picture {number}" for number in range(4)]
# Colour cast of the images, and the strength of vertical stripes of one square's width.
STYLES: dict[str, tuple[tuple[float, float, float], float]] = {
    "red": ((0.5, -0.3, -0.3), 0.0),
    "blue": ((-0.3, -0.3, 0.5), 0.0),
    "stripes": ((0.0, 0.0, 0.0), 0.4),
}
STRIPES = np.where(np.arange(SIDE // SQUARE) % 2, 1.0, -1.0)
Painted = NDArray[np.float32]


# ---- a base that paints coloured squares ---------------------------------------------------------


def linear_vae() -> AutoencoderKL:
    """Encodes the mean colour of squares, decodes flat squares; red, green and blue are latents.

    Every convolution passes its channels on. The norms divide by the spread of two constant
    channels, and an offset keeps the activation where it is the identity.
    """
    constant, offset = 30.0, 20.0
    vae = AutoencoderKL(
        sample_size=SIDE,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=1,
        scaling_factor=1.0,
    ).requires_grad_(False)
    for weight in vae.parameters():
        weight.zero_()
    each = torch.arange(8)
    colours = torch.arange(3)
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        conv.weight[colours, colours, 1, 1] = 1.0
        conv.weight[colours + 3, colours, 1, 1] = -1.0  # so that the mean of all channels is 0
        conv.bias[6:] = torch.tensor([constant, -constant])
    for down in vae.encoder.down_blocks[:-1]:
        down.downsamplers[0].conv.weight[each, each, :2, :2] = 0.25
    for up in vae.decoder.up_blocks[:-1]:
        up.upsamplers[0].conv.weight[each, each, 1, 1] = 1.0
    for half in (vae.encoder, vae.decoder):
        half.conv_norm_out.weight.fill_(constant / 2)
        half.conv_norm_out.bias.fill_(offset)
        half.conv_out.weight[colours, colours, 1, 1] = 1.0
        half.conv_out.bias[:3] = -offset
    vae.encoder.conv_out.bias[4:] = -20.0  # hardly any variance
    for matrix in (vae.quant_conv, vae.post_quant_conv):
        matrix.weight[torch.arange(len(matrix.weight)), torch.arange(len(matrix.weight))] = 1.0
    return vae


def teach_squares(folder: Path) -> None:
    """Train the whole UNet of a stand-in on random coloured squares without a style."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    text = BaseModel.load(_options(folder)).encode_prompts(["", *PROMPTS])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, PRETRAINING)
    for _ in range(PRETRAINING):
        clean = torch.zeros(16, 4, SIDE // SQUARE, SIDE // SQUARE)
        clean[:, :3] = torch.rand(16, 3, 8, 8) + torch.rand(16, 3, 1, 1) - 1.0
        noise, timesteps = torch.randn_like(clean), torch.randint(1000, (16,))
        noisy = schedule.add_noise(clean, noise, timesteps)
        states = text[torch.randint(len(text), (16,))]
        found = unet(noisy, timesteps, encoder_hidden_states=states).sample
        torch.autograd.backward((found - noise).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    unet.save_pretrained(folder / "unet", safe_serialization=True)


def _options(folder: Path) -> TrainerOptions:
    return TrainerOptions(str(folder), allow_cpu=True, gradient_checkpointing="false")


# ---- styles on it --------------------------------------------------------------------------------


def images_of(folder: Path, style: str) -> tuple[TrainingImage, ...]:
    """Images of random coloured squares in a style."""
    cast, stripes = STYLES[style]
    folder.mkdir(parents=True)
    random = np.random.default_rng(3)
    images = []
    for number in range(COUNT):
        squares = random.uniform(-0.5, 0.5, (8, 8, 3)) + np.array(cast)
        squares += stripes * STRIPES[None, :, None]
        pixels = np.clip((squares + 1) * 127.5, 0, 255).astype(np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), dtype=np.uint8))).save(path)
        images.append(TrainingImage(path.name, str(path), f"a picture {number}"))
    return tuple(images)


@pytest.fixture(scope="module", name="place")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, in `base`, and a folder per style with its files."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("styles")
    base = build_stand_in(place / "base")
    shutil.rmtree(base / "vae")
    linear_vae().save_pretrained(base / "vae", safe_serialization=True)
    teach_squares(base)
    work = StyleWork(_options(base))
    for style in STYLES:
        parameters = HyperParameters(
            epochs=100,
            resolution=SIDE,
            rank=8,
            alpha=8.0,
            learning_rate=5e-3,
            dropout=0.0,
            batch_size=4,
        )
        images, folder = images_of(place / style, style), str(place / f"work-{style}")
        run = TrainingRun("task-1", 1, 1, images, parameters, folder, checkpoint_interval=100)
        done = work.run(run, lambda event: None, lambda: None)
        shutil.copytree(done.folder, place / f"model-{style}")
    return place


def painted(place: Path, file: Path | None) -> Painted:
    """Images by diffusers' own pipeline, with a LoRA file or without: [n, height, width, 3]."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        place / "base", safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    if file:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    seeds = [torch.Generator().manual_seed(number) for number in range(len(PROMPTS))]
    images: Painted = pipeline(
        PROMPTS,
        width=SIDE,
        height=SIDE,
        num_inference_steps=20,
        guidance_scale=1.0,
        output_type="np",
        generator=seeds,
    ).images
    return images


def measures(images: Painted) -> dict[str, float]:
    """How red, how blue and how striped images are."""
    red, green, blue = images.mean(axis=(0, 1, 2))
    squares = images.reshape(-1, 8, SQUARE, 8, SQUARE, 3).mean(axis=(2, 4))
    return {
        "red": float(red - (green + blue) / 2),
        "blue": float(blue - (red + green) / 2),
        "stripes": float((squares * STRIPES[None, None, :, None]).mean()),
    }


LEAST = {"red": 0.15, "blue": 0.05, "stripes": 0.02}
"""How far a style moves its own measure at least."""


@pytest.mark.timeout(900)
def test_each_style_shows_with_its_own_lora_and_with_no_other(place: Path) -> None:
    bare = measures(painted(place, None))
    found = {
        style: measures(painted(place, place / f"model-{style}" / WEIGHTS)) for style in STYLES
    }
    for style in STYLES:
        assert found[style][style] > bare[style] + LEAST[style], (style, bare, found)
        for other in STYLES.keys() - {style}:
            assert found[style][style] > found[other][style] + LEAST[style], (style, other, found)


@pytest.mark.timeout(900)
def test_an_untrained_lora_and_one_with_names_that_no_program_knows_show_nothing(
    place: Path, tmp_path: Path
) -> None:
    bare = painted(place, None)
    trained = load_file(place / "model-red" / WEIGHTS)
    untrained = {
        name: torch.zeros_like(tensor) if ".lora_B." in name else tensor
        for name, tensor in trained.items()
    }
    save_file(untrained, tmp_path / "untrained.safetensors")
    assert np.array_equal(painted(place, tmp_path / "untrained.safetensors"), bare)
    misnamed = {name.replace("unet.", "model.", 1): each for name, each in trained.items()}
    save_file(misnamed, tmp_path / "misnamed.safetensors")
    assert np.array_equal(painted(place, tmp_path / "misnamed.safetensors"), bare)
    assert not np.array_equal(painted(place, place / "model-red" / WEIGHTS), bare)
