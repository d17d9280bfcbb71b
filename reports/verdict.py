"""The verdict of a report: a few sentences from its numbers, the most important one first."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from reports.likeness import Copy
from utils.wording import counted

HELD_OUT = "is held out: it is not trained on, and the choice of the checkpoint depends on it"
"""The reason in the report for an image that was sent for training and is held out."""
LEAST_FALL = 0.01
"""Part of the base model's own loss. A smaller fall is called slight."""
RISE = 0.005
"""Part of the lowest held-out loss. A probe that rises by less stands still."""
MOST_REASONS = 3


class Level(enum.StrEnum):
    """How good a piece of news is."""

    GOOD = "good"
    NOTE = "note"
    WARNING = "warning"
    BAD = "bad"


_SERIOUSNESS = tuple(Level)
_HEADLINES = {
    Level.GOOD: "The model has learnt your style.",
    Level.NOTE: "The model is ready.",
    Level.WARNING: "The model is ready. Read the notes before you use it.",
    Level.BAD: "The model may not do what you expect. Read the notes before you use it.",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One sentence of the verdict.

    Attributes:
        level: How good the news is.
        text: The sentence, for the artist.
        numbers: The measurements behind it; empty if there are none.
    """

    level: Level
    text: str
    numbers: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingVerdict:
    """The first screen of a report.

    Attributes:
        points: The sentences.
        notes: Warnings of the run in its own words.
    """

    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()

    @property
    def level(self) -> Level:
        """The worst news of all."""
        worst = max((_SERIOUSNESS.index(point.level) for point in self.points), default=0)
        return _SERIOUSNESS[max(worst, _SERIOUSNESS.index(Level.WARNING) if self.notes else 0)]

    @property
    def headline(self) -> str:
        """The whole in one sentence."""
        return _HEADLINES[self.level]


def of_style(report: Mapping[str, Any], copies: Sequence[Copy | None]) -> TrainingVerdict:
    """The verdict on the training of a style.

    Args:
        report: The content of `training_report.json`.
        copies: For each sample with the LoRA, the image that it copies, or None; see
            `reports.likeness.copies`.
    """
    points = [_learnt(report), _copied(report), *_copied_samples(copies), *_images(report)]
    machine = set(report.get("machine_warnings", ()))
    notes = tuple(each for each in report["warnings"] if each not in machine)
    return TrainingVerdict(tuple(point for point in points if point), notes)


def _learnt(report: Mapping[str, Any]) -> Point:
    """Whether the loss of the probe fell, on held-out images where there are any."""
    before = next((each for each in report["probes"] if each["epoch"] == 0), None)
    after = _delivered(report)
    for name, images in (("held_out", "images that were held out"), ("training", "your images")):
        if before and after and before[name] and after[name] is not None:
            fall = (before[name] - after[name]) / before[name]
            numbers = f"Loss on {images}: {before[name]:.4f} before, {after[name]:.4f} after."
            if fall <= 0:
                text = f"The model predicts {images} no better than the base model does."
                return Point(Level.BAD, text, numbers)
            if fall < LEAST_FALL:
                text = f"The model has learnt little: its error on {images} fell by {fall:.1%}."
                return Point(Level.WARNING, text, numbers)
            text = f"It has learnt: its error on {images} fell by {fall:.0%}."
            return Point(Level.GOOD, text, numbers)
    text = "There is no measurement of whether the style was learnt. Judge by the samples."
    return Point(Level.NOTE, text)


def _copied(report: Mapping[str, Any]) -> Point:
    """Whether the held-out loss rose again before the delivered epoch."""
    held_out = {
        each["epoch"]: each["held_out"]
        for each in report["probes"]
        if each["epoch"] and each["held_out"] is not None
    }
    after = _delivered(report)
    if not held_out or after is None or after["held_out"] is None:
        text = "No images were held out, so nothing measures whether the model copies your images."
        return Point(Level.NOTE, text)
    best = min(held_out, key=lambda epoch: held_out[epoch])
    numbers = (
        f"Held-out loss: {held_out[best]:.4f} in epoch {best}, {after['held_out']:.4f} in epoch "
        f"{after['epoch']}, which was delivered."
    )
    if after["held_out"] > held_out[best] * (1 + RISE):
        text = f"It began to copy your images after epoch {best}. Train for about {best} epochs."
        return Point(Level.WARNING, text, numbers)
    return Point(Level.GOOD, "It has not begun to copy your images.", numbers)


def _copied_samples(copies: Sequence[Copy | None]) -> list[Point]:
    found = [copy for copy in copies if copy]
    if not found:
        return []
    names = ", ".join(dict.fromkeys(copy.name for copy in found))
    numbers = "; ".join(
        f"likeness to {copy.name}: {copy.likeness:.2f} with the LoRA, {copy.before:.2f} without"
        for copy in found
    )
    text = (
        f"{len(found)} of {counted(len(copies), 'sample')} repeats one of your images almost "
        f"unchanged: {names}. Train for fewer epochs, or with more images."
    )
    return [Point(Level.BAD, text, numbers)]


def _images(report: Mapping[str, Any]) -> list[Point]:
    used, asked = report["pictures_used"], report["pictures_asked"]
    if used == asked:
        return [Point(Level.GOOD, f"All {counted(asked, 'image')} were used.")]
    reasons = Counter(
        reason
        for entry in report["pictures"]
        if entry["status"] == "left_out"
        for reason in entry["reasons"][:1]
    )
    named = "; ".join(f"{reason} ({n})" for reason, n in reasons.most_common(MOST_REASONS))
    text = f"{asked - used} of {counted(asked, 'image')} were left out. Replace or remove them."
    return [Point(Level.WARNING, text, named)]


def _delivered(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The measurement of the epoch that became the model."""
    epoch = report["delivered_epoch"]
    return next((each for each in report["probes"] if each["epoch"] == epoch), None)
