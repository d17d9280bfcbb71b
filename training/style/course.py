"""How a job is trained at present: as it was asked for, or as memory and numbers have allowed."""

from __future__ import annotations

import dataclasses
from typing import Self

from jobs.style import HyperParameters


@dataclasses.dataclass(frozen=True, slots=True)
class Course:
    """What was asked for, what is in force, and what had to be changed on the way.

    It is part of every checkpoint, so that whoever resumes the job goes on in the same way. No
    change touches the images of a step, nor the number of steps: positions stay what they were.

    Attributes:
        asked: The job's hyper-parameters.
        parameters: Those in force.
        checkpointing: Gradient checkpointing is on whatever the worker's setting is.
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
        """The course of a job to which nothing has happened yet."""
        return cls(asked, asked)

    @property
    def planned(self) -> HyperParameters:
        """What the plan of the steps is made from: smaller batches are parts of those asked for."""
        return dataclasses.replace(self.asked, learning_rate=self.parameters.learning_rate)

    @property
    def rate_unit(self) -> float:
        """What the optimizer's rates are multiples of: 1; for Prodigy, which multiplies them with
        the rate that it finds, the one asked for. Schedule and halving act on both alike."""
        return self.asked.learning_rate if self.parameters.optimizer == "prodigy" else 1.0

    def with_less_memory(self, epoch: int, *, checkpointing_is_on: bool) -> Self | None:
        """Gradient checkpointing first, which changes roundings alone; then smaller batches.

        Args:
            epoch: The epoch, counted from 1, from which the change is in force.
            checkpointing_is_on: On the worker that ran out of memory.

        Returns:
            The next smaller course; None where there is none.
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
            # What ran out with it will not do without it.
            checkpointing=True,
            changes=(*self.changes, sentence),
        )

    def at_half_the_rate(self, epoch: int) -> Self | None:
        """The one answer to a divergence.

        Args:
            epoch: The epoch, counted from 1, from which training is repeated.

        Returns:
            The slower course; None where this one is slower already, or cannot be.
        """
        if self.rate_halved:
            return None
        rate = self.parameters.learning_rate / 2
        try:
            slower = dataclasses.replace(self.parameters, learning_rate=rate)
        except ValueError:  # below what a learning rate may be
            return None
        sentence = (
            f"Training diverged: from epoch {epoch} on, it was repeated at half the learning rate"
            f"{'' if self.parameters.optimizer == 'prodigy' else f', {rate:g}'}."
        )
        return dataclasses.replace(
            self, parameters=slower, rate_halved=True, changes=(*self.changes, sentence)
        )
