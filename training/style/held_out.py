"""Held-out images: never trained on, they show whether a style was learnt or images were copied."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Sequence

from images.checks import Looks
from jobs.style import TrainingRun
from reports.verdict import HELD_OUT
from training.style.examples import Dataset, Example, ImageReport
from utils.errors import LowQualityData
from utils.names import shown_name
from utils.wording import counted

TRAINED_ON = "is one of the training images, too, so it cannot show what was learnt beyond them"
ENOUGH_IMAGES = 10
"""With so many usable images a tenth of them can be held out."""


def apart(others: Dataset, data: Dataset) -> Dataset:
    """`others` without the images that are also trained on, in any format, size or quality.

    Args:
        others: The validation images.
        data: The training images.
    """
    trained = {example.identity: shown_name(example.source) for example in data.usable}
    reasons = {
        example.identity: reason
        for example in others.usable
        if (reason := _overlap(example, others.looks, trained, data.looks))
    }
    entries = _with_reasons(others, reasons, "left_out")
    usable = tuple(example for example in others.usable if example.identity not in reasons)
    return dataclasses.replace(others, entries=entries, usable=usable, warnings=())


def for_the_choice(data: Dataset, run: TrainingRun, trained: Collection[str] | None) -> Dataset:
    """Hold out a tenth of the images if the best checkpoint is wanted and nothing is held out yet.

    The loss on training images falls until they are copied, so it would choose the last checkpoint.

    Args:
        data: The prepared images, and the validation images.
        run: The run.
        trained: Identities of the images that the job has trained on so far; None if it begins.

    Raises:
        LowQualityData: There are too few images to hold any out.
    """
    if run.parameters.deliver != "best" or (data.held_out and data.held_out.usable):
        return data
    if trained is not None and set(trained) == set(data.identities):
        return data  # a job that an earlier release began trains on all of them
    return _set_aside(data, _a_tenth(data, run))


def _overlap(
    example: Example, own: dict[str, Looks], trained: dict[str, str], looks: dict[str, Looks]
) -> str | None:
    """The reason for which an image cannot be held out; None if there is none."""
    if example.identity in trained:
        return TRAINED_ON
    for identity, name in trained.items():
        if own[example.identity].pixels == looks[identity].pixels:
            return TRAINED_ON
        if own[example.identity].shows_the_same(looks[identity]):
            return f"looks like another version of {name}, which is trained on"
    return None


def _with_reasons(
    data: Dataset, reasons: dict[str, str], status: str | None = None
) -> tuple[ImageReport, ...]:
    """The entries of a set.

    Args:
        data: The set.
        reasons: A further reason for images, by identity.
        status: The status of those images, with that reason only; None keeps status and reasons.
    """
    examples = iter(data.usable)  # in the order of the entries
    entries = []
    for entry in data.entries:
        reason = None if entry.status == "left_out" else reasons.get(next(examples).identity)
        if reason and status:
            entry = dataclasses.replace(entry, status=status, reasons=(reason,))
        elif reason:
            entry = dataclasses.replace(entry, reasons=(*entry.reasons, reason))
        entries.append(entry)
    return tuple(entries)


def _a_tenth(data: Dataset, run: TrainingRun) -> list[Example]:
    """The same images in each run of a job, regardless of their order.

    Raises:
        LowQualityData: There are too few.
    """
    count = len(data.usable) // ENOUGH_IMAGES
    candidates = [example for example in data.usable if not _has_a_twin(example, data)]
    if not count or not candidates or len(data.usable) - count < run.min_images:
        raise LowQualityData(
            "deliver is best, which needs images that are not trained on, and no validation image "
            f"can be used. {counted(len(data.usable), 'image')} can be used, "
            f"{len(candidates)} of which differ clearly from all others; with {ENOUGH_IMAGES} or "
            "more a tenth is held out. Send validation_images, add images, or set deliver to last."
        )
    seed = run.parameters.seed
    return sorted(candidates, key=lambda one: _lot(seed, one.identity))[:count]


def _lot(seed: int, identity: str) -> str:
    return hashlib.sha256(f"{seed}/held out/{identity}".encode()).hexdigest()


def _has_a_twin(example: Example, data: Dataset) -> bool:
    """Whether another training image shows the same: held out, it would be no new image."""
    looks = data.looks[example.identity]
    return any(
        looks.shows_the_same(data.looks[other.identity])
        for other in data.usable
        if other.identity != example.identity
    )


def _set_aside(data: Dataset, chosen: Sequence[Example]) -> Dataset:
    """The set with images moved to its held-out images."""
    identities = {example.identity for example in chosen}
    before = data.held_out
    held_out = dataclasses.replace(
        data,
        entries=before.entries if before else (),
        usable=tuple(chosen),
        warnings=(),
        thumbnails=before.thumbnails if before else {},
        held_out=None,
    )
    sentence = (
        f"{len(chosen)} of {counted(len(data.usable), 'image')} "
        f"{'is' if len(chosen) == 1 else 'are'} held out and not trained on: deliver is best, and "
        "the checkpoint is chosen by images that it has not seen. Send validation_images to train "
        "on all of them."
    )
    return dataclasses.replace(
        data,
        entries=_with_reasons(data, dict.fromkeys(identities, HELD_OUT)),
        usable=tuple(example for example in data.usable if example.identity not in identities),
        warnings=(*data.warnings, sentence),
        held_out=held_out,
    )
