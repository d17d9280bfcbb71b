"""Curves of a run as TensorBoard's event files, written by Accelerate's tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from accelerate.tracking import TensorBoardTracker


class Curves:
    """Writes points of curves. A context manager.

    Enter it inside the run's Accelerator, because the tracker reads its state.

    Args:
        folder: Receives the event files; None turns the curves off.
        first_step: The step at which the run begins. Readers drop the points that another attempt
            has written from there on.
    """

    def __init__(self, folder: Path | None, *, first_step: int) -> None:
        # An empty name, so that the files of all attempts are directly in the folder.
        self._tracker = TensorBoardTracker("", folder, purge_step=first_step) if folder else None

    def __enter__(self) -> Self:
        if self._tracker:
            self._tracker.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracker:
            self._tracker.finish()

    def draw(self, points: Mapping[str, float | None], step: int) -> None:
        """Write the given points. They are on the disk when this returns."""
        if self._tracker:
            known = {name: value for name, value in points.items() if value is not None}
            self._tracker.log(known, step=step)
