"""`training_report.html`: the report for the artist, in one file with its images inside."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from jobs.layout import HTML_REPORT
from reports import verdict
from reports.charts import Line, line_chart, smoothed
from reports.likeness import copies
from utils.names import shown_name

TEMPLATE = "training_report.html.j2"
IN_THE_STRIP = 8
"""Images of the artist that stand above the samples."""


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


@dataclasses.dataclass(frozen=True, slots=True)
class ReportImages:
    """The images of a report, as JPEG files.

    Attributes:
        training: A thumbnail for each of the report's `pictures`; None where there is none.
        held_out: The same for its `validation_pictures`.
        prompts: The prompts of the samples.
        before: The base model's samples, one a prompt; empty if none could be made.
        after: The samples of the delivered model; as many.
        checkpoints: The samples of each checkpoint, the base model's first.
    """

    training: Sequence[bytes | None] = ()
    held_out: Sequence[bytes | None] = ()
    prompts: Sequence[str] = ()
    before: Sequence[bytes] = ()
    after: Sequence[bytes] = ()
    checkpoints: Sequence[SampleRow] = ()


def write_html(report: Mapping[str, Any], images: ReportImages, folder: Path) -> Path:
    """Write `training_report.html`.

    Args:
        report: The content of `training_report.json`.
        images: The images.
        folder: The file goes there.

    Returns:
        The file's path.

    Raises:
        OSError: The disk is full or read-only.
        ValueError: The template does not fit the report.
    """
    path = folder / HTML_REPORT
    partial = path.with_name(f".{path.name}.partial")
    # Halves of characters, which JSON can spell, are none.
    partial.write_text(rendered(report, images), encoding="utf-8", errors="replace")
    os.replace(partial, path)
    return path


def rendered(report: Mapping[str, Any], images: ReportImages) -> str:
    """The page as text.

    Args:
        report: The content of `training_report.json`.
        images: The images.

    Raises:
        ValueError: The template does not fit the report.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"duration": _duration, "loss": _loss}
    try:
        return environment.get_template(TEMPLATE).render(_content(report, images))
    except (jinja2.TemplateError, LookupError) as error:
        raise ValueError(f"The report cannot be rendered: {error}") from error


def _content(report: Mapping[str, Any], images: ReportImages) -> dict[str, Any]:
    """Everything that the template shows."""
    trained = [
        (shown_name(entry["source"]), content)
        for entry, content in zip(report["pictures"], images.training, strict=True)
        if content and _is_trained_on(entry)
    ]
    style = report["style_id"]
    cards = _cards(report["pictures"], images.training)
    shown = [each for each in cards if each["thumbnail"] and _is_trained_on(each)]
    return {
        "machine_warnings": (),
        "files": {},
        "pictures_held_out": 0,
        **report,
        "title": f"Style {style}" if style else "Training report",
        "finished": _day(report.get("finished_at")),
        "verdict": verdict.of_style(report, copies(images.before, images.after, trained)),
        "strip": shown[:IN_THE_STRIP],
        "pairs": _pairs(images),
        "prompt": _prompt(report, images.prompts),
        "pictures": cards,
        "validation_pictures": _cards(report["validation_pictures"], images.held_out),
        "choice": _choice(report),
        "charts": _charts(report),
        "rows": _rows(images),
    }


def _is_trained_on(entry: Mapping[str, Any]) -> bool:
    return entry["status"] != "left_out" and verdict.HELD_OUT not in entry["reasons"]


def _cards(
    entries: Sequence[Mapping[str, Any]], thumbnails: Sequence[bytes | None]
) -> list[dict[str, Any]]:
    """The entry of each image, with its name and its thumbnail."""
    return [
        {**entry, "name": shown_name(entry["source"]), "thumbnail": _data_uri(thumbnail)}
        for entry, thumbnail in zip(entries, thumbnails, strict=True)
    ]


def _pairs(images: ReportImages) -> list[dict[str, Any]]:
    """Each prompt with its sample without and with the LoRA."""
    return [
        {"prompt": prompt, "before": _data_uri(before), "after": _data_uri(after)}
        for prompt, before, after in zip(images.prompts, images.before, images.after, strict=False)
    ]


def _rows(images: ReportImages) -> list[dict[str, Any]]:
    """The rows of samples that have an image."""
    rows = [
        {
            "title": row.title,
            "chosen": row.chosen,
            "samples": [
                {"address": _data_uri(content), "prompt": prompt}
                for content, prompt in zip(row.images, images.prompts, strict=False)
            ],
        }
        for row in images.checkpoints
    ]
    return [row for row in rows if row["samples"]]


def _prompt(report: Mapping[str, Any], prompts: Sequence[str]) -> str:
    """A prompt to copy: the first sample's, with the trigger word in it."""
    prompt = next(filter(None, prompts), "")
    trigger: str = report["trigger_word"] or ""
    if trigger.lower() in prompt.lower():
        return prompt
    return f"{trigger}, {prompt}" if prompt else trigger


def _charts(report: Mapping[str, Any]) -> list[Markup]:
    """The loss of each epoch, and the measurements of the probe."""
    losses: Sequence[float | None] = report["losses"]
    calm = smoothed([float("nan") if loss is None else loss for loss in losses])
    probes = report["probes"]
    charts = (
        line_chart(
            [
                Line("each epoch", list(enumerate(losses, 1)), "raw"),
                Line("smoothed", list(enumerate(calm, 1))),
            ],
            title=_curve_text(losses),
            x_name="epoch",
            y_name="Training loss (random noise in each step)",
            mark=report["delivered_epoch"],
        ),
        line_chart(
            [
                Line(name, [(each["epoch"], each[key]) for each in probes], colour)
                for name, key, colour in (
                    ("your images", "training", "main"),
                    ("held-out images", "held_out", "other"),
                )
                if any(each[key] is not None for each in probes)
            ],
            title="Loss of the probe at each checkpoint; the table below has the numbers",
            x_name="epoch",
            y_name="Probe (the same images and noise each time)",
            mark=report["delivered_epoch"],
        ),
    )
    return [chart for chart in charts if chart is not None]


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


def _curve_text(losses: Sequence[float | None]) -> str:
    """The loss curve for those who do not see it."""
    known = [loss for loss in losses if loss is not None]
    if not known:
        return "Loss curve"
    return f"Loss curve: from {known[0]:.4f} in the first epoch to {known[-1]:.4f} in the last"


def _day(moment: str | None) -> str:
    """The day of a time in ISO 8601, such as `26 November 2026`; empty for None."""
    if moment is None:
        return ""
    day = datetime.datetime.fromisoformat(moment)
    return f"{day.day} {day:%B %Y}"


def _data_uri(content: bytes | None) -> str | None:
    if content is None:
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
