"""How a training went: what the report is made from."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from jobs.style import HyperParameters
from training.style.results.probe import Probed
from utils.errors import StopReason


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a run went.

    Attributes:
        epochs, steps: Completed, over the whole job.
        loss: Mean unweighted loss of the last completed epoch; None before there is one.
        losses: The same for every completed epoch.
        seconds: Wall time of this run's training.
        steps_per_second: Measured over this run (after its last restart), checkpoints not counted;
            None when it made no step.
        peak_memory_bytes: Of the GPU, by torch's allocator, since the run's last restart; on the
            CPU the process's largest resident size.
        skipped_steps: Steps of the whole job that changed nothing, because their gradient was not
            finite; those that a restart took back are not among them.
        resumed_from: Epochs that were complete when this run began from a checkpoint; None for a
            fresh one.
        stopped: Why the run ended early; None for a finished training.
        parameters: Hyper-parameters in force at the end.
        warnings: Sentences for the report.
        probes: What the probe found, over the whole job.
        best_epoch: The checkpoint that the probe recommends; None where it found nothing.
        delivered_epoch: Epoch of the weights that are on the base now.
        samples: Sample images of checkpoints (see `training.style.results.grids`).
        probe_seconds, sample_seconds: What probe and samples took of `seconds`.
    """

    epochs: int
    steps: int
    loss: float | None
    losses: tuple[float, ...]
    seconds: float
    steps_per_second: float | None
    peak_memory_bytes: int
    skipped_steps: int
    resumed_from: int | None
    stopped: StopReason | None
    parameters: HyperParameters
    warnings: tuple[str, ...] = ()
    probes: tuple[Probed, ...] = ()
    best_epoch: int | None = None
    delivered_epoch: int | None = None
    samples: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    probe_seconds: float = 0.0
    sample_seconds: float = 0.0
