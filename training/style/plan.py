"""The plan of a run: images and learning rate of each step, as a function of step and seed.

The course is the parameters in force, after the changes that memory and divergence have required.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Self

import numpy as np

from jobs.style import HyperParameters

BATCH_ORDER = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's steps, numbered from 0 over the whole job: a resumed run follows the same plan.

    Attributes:
        shapes: One per usable image. Images of one shape can share a batch.
        parameters: Hyper-parameters (see `Course.planned`).
        rate_unit: Unit of the optimizer's rates (see `Course.rate_unit`).
        batch_order: The rule for the order of batches: 1 puts batches that are not full at the end
            of an epoch, as earlier releases did; `BATCH_ORDER` puts them anywhere.
    """

    shapes: tuple[Hashable, ...]
    parameters: HyperParameters
    rate_unit: float = 1.0
    batch_order: int = BATCH_ORDER

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which each image is seen once; some may have fewer images."""
        return math.ceil(len(self._epoch(0)) / self.parameters.gradient_accumulation_steps)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole job: the length of the learning-rate schedule."""
        return self.steps_per_epoch * self.parameters.epochs

    def batches(self, step: int) -> list[list[int]]:
        """The images of one optimizer step, as batches of indices below n.

        The images of a batch have one shape.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        batches = self.parameters.gradient_accumulation_steps
        return self._epoch(epoch)[position * batches : (position + 1) * batches]

    def _epoch(self, epoch: int) -> list[list[int]]:
        """An epoch's batches. There are as many in each epoch."""
        # A new generator for each epoch: the order needs no state in a checkpoint.
        draw = np.random.default_rng([self.parameters.seed, epoch])
        order = draw.permutation(len(self.shapes))
        full: list[list[int]] = []
        begun: dict[Hashable, list[int]] = {}
        for index in order.tolist():
            batch = begun.setdefault(self.shapes[index], [])
            batch.append(index)
            if len(batch) == self.parameters.batch_size:
                full.append(begun.pop(self.shapes[index]))
        if self.batch_order == 1:
            return full + list(begun.values())
        # A batch that is not full weighs its images more: not always the same place of an epoch.
        for batch in begun.values():
            full.insert(int(draw.integers(len(full) + 1)), batch)
        return full

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then the chosen shape, over the whole job's length."""
        peak, total = self.parameters.learning_rate / self.rate_unit, self.total_steps
        warmup = int(total * self.parameters.warmup_ratio)
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)  # never 0: the first update counts too
        progress = (step - warmup) / max(1, total - warmup)
        match self.parameters.lr_schedule:
            case "cosine":
                return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
            case "linear":
                return peak * (1.0 - progress)
            case _:
                return peak

    def epochs_done(self, step: int) -> int:
        """Epochs that are complete after `step` optimizer steps."""
        return step // self.steps_per_epoch

    def inside_epoch(self, step: int) -> bool:
        """Whether an epoch is begun and not complete after `step` optimizer steps."""
        return step % self.steps_per_epoch != 0


@dataclasses.dataclass(frozen=True, slots=True)
class Course:
    """The requested parameters, those in force, and the changes between them.

    It is part of every checkpoint, so that a resumed job continues in the same way. No change
    affects the images of a step or the number of steps: positions stay valid.

    Attributes:
        asked: The job's hyper-parameters.
        parameters: The hyper-parameters in force.
        checkpointing: Gradient checkpointing is on, regardless of the worker's setting.
        rate_halved: Training has diverged once already.
        changes: A sentence for the report for each change.
    """

    asked: HyperParameters
    parameters: HyperParameters
    checkpointing: bool = False
    rate_halved: bool = False
    changes: tuple[str, ...] = ()

    @classmethod
    def of(cls, asked: HyperParameters) -> Self:
        """The course at the beginning of a job."""
        return cls(asked, asked)

    @property
    def planned(self) -> HyperParameters:
        """Parameters of the plan: smaller batches are parts of those asked for."""
        return dataclasses.replace(self.asked, learning_rate=self.parameters.learning_rate)

    @property
    def rate_unit(self) -> float:
        """The unit of the optimizer's rates: 1, or the requested rate for Prodigy.

        Prodigy multiplies it with the rate that it finds. Schedule and halving act on both
        alike.
        """
        return self.asked.learning_rate if self.parameters.optimizer == "prodigy" else 1.0

    def with_less_memory(self, epoch: int, *, checkpointing_is_on: bool) -> Self | None:
        """Gradient checkpointing first, which changes only rounding; then smaller batches.

        Args:
            epoch: The epoch, counted from 1, from which the change is in force.
            checkpointing_is_on: On the worker that ran out of memory.

        Returns:
            The next smaller course; None if there is none.
        """
        since = f"Memory ran out: from epoch {epoch} on"
        if not (self.checkpointing or checkpointing_is_on):
            sentence = f"{since}, gradient checkpointing was on."
            return dataclasses.replace(self, checkpointing=True, changes=(*self.changes, sentence))
        size = self.parameters.batch_size
        if size == 1:
            return None
        # Half, or the next smaller part that goes into it evenly: 3 images become 1 + 1 + 1.
        part = max(each for each in range(1, size // 2 + 1) if size % each == 0)
        batches = self.parameters.gradient_accumulation_steps * (size // part)
        sentence = (
            f"{since}, a batch had {part} instead of {size} images, and a step {batches} batches."
        )
        return dataclasses.replace(
            self,
            parameters=dataclasses.replace(
                self.parameters, batch_size=part, gradient_accumulation_steps=batches
            ),
            # A job that ran out of memory keeps gradient checkpointing on.
            checkpointing=True,
            changes=(*self.changes, sentence),
        )

    def at_half_the_rate(self, epoch: int) -> Self | None:
        """The course after a divergence, which is possible once.

        Args:
            epoch: The epoch, counted from 1, from which training is repeated.

        Returns:
            The slower course; None if this one is slower already, or cannot be slower.
        """
        if self.rate_halved:
            return None
        rate = self.parameters.learning_rate / 2
        try:
            slower = dataclasses.replace(self.parameters, learning_rate=rate)
        except ValueError:  # below the lowest learning rate
            return None
        sentence = (
            f"Training diverged: from epoch {epoch} on, it was repeated at half the learning rate"
            f"{'' if self.parameters.optimizer == 'prodigy' else f', {rate:g}'}."
        )
        return dataclasses.replace(
            self, parameters=slower, rate_halved=True, changes=(*self.changes, sentence)
        )
