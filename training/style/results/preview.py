"""Images of how a training went: the same prompts and seeds without and with the LoRA, and the
loss over the epochs."""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw, ImageFont

from training.style.results.evaluation import evaluating, mixed_precision
from training.style.results.probe import Interrupted, Probed

if TYPE_CHECKING:
    from training.style.families.sd15 import BaseModel

log = logging.getLogger(__name__)

SAMPLES = "samples.png"
LOSS_CURVE = "loss_curve.png"
MAX_PROMPTS = 4
GUIDANCE = 7.5
"""Scale of classifier-free guidance (arXiv:2207.12598)."""
COLUMNS = ("Without the LoRA", "With the LoRA")

# Measures of the sheet, in pixels.
MARGIN, LINE, LEAST_CELL, FONT_SIZE = 16, 28, 240, 16


def chosen_prompts(prompts: Sequence[str]) -> list[str]:
    """The first `MAX_PROMPTS` different ones; none stands for the empty prompt."""
    return list(dict.fromkeys(prompts))[:MAX_PROMPTS] or [""]


def paint(
    base: BaseModel,
    prompts: Sequence[str],
    seed: int,
    *,
    with_lora: bool,
    resolution: int,
    steps: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One image a prompt; the n-th is painted from the noise of `seed` + n.

    Training is not disturbed: no global generator is drawn from, and modes, gradients' flags and
    dtypes are as before.

    Args:
        base: The base model with the LoRA attached; it is left attached and switched on.
        prompts: What to paint.
        seed: Of the noise, which is the same on every machine: it is drawn on the CPU.
        with_lora: Whether the LoRA has an effect.
        resolution: Side of each image in pixels, a multiple of 8.
        steps: Steps of the DDIM sampler (arXiv:2010.02502).
        should_stop: Asked before each step.

    Raises:
        Interrupted: A stop was asked for.
    """
    texts = base.encode_prompts(["", *prompts])
    side = resolution // 8
    images = []
    with evaluating(base, with_lora=with_lora):
        for n in range(len(prompts)):
            noise = torch.randn(
                (1, 4, side, side), generator=torch.Generator().manual_seed(seed + n)
            )
            images.append(_paint(base, texts[[0, 1 + n]], noise, steps, should_stop))
    return images


def write_samples(
    base: BaseModel,
    prompts: Sequence[str],
    seed: int,
    folder: Path,
    *,
    resolution: int = 512,
    steps: int = 25,
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
        resolution: Side of each image in pixels, a multiple of 8.
        steps: Steps of the DDIM sampler (arXiv:2010.02502).

    Returns:
        The file's path.

    Raises:
        OSError: The disk is full or read-only.
    """
    chosen = chosen_prompts(prompts)
    columns = [
        paint(base, chosen, seed, with_lora=on, resolution=resolution, steps=steps)
        for on in (False, True)
    ]
    sheet = _sheet(chosen, list(zip(*columns, strict=True)))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return _save(folder / SAMPLES, buffer)


def write_loss_curve(
    losses: Sequence[float],
    folder: Path,
    *,
    probes: Sequence[Probed] = (),
    delivered: int | None = None,
) -> Path:
    """Plot the loss of every epoch, and what the probe found, into `loss_curve.png`.

    Args:
        losses: Mean unweighted loss of each epoch, in order; one that is not finite leaves a gap.
        folder: Where the file goes.
        probes: Drawn below the losses, on a scale of their own.
        delivered: The epoch that became the model.

    Returns:
        The file's path.

    Raises:
        OSError: The disk is full or read-only.
    """
    # The object API keeps no global figure; matplotlib itself is needed nowhere else.
    # pylint: disable-next=import-outside-toplevel
    from matplotlib import figure, ticker

    epochs = range(1, 1 + len(losses))
    sheet = figure.Figure(figsize=(8, 7 if probes else 4.5), layout="constrained")
    axes, *below = sheet.subplots(2 if probes else 1, sharex=True, squeeze=False)[:, 0]
    axes.plot(epochs, losses, color="0.7", marker="." if len(losses) <= 50 else "", label="epoch")
    axes.plot(epochs, smoothed(losses), color="tab:blue", linewidth=2, label="smoothed")
    axes.set(ylabel="mean loss (unweighted)", title="Training loss (random noise each step)")
    for second in below:
        _plot_probes(second, probes)
    last = (axes, *below)[-1]
    last.set(xlabel="epoch")
    last.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    for each in (axes, *below):
        if delivered is not None:
            each.axvline(delivered, color="tab:green", linestyle=":", label="delivered")
        each.grid(alpha=0.3)
        each.legend()
    buffer = io.BytesIO()
    sheet.savefig(buffer, format="png", dpi=120)
    return _save(folder / LOSS_CURVE, buffer)


def _plot_probes(axes: Any, probes: Sequence[Probed]) -> None:
    epochs = [each.epoch for each in probes]
    for label, color, values in (
        ("training images", "tab:blue", [each.training for each in probes]),
        ("held-out images", "tab:orange", [each.held_out for each in probes]),
    ):
        if any(value is not None for value in values):
            gaps = [math.nan if value is None else value for value in values]
            axes.plot(epochs, gaps, color=color, marker="o", label=label)
    axes.set(ylabel="probe", title="Probe: the same images and noise each time")


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


def _paint(
    base: BaseModel,
    texts: torch.Tensor,
    noise: torch.Tensor,
    steps: int,
    should_stop: Callable[[], bool],
) -> Image.Image:
    """One image from `texts`, the states of the empty prompt and of the prompt, [2, 77, d]."""
    # Clipping is for pixels; latents reach beyond 1, and DDPM's default would cut them off.
    scheduler = DDIMScheduler.from_config(base.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps, device=base.device)
    latents = noise.to(base.device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        if should_stop():
            raise Interrupted
        pair = scheduler.scale_model_input(latents.expand(2, -1, -1, -1), timestep)
        with mixed_precision(base):
            prediction = base.unet(
                pair.to(base.dtype), timestep, encoder_hidden_states=texts, return_dict=False
            )[0]
        plain, guided = prediction.float().chunk(2)
        latents = scheduler.step(plain + GUIDANCE * (guided - plain), timestep, latents).prev_sample
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
    cell = max(size, LEAST_CELL) + MARGIN  # tiny images still get readable names
    pitch = size + LINE + MARGIN
    width = MARGIN + len(COLUMNS) * cell
    sheet = Image.new("RGB", (width, MARGIN + LINE + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        middle = (MARGIN + cell) // 2 + column * cell
        _label(draw, (middle, MARGIN), name, cell)
        for row, images in enumerate(rows):
            sheet.paste(images[column], (middle - size // 2, MARGIN + LINE + row * pitch))
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
