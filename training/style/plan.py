"""What a run does at each step, which images at which rate: a function of step and seed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable

import numpy as np

from jobs.style import HyperParameters


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's steps, numbered from 0 over the whole job: a resumed run follows the same plan.

    Attributes:
        shapes: What each usable image can share a batch by, n of them.
        parameters: Hyper-parameters (see `Course.planned`).
        rate_unit: What the optimizer's rates are multiples of (see `Course.rate_unit`).
    """

    shapes: tuple[Hashable, ...]
    parameters: HyperParameters
    rate_unit: float = 1.0

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which each image is seen once; the last may have fewer images."""
        return math.ceil(len(self._epoch(0)) / self.parameters.gradient_accumulation_steps)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole job: the length of the learning-rate schedule."""
        return self.steps_per_epoch * self.parameters.epochs

    def batches(self, step: int) -> list[list[int]]:
        """The images of one optimizer step, as batches of indices below n; the images of a
        batch are of one shape."""
        epoch, position = divmod(step, self.steps_per_epoch)
        batches = self.parameters.gradient_accumulation_steps
        return self._epoch(epoch)[position * batches : (position + 1) * batches]

    def _epoch(self, epoch: int) -> list[list[int]]:
        """An epoch's batches. There are as many in each epoch."""
        # A generator of its own for each epoch: the order needs no state in a checkpoint.
        order = np.random.default_rng([self.parameters.seed, epoch]).permutation(len(self.shapes))
        full: list[list[int]] = []
        begun: dict[Hashable, list[int]] = {}
        for index in order.tolist():
            batch = begun.setdefault(self.shapes[index], [])
            batch.append(index)
            if len(batch) == self.parameters.batch_size:
                full.append(begun.pop(self.shapes[index]))
        return full + list(begun.values())

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
