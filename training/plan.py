"""What a run does at each step, which pictures at which rate: a function of step and seed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from training.lora_config import HyperParameters


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's steps, numbered from 0 over the whole job: a resumed run follows the same plan.

    Attributes:
        pictures: Usable pictures, n.
        parameters: Hyper-parameters in force.
    """

    pictures: int
    parameters: HyperParameters

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which each picture is seen once; the last may have fewer pictures."""
        parameters = self.parameters
        return math.ceil(
            self.pictures / (parameters.batch_size * parameters.gradient_accumulation_steps)
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole job: the length of the learning-rate schedule."""
        return self.steps_per_epoch * self.parameters.epochs

    def batches(self, step: int) -> list[list[int]]:
        """The pictures of one optimizer step, as batches of indices below n."""
        epoch, position = divmod(step, self.steps_per_epoch)
        # A generator of its own for each epoch: the order needs no state in a checkpoint.
        order = np.random.default_rng([self.parameters.seed, epoch]).permutation(self.pictures)
        size = self.parameters.batch_size
        group = size * self.parameters.gradient_accumulation_steps
        chosen: list[int] = order[position * group : (position + 1) * group].tolist()
        return [chosen[i : i + size] for i in range(0, len(chosen), size)]

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then the chosen shape, over the whole job's length."""
        peak, total = self.parameters.learning_rate, self.total_steps
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
