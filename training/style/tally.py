"""What a run counts on the device, so that no step waits for the host, nor the host for a step."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Counted:
    """A tally as it was read.

    Attributes:
        loss_sum, loss_count: Of the finite losses of the epoch in hand.
        updates: Steps that changed the weights.
        skipped_in_a_row: Steps without an update up to now.
        longest_row: The most that were skipped in a row since the last reading.
    """

    loss_sum: float
    loss_count: int
    updates: int
    skipped_in_a_row: int
    longest_row: int


class Tally:
    """Sums of the epoch in hand, and which steps changed the weights.

    Args:
        device: Where it counts.

    Attributes:
        loss_sum: [] float32.
        loss_count: [] int64.
        updates, skipped_in_a_row: [] int64.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), device=device)
        self.loss_count, self.updates, self.skipped_in_a_row, self._longest_row = (
            torch.zeros((), device=device, dtype=torch.int64) for _ in range(4)
        )

    def add_losses(self, losses: Tensor) -> None:
        """Count each image's loss, [n]; those that are not finite are left out."""
        finite = torch.isfinite(losses)
        self.loss_sum += torch.where(finite, losses, 0.0).sum()
        self.loss_count += finite.sum()

    def add_step(self, skipped: Tensor) -> None:
        """Count a step; `skipped` says whether it left the weights alone, [] bool."""
        self.updates += ~skipped
        self.skipped_in_a_row += 1
        self.skipped_in_a_row *= skipped
        torch.maximum(self._longest_row, self.skipped_in_a_row, out=self._longest_row)

    def start_epoch(self) -> None:
        """Begin the sums anew."""
        self.loss_sum.zero_()
        self.loss_count.zero_()

    def read(self) -> Counted:
        """Fetch everything at once. This waits for the steps before it."""
        numbers = [
            self.loss_sum,
            self.loss_count,
            self.updates,
            self.skipped_in_a_row,
            self._longest_row,
        ]
        loss_sum, *counts = torch.stack([each.to(torch.float64) for each in numbers]).tolist()
        self._longest_row.copy_(self.skipped_in_a_row)
        return Counted(loss_sum, *map(int, counts))

    def restore(
        self, *, loss_sum: Tensor, loss_count: Tensor, updates: int, skipped_in_a_row: int
    ) -> None:
        """Set it to what a checkpoint says."""
        self.loss_sum.copy_(loss_sum)
        self.loss_count.copy_(loss_count)
        self.updates.fill_(updates)
        self.skipped_in_a_row.fill_(skipped_in_a_row)
        self._longest_row.fill_(skipped_in_a_row)
