"""Images of how a training went: samples without and with the LoRA, and the loss.

The samples have the same prompts and seeds; the loss is drawn over the epochs.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jobs.layout import LOSS_CURVE, PREVIEW_SUFFIX, SAMPLES
from reports.charts import smoothed
from training.runtime.device import tf32
from training.style.results.probe import Interrupted, Probed, evaluating, mixed_precision

if TYPE_CHECKING:
    from training.style.families.sd15 import BaseModel

log = logging.getLogger(__name__)

MAX_PROMPTS = 4
GUIDANCE = 7.5
"""Scale of classifier-free guidance (arXiv:2207.12598)."""
COLUMNS = ("Without the LoRA", "With the LoRA")

# Measures of the sheet, in pixels.
MARGIN, LINE, LEAST_CELL, FONT_SIZE = 16, 28, 240, 16
LARGEST_SAMPLE = 256
"""Side in pixels."""
MOST_SAMPLED_EPOCHS = 12
WITHOUT_LORA = "base"


def chosen_prompts(prompts: Sequence[str]) -> list[str]:
    """The first `MAX_PROMPTS` different ones; none stands for the empty prompt."""
    return list(dict.fromkeys(prompts))[:MAX_PROMPTS] or [""]


# pylint: disable-next=too-many-locals  # one for each part of the sampler
def paint(
    base: BaseModel,
    prompts: Sequence[str],
    seed: int,
    *,
    with_lora: bool,
    resolution: int,
    steps: int,
    embeddings: Mapping[str, Tensor] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One image a prompt; the n-th is painted from the noise of `seed` + n.

    Training is not disturbed: no global generator is drawn from, and modes, gradients' flags and
    dtypes are as before.

    Args:
        base: The base model with the LoRA attached; it is left attached and switched on.
        prompts: One image is painted per prompt.
        seed: Of the noise, which is the same on every machine: it is drawn on the CPU.
        with_lora: Whether the LoRA has an effect.
        resolution: Side of each image in pixels, a multiple of 8.
        steps: Steps of the DDIM sampler (arXiv:2010.02502).
        embeddings: [77, d] by prompt; the text encoder is used if one is missing.
        should_stop: Called after each step.

    Raises:
        Interrupted: A stop was asked for.
    """
    texts = _encoded(base, ["", *prompts], embeddings or {})
    pipeline, side = _pipeline(base), resolution // 8

    def check_stop(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> Any:
        if should_stop():
            raise Interrupted
        return tensors

    images = []
    with evaluating(base, with_lora=with_lora):
        for n in range(len(prompts)):
            noise = torch.randn(
                (1, 4, side, side), generator=torch.Generator().manual_seed(seed + n)
            )
            with mixed_precision(base):
                latents = pipeline(
                    prompt_embeds=texts[1 + n : 2 + n],
                    negative_prompt_embeds=texts[:1],
                    latents=noise,
                    num_inference_steps=steps,
                    guidance_scale=GUIDANCE,
                    output_type="latent",
                    callback_on_step_end=check_stop,
                ).images
            images.append(_decode(base, latents))
    return images


def write_samples(
    base: BaseModel,
    prompts: Sequence[str],
    seed: int,
    folder: Path,
    *,
    resolution: int = 512,
    steps: int = 25,
    embeddings: Mapping[str, Tensor] | None = None,
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Paint a few prompts without and with the attached LoRA, side by side, into `samples.png`.

    Training is not disturbed: no global generator is drawn from, and modes, gradients' flags and
    dtypes are as before.

    Args:
        base: The base model with the LoRA attached; it is left attached and switched on.
        prompts: The first `MAX_PROMPTS` different ones are painted; none stands for the empty
            prompt.
        seed: The n-th prompt is painted from the noise of `seed` + n, in both columns.
        folder: Receives the file.
        resolution: Side of each image in pixels, a multiple of 8.
        steps: Steps of the DDIM sampler (arXiv:2010.02502).
        embeddings: [77, d] by prompt; the text encoder is used if one is missing.

    Returns:
        The images without the LoRA and those with it, one a prompt.

    Raises:
        OSError: The disk is full or read-only.
    """
    chosen = chosen_prompts(prompts)
    before, after = (
        paint(
            base,
            chosen,
            seed,
            with_lora=on,
            resolution=resolution,
            steps=steps,
            embeddings=embeddings,
        )
        for on in (False, True)
    )
    sheet = _sheet(chosen, list(zip(before, after, strict=True)))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    _save(folder / SAMPLES, buffer)
    return before, after


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
        folder: Receives the file.
        probes: Drawn below the losses, on their own scale.
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


def _encoded(base: BaseModel, prompts: Sequence[str], embeddings: Mapping[str, Tensor]) -> Tensor:
    """[n, 77, d]; from the embeddings if all are there."""
    if all(prompt in embeddings for prompt in prompts):
        return torch.stack([embeddings[prompt] for prompt in prompts])
    return base.encode_prompts(prompts)


def _pipeline(base: BaseModel) -> Any:
    """The diffusers pipeline on the loaded UNet.

    Prompts are encoded and latents decoded by the base itself, because its encoders wait on the CPU
    during training and the VAE computes in single precision.
    """
    # Imported late: it imports image processors, which log and take time.
    # pylint: disable-next=import-outside-toplevel
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=base.unet,
        # Clipping is for pixels. Latents reach beyond 1, and DDPM's default would cut them off.
        scheduler=DDIMScheduler.from_config(base.scheduler.config, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _decode(base: BaseModel, latents: torch.Tensor) -> Image.Image:
    base.vae.to(base.device)
    with tf32(base.device, enabled=base.fast):
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


def pack(image: Image.Image) -> Tensor:
    """An image as the bytes of a small JPEG file."""
    return torch.frombuffer(bytearray(jpeg(image, LARGEST_SAMPLE)), dtype=torch.uint8)


def jpeg(image: Image.Image, side: int) -> bytes:
    """An image as a JPEG file of at most this side in pixels."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def write_small(images: Sequence[Image.Image], folder: Path) -> None:
    """Write small copies of a row of samples, which are uploaded while the run continues.

    Args:
        images: One a prompt.
        folder: Of one step; it receives `0.webp`, `1.webp`, and so on.

    Raises:
        OSError: The disk is full or read-only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        small = image.copy()
        small.thumbnail((LARGEST_SAMPLE, LARGEST_SAMPLE))
        buffer = io.BytesIO()
        small.save(buffer, format="WEBP", quality=80)
        _save(folder / f"{number}{PREVIEW_SUFFIX}", buffer)


def unpack(packed: Tensor) -> bytes:
    """The JPEG file."""
    return packed.numpy().tobytes()


def with_row(
    samples: Mapping[str, Tensor], row: str, images: Sequence[Image.Image]
) -> dict[str, Tensor]:
    """The samples with a further row, less every second epoch where they have become too many.

    Args:
        samples: Those that are there.
        row: An epoch, or `WITHOUT_LORA`.
        images: One a prompt.
    """
    more = dict(samples) | {f"{row}/{n}": pack(image) for n, image in enumerate(images)}
    shown = sampled_epochs(more)
    if len(shown) <= MOST_SAMPLED_EPOCHS:
        return more
    dropped = {str(epoch) for epoch in shown[-2::-2]}
    return {key: value for key, value in more.items() if key.partition("/")[0] not in dropped}


def sampled_epochs(samples: Mapping[str, Tensor]) -> list[int]:
    """The epochs of which there are samples, in order."""
    rows = {key.partition("/")[0] for key in samples}
    return sorted(int(row) for row in rows if row.isdigit())


def row_of(samples: Mapping[str, Tensor], row: str) -> list[bytes]:
    """A row's JPEG files, one a prompt."""
    names = [f"{row}/{n}" for n in range(len(samples))]
    return [unpack(samples[name]) for name in names if name in samples]
