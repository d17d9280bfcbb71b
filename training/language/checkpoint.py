"""The checkpoints of a language model: safetensors and JSON, and no pickle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from jobs.llm import LlmParameters
from training.runtime import checkpoint
from utils.errors import CheckpointUnusable
from utils.events import from_dict

FORMAT = 1
_TENSORS = ("lora", "optimizer")


@dataclasses.dataclass(frozen=True, slots=True)
class LanguageState:
    """The identity and the position of a run.

    Every random number follows from the seed and the step, so that no generator is saved.

    Attributes:
        task_id, subject, claim: The job, and the claim under which the checkpoint was written.
        base_model: SHA-256 of the base.
        quantization: How the base is loaded.
        data: SHA-256 of the token rows.
        parameters: Parameters of the job.
        step: Completed optimizer steps.
        total_steps: Steps of the whole job.
        micro_batch: Rows of a forward pass; smaller than batch_size after a lack of memory.
        rate: Factor of the learning rate; below 1 after a divergence.
        losses: Mean loss of a learned token, for each step.
        skipped_in_a_row: Steps without an update since the last update.
        evaluations: `[step, held-out loss]` of each evaluation.
        best_step: Step of the lowest held-out loss.
        changes: Sentences about changes on the way.
    """

    task_id: str
    subject: str
    claim: int
    base_model: str
    quantization: str
    data: str
    parameters: LlmParameters
    step: int
    total_steps: int
    micro_batch: int
    rate: float
    losses: tuple[float, ...]
    skipped_in_a_row: int
    evaluations: tuple[tuple[float, ...], ...]
    best_step: int
    changes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class LanguageCheckpoint:
    """The state of a run and its tensors, by file; `best` is the adapter of the best evaluation."""

    state: LanguageState
    lora: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def save(folder: Path, saved: LanguageCheckpoint) -> None:
    """Write a checkpoint. Afterwards `folder` is complete, or nothing has changed.

    Raises:
        OSError: The disk is full or broken.
    """
    state = saved.state
    facts: dict[str, Any] = {"format": FORMAT, "kind": "llm"}
    facts |= {
        name: getattr(state, name)
        for name in ("task_id", "subject", "claim", "step", "total_steps")
    }
    tensors = {name: getattr(saved, name) for name in _TENSORS}
    if saved.best:
        tensors["best"] = saved.best
    checkpoint.write(folder, dataclasses.asdict(state), tensors, facts)


def load(folder: Path) -> LanguageCheckpoint:
    """Read a checkpoint, its tensors on the CPU, after every byte of it is verified.

    Raises:
        CheckpointUnusable: It is incomplete, altered, or of another version of this software.
    """
    with checkpoint.reading(folder, FORMAT) as (state, tensors, _):
        return LanguageCheckpoint(from_dict(LanguageState, state), **tensors)


def refuse_another_run(saved: LanguageState, now: LanguageState) -> None:
    """Refuse to go on from a checkpoint of another job, base, data set or schedule.

    Raises:
        CheckpointUnusable: Names everything that differs.
    """
    names = ("task_id", "subject", "base_model", "quantization", "data", "total_steps")
    unlike = [name for name in names if getattr(saved, name) != getattr(now, name)]
    unlike += [
        field.name
        for field in dataclasses.fields(LlmParameters)
        if getattr(saved.parameters, field.name) != getattr(now.parameters, field.name)
    ]
    if unlike:
        raise CheckpointUnusable(
            "The checkpoint cannot be continued by this run, because these differ: "
            f"{', '.join(unlike)}."
        )
