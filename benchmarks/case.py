"""The unit of measurement: one combination of batch, checkpointing and number of images."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One row of the table.

    Attributes:
        batch_size: Images a step.
        checkpointing: Gradient checkpointing, on both sides.
        images: In the data set: an epoch's steps, times the batch.
        resolution: Side of the training images, in pixels.
    """

    batch_size: int
    checkpointing: bool
    images: int
    resolution: int

    def __str__(self) -> str:
        how = "on" if self.checkpointing else "off"
        return f"batch {self.batch_size}, checkpointing {how}, {self.images} images"

    @property
    def is_goal(self) -> bool:
        """Whether the goals that compare with other trainers are set for this case."""
        return (self.batch_size, self.checkpointing, self.images) == (1, False, 10)
