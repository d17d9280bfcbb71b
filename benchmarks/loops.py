"""The two loops that are compared: the product's trainer, and a plain one as most scripts have."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from benchmarks.case import Case
from training.base_model import BaseModel
from training.course import Course
from training.dataset import Dataset, prepare
from training.device import free_memory, one_run_accelerator, peak_memory_bytes
from training.lora_config import HyperParameters, Picture, TrainingRun
from training.trainer import LoRATrainer
from utils.events import Event, Progress


@dataclasses.dataclass(frozen=True, slots=True)
class Leg:
    """One measured stretch.

    Attributes:
        step_seconds: Of one optimizer step, on average, the first left out.
        peak_bytes: Of the GPU; on a CPU of the whole process, which says nothing of the leg.
    """

    step_seconds: float
    peak_bytes: int


def run_of(
    case: Case, pictures: list[Path], folder: Path, *, steps: int, every: int
) -> TrainingRun:
    """A run of at least so many steps.

    Args:
        case: Size and number of its batches.
        pictures: As many as the case wants, or more.
        folder: Where it writes.
        steps: Optimizer steps, rounded up to whole epochs.
        every: Epochs between checkpoints.
    """
    an_epoch = -(-case.pictures // case.batch_size)
    parameters = HyperParameters(
        epochs=min(1000, max(2, -(-steps // an_epoch))),
        batch_size=case.batch_size,
        resolution=case.resolution,
    )
    return TrainingRun(
        task_id="benchmark",
        style_id=1,
        claim=1,
        pictures=tuple(
            Picture(path.name, str(path), f"a painting, number {index}")
            for index, path in enumerate(pictures[: case.pictures])
        ),
        parameters=parameters,
        work_folder=str(folder),
        checkpoint_interval=every,
    )


def ours(base: BaseModel, case: Case, run: TrainingRun, data: Dataset) -> Leg:
    """The product's own trainer; probe and checkpoints are not in its rate."""
    course = dataclasses.replace(Course.of(run.parameters), checkpointing=case.checkpointing)
    try:
        result = LoRATrainer(run, base, data, course=course).train()
    finally:
        base.detach()
        free_memory(base.device)
    return Leg(1 / (result.steps_per_second or float("nan")), result.peak_memory_bytes)


def checkpoint_cost(base: BaseModel, case: Case, run: TrainingRun, data: Dataset) -> dict[str, Any]:
    """What an epoch takes that follows a checkpoint, over one that does not, in one run.

    The run's `checkpoint_interval` must be 2, so that they alternate. A checkpoint is made behind
    the line `epoch_done`; the probe's mean time is taken off.
    """
    ends = _Ends()
    trainer_log = logging.getLogger("training.trainer")
    level = trainer_log.level
    trainer_log.addHandler(ends)
    trainer_log.setLevel(logging.INFO)
    course = dataclasses.replace(Course.of(run.parameters), checkpointing=case.checkpointing)
    try:
        result = LoRATrainer(run, base, data, course=course).train()
    finally:
        trainer_log.removeHandler(ends)
        trainer_log.setLevel(level)
        base.detach()
    lengths = [later - earlier for earlier, later in zip(ends.times, ends.times[1:])]
    probe = result.probe_seconds / max(1, len(result.probes))
    # lengths[0] is epoch 2's; epochs 3, 5, … begin with the checkpoint of the one before.
    without, after = statistics.median(lengths[::2]), statistics.median(lengths[1::2]) - probe
    return {
        "epoch_seconds": without,
        "epoch_after_checkpoint_seconds": after,
        "probe_seconds": probe,
        "share": after / without - 1,
    }


class _Ends(logging.Handler):
    """Notes when each epoch ended."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        """logging's hook."""
        if record.getMessage() == "epoch_done":
            self.times.append(time.monotonic())


def first_step_seconds(base: BaseModel, case: Case, pictures: list[Path]) -> float:
    """From pictures on the disk to the end of the first step: vetting, encoding, training."""
    began, ended = time.monotonic(), 0.0

    def end_with_the_first(event: Event) -> None:
        nonlocal ended
        if isinstance(event, Progress) and event.step:
            if base.device.type == "cuda":
                torch.cuda.synchronize(base.device)
            ended = time.monotonic()
            raise _Enough

    with tempfile.TemporaryDirectory() as folder:
        run = run_of(case, pictures, Path(folder), steps=1, every=1000)
        course = dataclasses.replace(Course.of(run.parameters), checkpointing=case.checkpointing)
        data = prepare(run, base)
        try:
            LoRATrainer(run, base, data, course=course, emit=end_with_the_first).train()
        except _Enough:
            pass
        finally:
            base.detach()
    return ended - began


class _Enough(Exception):
    """The first step is done."""


class _Pictures(TorchDataset[tuple[Tensor, str]]):
    """Decodes and scales a picture whenever it is asked for."""

    def __init__(self, run: TrainingRun) -> None:
        self._pictures, self._side = run.pictures, run.parameters.resolution

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        picture = self._pictures[index]
        with Image.open(str(picture.path)) as opened:
            square = ImageOps.fit(opened.convert("RGB"), (self._side, self._side))
        pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1) / 127.5 - 1.0
        return pixels, picture.caption


def _endless(loader: DataLoader[tuple[Tensor, str]]) -> Iterator[tuple[Tensor, list[str]]]:
    while True:
        yield from loader


def plain(base: BaseModel, case: Case, run: TrainingRun) -> Leg:
    """The popular way: each step decodes, encodes picture and prompt, and reads the loss.

    With the same LoRA, precision and checkpointing as ours; the UNet, the VAE and the text encoder
    are the same objects.
    """
    base.restore_encoders()
    free_memory(base.device)
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    steps = run.parameters.epochs * -(-case.pictures // case.batch_size)
    try:
        with one_run_accelerator(base.device, base.dtype) as accelerator:
            weights = base.attach(run.parameters, checkpointing=case.checkpointing)
            optimizer = accelerator.prepare_optimizer(
                torch.optim.AdamW(weights, lr=run.parameters.learning_rate, weight_decay=0.01)
            )
            loader = DataLoader(_Pictures(run), batch_size=case.batch_size, shuffle=True)
            batches = _endless(loader)
            began = 0.0
            for step in range(steps):
                pixels, captions = next(batches)
                loss = _plain_loss(base, pixels, captions, accelerator)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(weights, run.parameters.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                loss.item()  # shown beside the progress bar
                if step == 0:
                    began = time.monotonic()
            seconds = time.monotonic() - began
        return Leg(seconds / (steps - 1), peak_memory_bytes(base.device))
    finally:
        base.detach()
        free_memory(base.device)


def _plain_loss(base: BaseModel, pixels: Tensor, captions: list[str], accelerator: Any) -> Tensor:
    device, schedule = base.device, base.scheduler
    with torch.no_grad(), accelerator.autocast():
        encoded = base.vae.encode(pixels.to(device)).latent_dist.sample()
        tokens = base.tokenizer(
            captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        text = base.text_encoder(tokens.input_ids.to(device))[0]
    latents = encoded.float() * base.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    timesteps = torch.randint(schedule.config.num_train_timesteps, (len(latents),), device=device)
    noisy = schedule.add_noise(latents, noise, timesteps)
    with accelerator.autocast():
        predicted = base.unet(
            noisy.to(base.dtype), timesteps, encoder_hidden_states=text.to(base.dtype)
        ).sample
    return F.mse_loss(predicted.float(), noise)
