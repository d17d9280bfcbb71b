"""A run's curves as TensorBoard's event files, through Accelerate's tracker, where asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from accelerate.tracking import TensorBoardTracker

from jobs.layout import CURVES
from jobs.style import TrainingRun
from training.runtime.clock import Clock
from training.style.plan import Plan

if TYPE_CHECKING:
    from training.style.loop_state import LoopState


class Curves:
    """Writes a point of each curve at the end of an epoch; a context manager.

    Enter it inside the run's Accelerator, whose state the tracker asks for. Without
    `TrainingRun.tensorboard` it does nothing.

    Args:
        run: Whose curves.
        first_step: Where training begins: what another attempt has drawn from there on is void.
    """

    def __init__(self, run: TrainingRun, first_step: int) -> None:
        self._tracker: TensorBoardTracker | None = None
        if run.tensorboard:
            # The empty name: the files lie in the folder itself, all attempts at a job in one.
            folder = Path(run.work_folder) / CURVES
            self._tracker = TensorBoardTracker("", folder, purge_step=first_step)

    def __enter__(self) -> Self:
        if self._tracker:
            self._tracker.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracker:
            self._tracker.finish()

    def draw(self, state: LoopState, plan: Plan, clock: Clock) -> None:
        """The points of the epoch that is over; they are on the disk when this returns."""
        if self._tracker is None:
            return
        probed = state.probes[-1] if state.probes else None
        is_new = probed is not None and probed.step == state.step
        points = {
            "train/loss": state.losses[-1] if state.losses else None,
            "train/learning_rate": plan.learning_rate(state.step - 1) if state.step else None,
            "train/steps_per_second": clock.steps_per_second,
            "probe/training": probed.training if probed and is_new else None,
            "probe/held_out": probed.held_out if probed and is_new else None,
        }
        known = {name: value for name, value in points.items() if value is not None}
        self._tracker.log(known, step=state.step)
