"""Checkpoints: everything that a stopped run needs to end as if it had never stopped.

A checkpoint is a folder of safetensors and JSON (no pickle), written whole or not at all, with
every file's hash in its manifest. `save` deletes nothing: a local checkpoint is its reader's to
remove once it is uploaded, and the last two stay until a newer one has taken their place.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from jobs.style import HyperParameters
from training.style.course import Course
from training.style.results.probe import Probed
from utils import manifest
from utils.errors import CheckpointUnusable
from utils.events import from_dict

FORMAT = 3
STATE = "state.json"


@dataclasses.dataclass(frozen=True, slots=True)
class RunState:
    """Where a run is, and which run it is.

    Attributes:
        task_id, style_id, claim: Whose checkpoint it is, and under which claim it was written.
        base_model: SHA-256 of the base's UNet weights.
        course: Hyper-parameters asked for and in force, and what has been changed on the way.
        pictures: Identity of each image and its caption, in order.
        total_steps: Length of the learning-rate schedule, in optimizer steps.
        epoch: Completed epochs.
        step: Completed optimizer steps; the position in the data follows from it.
        updates: Steps of `step` that changed the weights.
        skipped_in_a_row: Steps without an update up to now.
        losses: Mean unweighted loss of each completed epoch.
        scaler: State of the gradient scaler, None without one.
        probes: What the probe found at the beginning and at each checkpoint.
    """

    task_id: str
    style_id: int
    claim: int
    base_model: str
    course: Course
    pictures: tuple[str, ...]
    total_steps: int
    epoch: int
    step: int
    updates: int
    skipped_in_a_row: int
    losses: tuple[float, ...]
    scaler: dict[str, Any] | None
    probes: tuple[Probed, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run's state and its tensors, by file.

    Attributes:
        state: Everything that is not a tensor.
        lora: Trainable weights by their name in the UNet.
        optimizer: Its state (see `training.runtime.optimizer`), `{weight's name}/{entry}`.
        random: States of the random generators by name, and the sums of the epoch in hand.
        best: The LoRA of the best checkpoint so far, where that is to be delivered: older
            checkpoints may be gone when training ends, on another machine perhaps.
        samples: JPEG files as bytes, by epoch and prompt (see `training.style.results.grids`).
    """

    state: RunState
    lora: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    samples: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Whether training that diverged may go on from here at another rate."""
        finite = all(bool(weight.isfinite().all()) for weight in self.lora.values())
        return finite and self.state.skipped_in_a_row == 0


_TENSOR_FILES = ("lora", "optimizer", "random")
_OPTIONAL_FILES = ("best", "samples")


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint: afterwards `folder` is complete, or nothing has changed.

    Raises:
        OSError: The disk is full or broken.
    """
    files = {
        f"{name}.safetensors": safetensors.torch.save(_on_cpu(getattr(checkpoint, name)))
        for name in (*_TENSOR_FILES, *_OPTIONAL_FILES)
        if name in _TENSOR_FILES or getattr(checkpoint, name)
    }
    state = checkpoint.state
    files[STATE] = json.dumps(dataclasses.asdict(state), indent=2).encode()
    facts = {
        "format": FORMAT,
        "task_id": state.task_id,
        "style_id": state.style_id,
        "claim": state.claim,
        "epoch": state.epoch,
        "step": state.step,
        "total_steps": state.total_steps,
    }
    manifest.write_folder(Path(folder), files, facts)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint back, its tensors on the CPU, after verifying every byte of it.

    Raises:
        CheckpointUnusable: It is incomplete, altered, or of another version of this software.
    """
    folder = Path(folder)
    facts = manifest.verify(folder)
    if facts.get("format") != FORMAT:
        raise CheckpointUnusable(
            f"The checkpoint {folder.name} has format {facts.get('format')!r}; this version reads "
            f"{FORMAT}."
        )
    try:
        return Checkpoint(
            from_dict(RunState, json.loads((folder / STATE).read_bytes())),
            **{
                name: safetensors.torch.load_file(folder / f"{name}.safetensors")
                for name in (*_TENSOR_FILES, *_OPTIONAL_FILES)
                if name in _TENSOR_FILES or f"{name}.safetensors" in facts["files"]
            },
        )
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        raise CheckpointUnusable(
            f"The checkpoint {folder.name} was written by another version of this software and "
            "cannot be read."
        ) from error


def refuse_another_run(
    saved: RunState, now: RunState, *, names: Mapping[str, str] | None = None
) -> None:
    """Refuse to go on from a checkpoint of another job, base model, data set or schedule.

    Args:
        saved: Of the checkpoint.
        now: Of the run that is to go on from it.
        names: What a person calls each of `now.pictures`.

    Raises:
        CheckpointUnusable: Names everything that differs.
    """
    then, asked = saved.course.asked, now.course.asked
    unlike = [
        f"{name} was {getattr(then, name)}, is {getattr(asked, name)}"
        for name in (field.name for field in dataclasses.fields(HyperParameters))
        if getattr(then, name) != getattr(asked, name)
    ]
    if saved.task_id != now.task_id:
        unlike.append(f"it belongs to job {saved.task_id}, this is {now.task_id}")
    if saved.base_model != now.base_model:
        unlike.append("the base model's weights are others")
    if saved.pictures != now.pictures:
        unlike.append(_other_images(saved.pictures, now.pictures, names or {}))
    if saved.total_steps != now.total_steps:
        unlike.append(f"the schedule had {saved.total_steps} steps, has {now.total_steps}")
    if unlike:
        raise CheckpointUnusable(
            f"The checkpoint cannot be continued by this run: {'; '.join(unlike)}."
        )


def _other_images(saved: tuple[str, ...], now: tuple[str, ...], names: Mapping[str, str]) -> str:
    """Which images differ; of those that are gone only their number is known."""
    contents = {identity.partition("-")[0] for identity in saved}
    fresh = [identity for identity in now if identity not in saved]
    recaptioned = [each for each in fresh if each.partition("-")[0] in contents]
    gone = len(set(saved) - set(now)) - len(recaptioned)
    parts = [
        f"{verb} {', '.join(names.get(each, each[:12]) for each in some)}"
        for verb, some in (
            ("new are", [each for each in fresh if each not in recaptioned]),
            ("other captions have", recaptioned),
        )
        if some
    ]
    if gone > 0:
        parts.append(f"{gone} missing")
    return (
        f"the usable images or their captions are others ({len(saved)} then, {len(now)} now"
        + "".join(f"; {part}" for part in parts)
        + ")"
    )


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
