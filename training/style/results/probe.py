"""The probe: the same images, noise and timesteps each time, so that two losses can be compared.

The loss of training jumps about, because each step draws other noise and other timesteps: it can
hardly compare two checkpoints. Here nothing is random.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from training.style.examples import Dataset, Example
    from training.style.families.sd15 import BaseModel

PASSES = 48
"""Forward passes a data set: about as long as sixteen training steps of one image."""
CPU_PASSES = 16
BATCHES = {"cuda": 8, "cpu": 4}
"""Images of one frame that are measured at once: a batch takes about as long as a training step, so
that a stop waits for a batch no longer than for a step."""
LEVELS = (0.125, 0.375, 0.625, 0.875)
"""Timesteps as parts of the schedule: the middles of its quarters."""
ASK_SECONDS = 1.0
"""So often it is asked whether to stop."""
LEAST_FALL = 0.001
"""A part of the base's own loss; what falls less has hardly been learnt."""
LEAST_RISE = 0.005
"""A part of the lowest loss; a probe that rises less stands still."""
MOST_RISE = 0.5
"""A part of the base's own loss; a LoRA that is so much worse than none has diverged."""


@dataclasses.dataclass(frozen=True, slots=True)
class Probed:
    """A measurement of the probe.

    Attributes:
        epoch, step: After how much training; 0 is the base model itself.
        training: Mean unweighted loss over the training images; None where it could not be
            measured.
        held_out: The same over images that are not trained on; None where there are none.
    """

    epoch: int
    step: int
    training: float | None
    held_out: float | None = None


class Interrupted(Exception):
    """A stop was asked for in the middle of a measurement."""


class Probe:
    """Measures how well the attached LoRA denoises given images.

    It draws only from its own generator and does not change modes or gradient flags, so that
    training goes on to the same bits as without it.

    Attributes:
        pass_seconds: Of one image's forward pass, as measured last.

    Args:
        base: The base model.
        dataset: The training images and, in `held_out`, those that are not trained on.
        should_stop: Asked about once a second.
    """

    def __init__(
        self, base: BaseModel, dataset: Dataset, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._base, self._dataset, self._should_stop = base, dataset, should_stop
        self._asked_at = time.monotonic()
        self.pass_seconds = 0.0

    def measure(self, epoch: int, step: int) -> Probed:
        """Measure the LoRA as it is.

        Raises:
            Interrupted: A stop was asked for.
        """
        self._asked_at = time.monotonic()
        with evaluating(self._base):
            training = self._mean_loss(self._dataset)
            others = self._dataset.held_out
            held_out = self._mean_loss(others) if others and others.usable else None
        return Probed(epoch, step, training, held_out)

    def _mean_loss(self, data: Dataset) -> float | None:
        began = time.monotonic()
        most = PASSES if self._base.device.type == "cuda" else CPU_PASSES
        chosen = passes(len(data.usable), most)
        losses = []
        for batch in self._batches(data, chosen):
            if time.monotonic() - self._asked_at > ASK_SECONDS:
                self._asked_at = time.monotonic()
                if self._should_stop():
                    raise Interrupted
            losses.append(self._losses(data, batch))
        mean = float(torch.cat(losses).mean())
        self.pass_seconds = (time.monotonic() - began) / len(chosen)
        return mean if math.isfinite(mean) else None

    def _batches(
        self, data: Dataset, chosen: Sequence[tuple[int, int]]
    ) -> Iterator[list[tuple[int, int]]]:
        """The passes, as many images of one frame at once as the device is given."""
        size = BATCHES.get(self._base.device.type, 1)
        by_frame: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for index, level in chosen:
            by_frame.setdefault(data.shapes[index], []).append((index, level))
        for alike in by_frame.values():
            yield from (alike[i : i + size] for i in range(0, len(alike), size))

    def _losses(self, data: Dataset, batch: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The loss of each image of a batch at its level, [n], on the device."""
        base = self._base
        schedule = base.scheduler.config.num_train_timesteps
        timesteps = torch.tensor(
            [int(LEVELS[level] * schedule) for _, level in batch], device=base.device
        )
        examples = [data.usable[index] for index, _ in batch]
        clean = torch.stack([data.latents[example.identity].mean for example in examples])
        noise = torch.stack(
            [
                _noise(example, level, clean.shape[1:])
                for example, (_, level) in zip(examples, batch, strict=True)
            ]
        ).to(base.device)
        noisy = base.scheduler.add_noise(clean, noise, timesteps)
        text = torch.stack([data.embeddings[example.caption] for example in examples])
        with mixed_precision(base):
            predicted = base.unet(
                noisy.to(base.dtype), timesteps, encoder_hidden_states=text
            ).sample
        target = noise
        if base.scheduler.config.prediction_type == "v_prediction":
            target = base.scheduler.get_velocity(clean, noise, timesteps)
        return F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))


def _noise(example: Example, level: int, shape: Sequence[int]) -> torch.Tensor:
    """The noise of an image at a level, on the CPU, so that it is the same on every machine."""
    # By the image and not by its place: one image less does not change the noise of the others.
    seed = hashlib.sha256(f"{example.identity}/{level}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
    return torch.randn(tuple(shape), generator=generator)


def passes(images: int, most: int) -> list[tuple[int, int]]:
    """Which image is looked at on which level: every image once before any of them twice.

    Args:
        images: How many there are.
        most: Passes that there may be; with more images, evenly spaced ones are taken.

    Returns:
        Pairs of an image's index and a level's.
    """
    if images > most:
        return [(n * images // most, n % len(LEVELS)) for n in range(most)]
    rounds = range(len(LEVELS))
    return [(n, (n + turn) % len(LEVELS)) for turn in rounds for n in range(images)][:most]


def best_of(probes: Sequence[Probed]) -> Probed | None:
    """The checkpoint with the lowest loss, by held-out images if there are any.

    The earliest one counts among equals. None if nothing was measured after the beginning.
    """
    found = [each for each in probes if each.epoch > 0]
    by_held_out = [each for each in found if each.held_out is not None]
    if by_held_out:
        return min(by_held_out, key=lambda each: each.held_out or 0.0)
    measured = [each for each in found if each.training is not None]
    return min(measured, key=lambda each: each.training or 0.0, default=None)


def is_worse_than_none(probes: Sequence[Probed]) -> bool:
    """Whether the last measurement of the training images is far above the base's own."""
    base, last = probes[0].training if probes else None, probes[-1].training if probes else None
    return base is not None and last is not None and last > base * (1 + MOST_RISE)


def diverged(probes: Sequence[Probed], *, ends: bool) -> Probed | None:
    """The measurement that shows a divergence; None if none does.

    Args:
        probes: Measurements, the base's own first.
        ends: The training ends here; then one measurement is enough, else it takes two in a row.
    """
    if not is_worse_than_none(probes):
        return None
    return probes[-1] if ends or is_worse_than_none(probes[:-1]) else None


def verdict(probes: Sequence[Probed]) -> tuple[str, ...]:
    """Sentences for the report about the course of the training."""
    measured = [each for each in probes if each.training is not None]
    sentences = []
    if missed := len(probes) - len(measured):
        sentences.append(f"The probe could not be measured at {missed} checkpoints.")
    if len(measured) < 2 or measured[0].epoch != 0:
        return tuple(sentences)
    first, last, best = measured[0].training, measured[-1].training, best_of(measured)
    assert first is not None and last is not None and best is not None
    if min(each.training or 0.0 for each in measured[1:]) > first * (1 + LEAST_RISE):
        sentences.append(
            "The LoRA got worse from the start: its loss on the training images, measured with the "
            f"same noise each time, was {first:.4f} before and is {last:.4f} after training. A "
            "lower learning_rate is needed."
        )
    elif min(each.training or 0.0 for each in measured[1:]) > first * (1 - LEAST_FALL):
        sentences.append(
            "The LoRA has learnt next to nothing: its loss on the training images, measured with "
            f"the same noise each time, was {first:.4f} before and is {last:.4f} after training. "
            "More epochs or a higher learning_rate are needed, or other captions."
        )
    elif worse := _copying(measured, best):
        sentences.append(worse)
    elif last > (best.training or 0.0) * (1 + LEAST_RISE) and best.held_out is None:
        sentences.append(
            f"Training got worse after epoch {best.epoch}: the loss on the training images rose "
            f"from {best.training:.4f} to {last:.4f}. A lower learning_rate is advisable; "
            "`deliver: best` chooses a checkpoint by held-out images."
        )
    return tuple(sentences)


def _copying(measured: Sequence[Probed], best: Probed) -> str | None:
    """Over-fitting: what is trained on goes on falling while what is held out rises."""
    last = measured[-1]
    if best.held_out is None or last.held_out is None or last.training is None:
        return None
    falls = best.training is not None and last.training < best.training
    if not falls or last.held_out <= best.held_out * (1 + LEAST_RISE):
        return None
    return (
        f"After epoch {best.epoch} the LoRA began to copy its images: the loss on them went on "
        f"falling, and on the held-out images it rose from {best.held_out:.4f} to "
        f"{last.held_out:.4f}. Fewer epochs are advisable; `deliver: best` takes epoch "
        f"{best.epoch}."
    )


@contextlib.contextmanager
def evaluating(base: BaseModel, *, with_lora: bool = True) -> Iterator[None]:
    """Evaluation mode without gradients, with the LoRA on or off.

    Afterwards everything is as before, and the LoRA is on.

    Gradient checkpointing needs no switch: without gradients the UNet does none.
    """
    modes = [(module, module.training) for module in base.unet.modules()]
    trained = [(weight, weight.requires_grad) for weight in base.unet.parameters()]
    base.unet.eval()
    if not with_lora:
        base.unet.disable_adapters()
    try:
        with torch.no_grad():
            yield
    finally:
        base.unet.enable_adapters()
        for weight, requires_grad in trained:  # the adapter's switch flips these
            weight.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


def mixed_precision(base: BaseModel) -> torch.autocast:
    """For a forward pass: the frozen weights may be in half precision, and the LoRA in single."""
    mixed = any(weight.dtype != base.dtype for weight in base.unet.parameters())
    return torch.autocast(base.device.type, dtype=base.dtype, enabled=mixed)
