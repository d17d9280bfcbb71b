"""Pictures of how a training went: the same prompts and seeds without and with the LoRA, and the
loss over the epochs."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from training.base_model import BaseModel

log = logging.getLogger(__name__)

SAMPLES = "samples.png"
LOSS_CURVE = "loss_curve.png"
MAX_PROMPTS = 4
COLUMNS = ("Without the LoRA", "With the LoRA")

# Measures of the sheet, in pixels.
MARGIN, LINE, LEAST_CELL, FONT_SIZE = 16, 28, 240, 16


def write_samples(
    base: BaseModel,
    prompts: Sequence[str],
    seed: int,
    folder: Path,
    *,
    resolution: int = 512,
    steps: int = 25,
    guidance: float = 7.5,
) -> Path:
    """Paint a few prompts without and with the attached LoRA, side by side, into `samples.png`.

    Training is not disturbed: no global generator is drawn from, and modes, gradients' flags and
    dtypes are as before.

    Args:
        base: The base model with the LoRA attached; it is left attached and switched on.
        prompts: The first `MAX_PROMPTS` different ones are painted; none stands for the empty
            prompt.
        seed: The n-th prompt is painted from the noise of `seed` + n, in both columns.
        folder: Where the file goes.
        resolution: Side of each picture in pixels, a multiple of 8.
        steps: Steps of the DDIM sampler (arXiv:2010.02502).
        guidance: Classifier-free guidance scale (arXiv:2207.12598).

    Returns:
        The file's path.

    Raises:
        OSError: The disk is full or read-only.
    """
    chosen = list(dict.fromkeys(prompts))[:MAX_PROMPTS] or [""]
    texts = base.encode_prompts(["", *chosen])
    side = resolution // 8
    # Drawn on the CPU, the noise of a seed is the same on every machine.
    noises = [
        torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(seed + n))
        for n in range(len(chosen))
    ]
    columns: list[list[Image.Image]] = []
    for with_lora in (False, True):
        with _sampling(base, with_lora=with_lora):
            columns.append(
                [
                    _paint(base, texts[[0, 1 + n]], noises[n], steps, guidance)
                    for n in range(len(chosen))
                ]
            )
    sheet = _sheet(chosen, list(zip(*columns, strict=True)))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return _save(folder / SAMPLES, buffer)


def write_loss_curve(losses: Sequence[float], folder: Path, *, first_epoch: int = 1) -> Path:
    """Plot the loss of every epoch, and its smoothed course, into `loss_curve.png`.

    Args:
        losses: Mean unweighted loss of each epoch, in order; one that is not finite leaves a gap.
        folder: Where the file goes.
        first_epoch: Number of the first of `losses`.

    Returns:
        The file's path.

    Raises:
        OSError: The disk is full or read-only.
    """
    # The object API keeps no global figure; matplotlib itself is needed nowhere else.
    # pylint: disable-next=import-outside-toplevel
    from matplotlib import figure, ticker

    epochs = range(first_epoch, first_epoch + len(losses))
    sheet = figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = sheet.add_subplot()
    axes.plot(epochs, losses, color="0.7", marker="." if len(losses) <= 50 else "", label="epoch")
    axes.plot(epochs, smoothed(losses), color="tab:blue", linewidth=2, label="smoothed")
    axes.set(xlabel="epoch", ylabel="mean loss (unweighted)", title="Training loss")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    sheet.savefig(buffer, format="png", dpi=120)
    return _save(folder / LOSS_CURVE, buffer)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average over about a tenth of the epochs, at least five; values that are
    not finite are passed over."""
    rate = 2 / (max(5, len(losses) // 10) + 1)
    course: list[float] = []
    mean = math.nan
    for loss in losses:
        if math.isfinite(loss):
            mean = loss if math.isnan(mean) else mean + rate * (loss - mean)
        course.append(mean)
    return course


@contextlib.contextmanager
def _sampling(base: BaseModel, *, with_lora: bool) -> Iterator[None]:
    """Evaluation mode without gradients, with the LoRA on or off; afterwards all is as before, and
    the LoRA on.

    Gradient checkpointing needs no switch: without gradients the UNet does none.
    """
    modes = [(module, module.training) for module in base.unet.modules()]
    trained = [(weight, weight.requires_grad) for weight in base.unet.parameters()]
    base.unet.eval()
    if not with_lora:
        base.unet.disable_adapters()
    try:
        with torch.no_grad():
            yield
    finally:
        base.unet.enable_adapters()
        for weight, requires_grad in trained:  # the adapter's switch flips these
            weight.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


def _paint(
    base: BaseModel, texts: torch.Tensor, noise: torch.Tensor, steps: int, guidance: float
) -> Image.Image:
    """One picture from `texts`, the states of the empty prompt and of the prompt, [2, 77, d]."""
    # Clipping is for pixels; latents reach beyond 1, and DDPM's default would cut them off.
    scheduler = DDIMScheduler.from_config(base.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps, device=base.device)
    latents = noise.to(base.device) * scheduler.init_noise_sigma
    # The frozen weights are in half precision, the LoRA in single.
    half = base.dtype != torch.float32
    mixed = torch.autocast(base.device.type, dtype=base.dtype, enabled=half)
    for timestep in scheduler.timesteps:
        pair = scheduler.scale_model_input(latents.expand(2, -1, -1, -1), timestep)
        with mixed:
            prediction = base.unet(
                pair.to(base.dtype), timestep, encoder_hidden_states=texts, return_dict=False
            )[0]
        plain, guided = prediction.float().chunk(2)
        latents = scheduler.step(plain + guidance * (guided - plain), timestep, latents).prev_sample
    return _decode(base, latents)


def _decode(base: BaseModel, latents: torch.Tensor) -> Image.Image:
    base.restore_encoders()
    pixels = base.vae.decode(latents / base.vae.config.scaling_factor).sample[0]
    if not pixels.isfinite().all():
        log.warning("sample_not_finite")
        pixels = pixels.nan_to_num(nan=-1.0)
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def _sheet(prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """The columns' names on top, then one row a prompt with the prompt below it."""
    size = rows[0][0].width
    cell = max(size, LEAST_CELL) + MARGIN  # tiny pictures still get readable names
    pitch = size + LINE + MARGIN
    width = MARGIN + len(COLUMNS) * cell
    sheet = Image.new("RGB", (width, MARGIN + LINE + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        middle = (MARGIN + cell) // 2 + column * cell
        _label(draw, (middle, MARGIN), name, cell)
        for row, pictures in enumerate(rows):
            sheet.paste(pictures[column], (middle - size // 2, MARGIN + LINE + row * pitch))
    for row, prompt in enumerate(prompts):
        below = MARGIN + LINE + row * pitch + size + 6
        _label(draw, (width // 2, below), prompt or "(empty prompt)", width - 2 * MARGIN)
    return sheet


def _label(draw: ImageDraw.ImageDraw, top: tuple[int, int], text: str, width: int) -> None:
    """As much of a text as fits on one line of `width` pixels, centred below the point `top`."""
    font = ImageFont.load_default(FONT_SIZE)
    line = " ".join(text.split())[:300]
    while font.getlength(line) > width:
        line = line[:-2].rstrip() + "…"
    draw.text(top, line, fill="black", font=font, anchor="ma")


def _save(path: Path, buffer: io.BytesIO) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, path)
    return path
