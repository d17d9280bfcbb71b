"""`training_report.html`: the report for the artist, in one file with its images inside."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image

from jobs.layout import HTML_REPORT, LOSS_CURVE, SAMPLES
from utils.names import shown_name

if TYPE_CHECKING:
    from jobs.style import TrainingImage, TrainingRun

TEMPLATE = "training_report.html.j2"
SHEET = 1100
"""Side in pixels."""


@dataclasses.dataclass(frozen=True, slots=True)
class SampleRow:
    """Samples of one checkpoint, or of the base model.

    Attributes:
        title: Heading of the row.
        chosen: Whether the model is of this checkpoint.
        images: JPEG files, in the order of the prompts.
    """

    title: str
    chosen: bool
    images: tuple[bytes, ...]


def write_html(
    report: Mapping[str, Any],
    run: TrainingRun,
    samples: Sequence[SampleRow],
    prompts: Sequence[str],
    folder: Path,
    *,
    thumbnails: Mapping[str, bytes],
) -> Path:
    """Write `training_report.html`.

    Args:
        report: From `report.build_report`.
        run: Its images.
        samples: The samples of checkpoints, the base model's first.
        prompts: Of the samples.
        folder: Folder of `samples.png` and `loss_curve.png`, if they could be made. The file
            goes there, too.
        thumbnails: JPEG files of the images, by the path of their files.

    Returns:
        The file's path.

    Raises:
        OSError: The disk is full or read-only.
        ValueError: The template does not fit the report.
    """
    content = {
        **report,
        "pictures": _shown(report["pictures"], run.images, thumbnails),
        "validation_pictures": _shown(
            report["validation_pictures"], run.validation_images, thumbnails
        ),
        "loss_curve": _data_uri(_read(folder / LOSS_CURVE), "png"),
        "curve_text": _curve_text(report),
        "samples": _small_sheet(folder / SAMPLES),
        "prompts": prompts,
        "rows": _rows(samples, prompts),
        "choice": _choice(report),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"duration": _duration, "loss": _loss}
    try:
        text = environment.get_template(TEMPLATE).render(content)
    except jinja2.TemplateError as error:
        raise ValueError(f"The report cannot be rendered: {error}") from error
    path = folder / HTML_REPORT
    partial = path.with_name(f".{path.name}.partial")
    # Halves of characters, which JSON can spell, are none.
    partial.write_text(text, encoding="utf-8", errors="replace")
    os.replace(partial, path)
    return path


def _shown(
    entries: Sequence[Mapping[str, Any]],
    images: Sequence[TrainingImage],
    thumbnails: Mapping[str, bytes],
) -> list[dict[str, Any]]:
    """The entry of each image, with its name and its thumbnail."""
    return [
        {
            **entry,
            "name": shown_name(entry["source"]),
            "thumbnail": _data_uri(thumbnails.get(image.path or ""), "jpeg"),
        }
        for entry, image in zip(entries, images, strict=True)
    ]


def _rows(samples: Sequence[SampleRow], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of samples that have an image."""
    rows = [
        {
            "title": row.title,
            "chosen": row.chosen,
            "pictures": [
                {"address": _data_uri(content, "jpeg"), "prompt": prompt}
                for content, prompt in zip(row.images, prompts, strict=False)
            ],
        }
        for row in samples
    ]
    return [row for row in rows if row["pictures"]]


def _choice(report: Mapping[str, Any]) -> str:
    """Which checkpoint became the model, and why."""
    best, delivered = report["best_epoch"], report["delivered_epoch"]
    if best is None:
        return "The model is the state at the end of training; the probe could not compare it."
    others = any(each["held_out"] is not None for each in report["probes"])
    images = "held-out images" if others else "training images"
    if report["hyperparameters"]["deliver"] == "best":
        return f"Epoch {delivered} is the model: its loss on the {images} was the lowest."
    if best == delivered:
        return f"The last epoch, {delivered}, is the model, and was the best on the {images}."
    advice = (
        "train with `deliver: best` to get that one"
        if others
        else "train with `deliver: best` to choose by held-out images"
    )
    return (
        f"The last epoch, {delivered}, is the model. Epoch {best} was better on the {images}; "
        f"{advice}."
    )


def _curve_text(report: Mapping[str, Any]) -> str:
    """The loss curve for those who do not see it."""
    known = [loss for loss in report["losses"] if loss is not None]
    if not known:
        return "Loss curve"
    return f"Loss curve: from {known[0]:.4f} in the first epoch to {known[-1]:.4f} in the last"


def _small_sheet(path: Path) -> str | None:
    """A small copy of the sheet of samples; None where there is none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            small = image.convert("RGB")
    except OSError:  # the samples could not be painted, which the report states
        return None
    small.thumbnail((SHEET, SHEET))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
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
