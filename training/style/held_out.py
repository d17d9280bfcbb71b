"""Held-out images: never trained on, they tell a learnt style from copied images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from images.decoder import Decoder
from training.style import dataset
from training.style.dataset import Dataset
from utils.errors import StopReason

if TYPE_CHECKING:
    from jobs.style import TrainingRun
    from training.style.families.sd15 import BaseModel

TRAINED_ON = "is one of the training images, too, so it cannot show what was learnt beyond them"


def prepare(
    run: TrainingRun,
    base: BaseModel,
    *,
    should_stop: Callable[[], StopReason | None] = lambda: None,
    on_image: Callable[[], None] = lambda: None,
) -> Dataset:
    """Vet and encode a run's images, and those that are held out as its `held_out`.

    Held-out images are a help and no condition: none of them fails the run.

    Args:
        run: What is asked for.
        base: The base model; VAE and text encoder are used.
        should_stop, on_image: See `dataset.prepare`.

    Raises:
        ImageDownloadFailed, LowQualityData, Stopped, WorkerCrashed: See `dataset.prepare`.
    """
    with Decoder() as decoder:
        prepare_one = functools.partial(
            dataset.prepare,
            base=base,
            should_stop=should_stop,
            on_image=on_image,
            decoder=decoder,
        )
        data = prepare_one(run)
        if not run.validation_images:
            return data
        apart = dataclasses.replace(run, images=run.validation_images, min_images=0, notes=())
        others = prepare_one(apart)
    return dataclasses.replace(data, held_out=_without(others, data))


def _without(others: Dataset, data: Dataset) -> Dataset:
    """`others` less the images that are trained on: they would prove nothing."""
    trained = {example.identity for example in data.usable}
    twice = {example.source for example in others.usable if example.identity in trained}
    entries = tuple(
        (
            dataclasses.replace(entry, status="left_out", reasons=(TRAINED_ON,))
            if entry.source in twice
            else entry
        )
        for entry in others.entries
    )
    usable = tuple(example for example in others.usable if example.identity not in trained)
    return dataclasses.replace(others, entries=entries, usable=usable, warnings=())
