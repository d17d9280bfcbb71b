"""The variables of the loop: how they begin, go into a checkpoint, and are restored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from jobs.style import HyperParameters
from training.runtime import optimizer as optimizers
from training.style.checkpoint import Checkpoint, RunState
from training.style.families.sd15 import BaseModel
from training.style.lean_lora import LeanLora, suits
from training.style.plan import Course
from training.style.results import preview
from training.style.results.probe import Probed
from utils.errors import TrainingFailed


@dataclasses.dataclass(frozen=True, slots=True)
class Counted:
    """The values of a tally.

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
        device: Device of the counters.

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
        """Count a step; `skipped` is true if it did not change the weights, [] bool."""
        self.updates += ~skipped
        self.skipped_in_a_row += 1
        self.skipped_in_a_row *= skipped
        torch.maximum(self._longest_row, self.skipped_in_a_row, out=self._longest_row)

    def start_epoch(self) -> None:
        """Reset the sums."""
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
        """Set the counters to those of a checkpoint."""
        self.loss_sum.copy_(loss_sum)
        self.loss_count.copy_(loss_count)
        self.updates.fill_(updates)
        self.skipped_in_a_row.fill_(skipped_in_a_row)
        self._longest_row.fill_(skipped_in_a_row)


@dataclasses.dataclass(slots=True)
class LoopState:
    """The loop's variables.

    Attributes:
        lora: Trainable float32 weights by their name in the UNet.
        stepped: The parameters that the optimizer has: those weights, or one that contains them.
        lean: How the UNet computes with them on the fast path; None on the plain one.
        optimizer: As Accelerate wraps it.
        noise: Source of noise, timesteps, posterior samples and caption dropout. (The LoRA's own
            dropout draws from torch's global generators, which are part of a checkpoint too.
            Nothing draws from Python's or NumPy's.)
        tally: Counts on the device; read once an epoch.
        step: Completed optimizer steps of the job.
        updates: Those that changed the weights, when the tally was last read.
        skipped: Those that did not, up to then.
        skipped_in_a_row: The last of them without an update in between.
        losses: Mean loss of each completed epoch.
        saved_step: Step of the newest checkpoint.
        probes: Measurements of the probe.
        best: The best LoRA so far, on the CPU, where it is to be delivered.
        samples: Sample images of checkpoints (see `training.style.results.preview`).
    """

    lora: dict[str, torch.nn.Parameter]
    stepped: list[torch.nn.Parameter]
    lean: LeanLora | None
    optimizer: Any
    noise: torch.Generator
    tally: Tally
    step: int = 0
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    saved_step: int = 0
    probes: list[Probed] = dataclasses.field(default_factory=list)
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    samples: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return len(self.losses)

    def keep_as_best(self) -> None:
        """Remember the LoRA as it is now."""
        self.best = _copied(self.lora, wait=True)

    def keep_samples(self, row: str, images: Sequence[Image.Image]) -> None:
        """Add a row of sample images; see `preview.with_row`."""
        self.samples = preview.with_row(self.samples, row, images)

    def take_the_best(self) -> None:
        """Set the LoRA to what was kept."""
        with torch.no_grad():
            for name, weight in self.lora.items():
                weight.copy_(self.best[name])


def begin(base: BaseModel, course: Course, accelerator: Accelerator) -> LoopState:
    """Attach a fresh LoRA and seed everything from the run's seed.

    Raises:
        TrainingFailed: A trainable weight is not float32: its gradients could not be unscaled.
    """
    parameters = course.parameters
    weights = base.attach(parameters, checkpointing=course.checkpointing)
    if wrong := {weight.dtype for weight in weights} - {torch.float32}:
        raise TrainingFailed(f"The LoRA's weights are {wrong}, not float32.")
    lora = {name: w for name, w in base.unet.named_parameters() if w.requires_grad}
    stepped, lean = weights, None
    if base.fast and suits(base.unet):
        lean = LeanLora(base.unet, base.dtype)
        lora = lean.weights
        flat = parameters.optimizer in optimizers.INDIFFERENT_TO_SHAPE
        stepped = [lean.flat] if flat else list(lora.values())
    optimizer = accelerator.prepare_optimizer(_optimizer(parameters, stepped))
    # Two streams: with one seed for both, the dropout masks would follow the noise.
    noise_seed, dropout_seed = np.random.SeedSequence(parameters.seed).generate_state(2)
    torch.manual_seed(int(dropout_seed))
    return LoopState(
        lora=lora,
        stepped=stepped,
        lean=lean,
        optimizer=optimizer,
        noise=torch.Generator(base.device).manual_seed(int(noise_seed)),
        tally=Tally(base.device),
    )


def _optimizer(
    parameters: HyperParameters, weights: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    try:
        parameters.require_libraries()
    except ValueError as error:
        raise TrainingFailed(f"This job cannot be trained here: {error}.") from error
    return optimizers.create(
        parameters.optimizer,
        weights,
        learning_rate=parameters.learning_rate,
        weight_decay=parameters.weight_decay,
    )


def update(state: LoopState, norm: Tensor, accelerator: Accelerator) -> None:
    """Apply the gradients, unless they are not finite.

    Args:
        state: The loop; the step goes into its tally.
        norm: Of the gradients before they were clipped, [].
        accelerator: Whose scaler looks at the gradients itself.
    """
    skipped = ~torch.isfinite(norm)
    if accelerator.scaler is None and optimizers.heeds_found_inf(state.optimizer):
        # As the scaler does: the step reads it on the device.
        state.optimizer.optimizer.found_inf = skipped.to(torch.float32)
    if accelerator.scaler or optimizers.heeds_found_inf(state.optimizer) or not bool(skipped):
        state.optimizer.step()
    if state.lean:
        state.lean.zero_grad()
        state.lean.refresh()
    else:
        state.optimizer.zero_grad(set_to_none=True)
    state.tally.add_step(skipped)


def capture(
    state: LoopState, about: RunState, accelerator: Accelerator
) -> tuple[Checkpoint, Callable[[], None]]:
    """A copy of the loop as a checkpoint on the CPU, which later steps do not change.

    Args:
        state: The loop, its tally read.
        about: Whose it is; the counters are filled in here.
        accelerator: Whose scaler it is.

    Returns:
        The checkpoint, and a function that returns once the tensors have arrived from the GPU.
    """
    random = {
        "noise": state.noise.get_state(),
        "cpu": torch.get_rng_state(),
        "loss_sum": state.tally.loss_sum,
        "loss_count": state.tally.loss_count,
    }
    if state.noise.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(state.noise.device)
    captured = Checkpoint(
        state=dataclasses.replace(
            about,
            step=state.step,
            epoch=len(state.losses),
            updates=state.updates,
            skipped_in_a_row=state.skipped_in_a_row,
            losses=tuple(state.losses),
            scaler=accelerator.scaler.state_dict() if accelerator.scaler else None,
            probes=tuple(state.probes),
        ),
        lora=_copied(state.lora),
        optimizer=_copied(optimizers.state_tensors(state.optimizer, state.lora)),
        random=_copied(random),
        # Nothing changes these in place.
        best=dict(state.best),
        samples=dict(state.samples),
    )
    if state.noise.device.type != "cuda":
        return captured, lambda: None
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(state.noise.device))
    return captured, arrived.synchronize


def restore(state: LoopState, saved: Checkpoint, accelerator: Accelerator) -> None:
    """Set a begun loop to what `capture` took, on the same kind of device; `saved` is only read."""
    with torch.no_grad():
        for name, weight in state.lora.items():
            weight.copy_(saved.lora[name])
    optimizers.restore(state.optimizer, saved.optimizer, state.lora)
    if accelerator.scaler and saved.state.scaler:
        accelerator.scaler.load_state_dict(saved.state.scaler)
    state.tally.restore(
        loss_sum=saved.random["loss_sum"],
        loss_count=saved.random["loss_count"],
        updates=saved.state.updates,
        skipped_in_a_row=saved.state.skipped_in_a_row,
    )
    state.noise.set_state(saved.random["noise"])
    torch.set_rng_state(saved.random["cpu"])
    if state.noise.device.type == "cuda":
        torch.cuda.set_rng_state(saved.random["cuda"], state.noise.device)
    state.step = state.saved_step = saved.state.step
    state.updates = saved.state.updates
    state.skipped = state.step - state.updates
    state.skipped_in_a_row = saved.state.skipped_in_a_row
    state.losses = list(saved.state.losses)
    state.probes = list(saved.state.probes)
    state.best, state.samples = dict(saved.best), dict(saved.samples)


def assert_moved(state: LoopState, base: BaseModel, parameters: HyperParameters) -> None:
    """Wrong gradient checkpointing, or a cut graph, leaves `lora_B` at its initial zero.

    Raises:
        TrainingFailed: A part of the LoRA that can learn has not moved.
    """
    side = parameters.resolution // 8 // 2 ** (len(base.unet.config.block_out_channels) - 1)
    names = [name for name in state.lora if ".lora_B." in name and not _idle(name, side)]
    moved = torch.stack([state.lora[name].detach().any() for name in names]).tolist()
    still = [name for name, has_moved in zip(names, moved, strict=True) if not has_moved]
    if still:
        raise TrainingFailed(
            f"{len(still)} of {len(names)} parts of the LoRA have learnt nothing in "
            f"{state.updates} updates, {still[0]} among them."
        )


def weights_are_finite(state: LoopState) -> bool:
    """Whether every trained weight is a finite number."""
    finite = [weight.detach().isfinite().all() for weight in state.lora.values()]
    return bool(torch.stack(finite).all())


def _copied(tensors: Mapping[str, Tensor], *, wait: bool = False) -> dict[str, Tensor]:
    """Copies on the CPU.

    From a GPU they come in one piece for each dtype, into pinned memory, so that the steps
    after this need not wait; unless `wait`, they may still be on their way.
    """
    copies = {}
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.device.type == "cpu":
            copies[name] = tensor.detach().clone()
        else:
            groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    for (_, dtype), names in groups.items():
        together = torch.cat([tensors[name].detach().reshape(-1) for name in names])
        arriving = torch.empty(together.shape, dtype=dtype, pin_memory=True)
        arriving.copy_(together, non_blocking=not wait)
        sizes = [tensors[name].numel() for name in names]
        for name, part in zip(names, torch.split(arriving, sizes), strict=True):
            copies[name] = part.view(tensors[name].shape)
    return {name: copies[name] for name in tensors}


def _idle(name: str, side: int) -> bool:
    """Whether a part cannot learn: self-attention over one position has nothing to choose.

    Args:
        name: A weight of the LoRA.
        side: Side of the innermost feature map of a square image; 1 in SD1.5 at 64 pixels, where
            there is no other frame: in larger ones there is more to choose from.
    """
    middle = name.startswith("mid_block.") and ".attn1." in name
    return side <= 1 and middle and (".to_q." in name or ".to_k." in name)
