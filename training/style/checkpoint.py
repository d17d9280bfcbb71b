"""The checkpoints of a style: all that a stopped run needs to end as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from jobs.style import HyperParameters
from training.runtime import checkpoint
from training.style.plan import Course
from training.style.results.probe import Probed, is_worse_than_none
from utils.errors import CheckpointUnusable
from utils.events import from_dict

FORMAT = 3
_TENSORS = ("lora", "optimizer", "random")
_OPTIONAL = ("best", "samples")


@dataclasses.dataclass(frozen=True, slots=True)
class RunState:
    """The identity and the position of a run.

    Attributes:
        task_id, style_id, claim: The job, and the claim under which the checkpoint was written.
        base_model: SHA-256 of the base's UNet weights.
        encoders: The same of its VAE and text encoder, whose latents and embeddings are trained on;
            None in checkpoints of earlier releases.
        course: Hyper-parameters asked for and in force, and the changes on the way.
        pictures: Identity of each image and its caption, in order.
        total_steps: Length of the learning-rate schedule, in optimizer steps.
        epoch: Completed epochs.
        step: Completed optimizer steps. The position in the data follows from it.
        updates: Steps of `step` that changed the weights.
        skipped_in_a_row: Steps without an update since the last update.
        losses: Mean unweighted loss of each completed epoch.
        scaler: State of the gradient scaler, or None.
        probes: Measurements of the probe at the beginning and at each checkpoint.
        batch_order: The rule for the order of batches (see `Plan`).
        fast: Whether the run trains on the fast path (see `training.style.lean_lora`). False in
            checkpoints of earlier releases, which have only the plain one.
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
    encoders: str | None = None
    batch_order: int = 1
    fast: bool = False


# These are entries of the manifest: earlier releases refuse a state with unknown fields.
_IN_THE_MANIFEST = ("encoders", "batch_order", "fast")


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a run and its tensors, by file.

    Attributes:
        state: All values that are not tensors.
        lora: Trainable weights by their name in the UNet.
        optimizer: State of the optimizer (see `training.runtime.optimizer`), by
            `{name of the weight}/{entry}`.
        random: States of the random generators by name, and the sums of the epoch in progress.
        best: The LoRA of the best checkpoint so far, if it is to be delivered. The older
            checkpoints may be deleted when training ends, possibly on another machine.
        samples: JPEG files as bytes, by epoch and prompt (see `training.style.results.preview`).
    """

    state: RunState
    lora: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    samples: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Whether training that diverged may continue from here at another rate."""
        finite = all(bool(weight.isfinite().all()) for weight in self.lora.values())
        worse = is_worse_than_none(self.state.probes)
        return finite and self.state.skipped_in_a_row == 0 and not worse


def save(folder: Path, saved: Checkpoint) -> None:
    """Write a checkpoint. Afterwards `folder` is complete, or nothing has changed.

    Raises:
        OSError: The disk is full or broken.
    """
    state = saved.state
    facts = {
        "format": FORMAT,
        "task_id": state.task_id,
        "style_id": state.style_id,
        "claim": state.claim,
        "epoch": state.epoch,
        "step": state.step,
        "total_steps": state.total_steps,
        **{name: getattr(state, name) for name in _IN_THE_MANIFEST},
    }
    values = dataclasses.asdict(state)
    for name in _IN_THE_MANIFEST:
        del values[name]
    tensors = {name: getattr(saved, name) for name in (*_TENSORS, *_OPTIONAL)}
    written = {name: each for name, each in tensors.items() if each or name in _TENSORS}
    checkpoint.write(Path(folder), values, written, facts)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint, its tensors on the CPU, after every byte of it is verified.

    Raises:
        CheckpointUnusable: It is incomplete, altered, or of another version of this software.
    """
    with checkpoint.reading(Path(folder), FORMAT) as (state, tensors, facts):
        known = {name: facts[name] for name in _IN_THE_MANIFEST if name in facts}
        return Checkpoint(from_dict(RunState, state | known), **tensors)


def images_in(folder: Path) -> tuple[str, ...] | None:
    """The images that a checkpoint's run trains on, unverified; None if they cannot be read."""
    try:
        found = json.loads((folder / checkpoint.STATE).read_bytes())["pictures"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # `load` reports it
    return tuple(map(str, found)) if isinstance(found, list) else None


def refuse_another_run(
    saved: RunState, now: RunState, *, names: Mapping[str, str] | None = None
) -> None:
    """Refuse to go on from a checkpoint of another job, base model, data set or schedule.

    Args:
        saved: Of the checkpoint.
        now: Of the run that is to go on from it.
        names: A readable name for each of `now.pictures`.

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
    if saved.encoders and saved.encoders != now.encoders:
        unlike.append("the weights of the base model's VAE or text encoder are others")
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
