"""`training_report.html`: the report for the artist, in one file with its pictures inside."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image, ImageOps

from training import grids
from training.preview import LOSS_CURVE, SAMPLES
from training.vetting import FORMATS

if TYPE_CHECKING:
    from training.lora_config import Picture, TrainingRun
    from training.result import TrainingResult

HTML_REPORT = "training_report.html"
TEMPLATE = "training_report.html.j2"
THUMBNAIL = 320
SHEET = 1100
"""Sides in pixels."""


def write_html(
    report: Mapping[str, Any],
    run: TrainingRun,
    result: TrainingResult,
    prompts: Sequence[str],
    folder: Path,
) -> Path:
    """Write `training_report.html`.

    Args:
        report: From `report.build_report`.
        run: Where the pictures lie, for thumbnails.
        result: With the samples of checkpoints.
        prompts: Of the samples.
        folder: Where `samples.png` and `loss_curve.png` lie, as far as they could be made; the file
            goes there, too.

    Returns:
        The file's path.

    Raises:
        OSError: The disk is full or read-only.
    """
    limit = run.max_image_pixels
    content = {
        **report,
        "pictures": _shown(report["pictures"], run.pictures, limit),
        "validation_pictures": _shown(
            report["validation_pictures"], run.validation_pictures, limit
        ),
        "loss_curve": _data_uri(_read(folder / LOSS_CURVE), "png"),
        "curve_text": _curve_text(report),
        "samples": _thumbnail(folder / SAMPLES, SHEET, limit),
        "prompts": prompts,
        "rows": _rows(result, prompts),
        "choice": _choice(report),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"duration": _duration, "loss": _loss}
    text = environment.get_template(TEMPLATE).render(content)
    path = folder / HTML_REPORT
    partial = path.with_name(f".{path.name}.partial")
    # Halves of characters, which JSON can spell, are none.
    partial.write_text(text, encoding="utf-8", errors="replace")
    os.replace(partial, path)
    return path


def _shown(
    entries: Sequence[Mapping[str, Any]], pictures: Sequence[Picture], limit: int
) -> list[dict[str, Any]]:
    """What is said of each picture, with its name and its thumbnail."""
    return [
        {
            **entry,
            "name": entry["source"].partition("?")[0].rstrip("/").rpartition("/")[2],
            "thumbnail": _thumbnail(Path(picture.path), THUMBNAIL, limit) if picture.path else None,
        }
        for entry, picture in zip(entries, pictures, strict=True)
    ]


def _rows(result: TrainingResult, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The samples of checkpoints, the base model's first."""
    titles = {grids.WITHOUT_LORA: "Without the LoRA"} | {
        str(epoch): f"After epoch {epoch}" for epoch in grids.epochs(result.samples)
    }
    rows = [
        {
            "title": title,
            "chosen": row == str(result.delivered_epoch),
            "pictures": [
                {"address": _data_uri(content, "jpeg"), "prompt": prompt}
                for content, prompt in zip(grids.row_of(result.samples, row), prompts, strict=False)
            ],
        }
        for row, title in titles.items()
    ]
    return [row for row in rows if row["pictures"]]


def _choice(report: Mapping[str, Any]) -> str:
    """Which checkpoint became the model, and why."""
    best, delivered = report["best_epoch"], report["delivered_epoch"]
    if best is None:
        return "The model is the state at the end of training; the probe could not compare it."
    others = any(each["held_out"] is not None for each in report["probes"])
    pictures = "held-out pictures" if others else "training pictures"
    if report["hyperparameters"]["deliver"] == "best":
        return f"Epoch {delivered} is the model: its loss on the {pictures} was the lowest."
    if best == delivered:
        return f"The last epoch, {delivered}, is the model, and was the best on the {pictures}."
    return (
        f"The last epoch, {delivered}, is the model. Epoch {best} was better on the {pictures}; "
        "train with `deliver: best` to get that one."
    )


def _curve_text(report: Mapping[str, Any]) -> str:
    """The loss curve for those who do not see it."""
    known = [loss for loss in report["losses"] if loss is not None]
    if not known:
        return "Loss curve"
    return f"Loss curve: from {known[0]:.4f} in the first epoch to {known[-1]:.4f} in the last"


def _thumbnail(path: Path, side: int, limit: int) -> str | None:
    """A small copy of a picture without any of its metadata; None where there is nothing to see."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            with Image.open(path, formats=FORMATS) as picture:
                if picture.width * picture.height > limit:
                    return None
                picture.draft("RGB", (side, side))
                upright = ImageOps.exif_transpose(picture).convert("RGBA")
        upright.thumbnail((side, side))
        small = Image.new("RGB", upright.size, "white")
        small.paste(upright, mask=upright.getchannel("A"))
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=80)
    except Exception:  # pylint: disable=broad-exception-caught  # decoders raise nearly anything
        return None
    return _data_uri(buffer.getvalue(), "jpeg")


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _data_uri(content: bytes | None, kind: str) -> str | None:
    if content is None:
        return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
