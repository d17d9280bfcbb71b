"""The two loops that are compared: the product's trainer, and a plain one as most scripts have."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from benchmarks.case import Case
from jobs.style import HyperParameters, TrainingImage, TrainingRun
from training.runtime.device import free_memory, one_run_accelerator, peak_memory_bytes
from training.style.dataset import prepare
from training.style.examples import Dataset
from training.style.families.sd15 import BaseModel
from training.style.plan import Course
from training.style.results.report import TrainingResult
from training.style.trainer import LoRATrainer
from utils.events import Event, Progress

READING = "reading the image"


@dataclasses.dataclass(frozen=True, slots=True)
class Leg:
    """One measured stretch.

    Attributes:
        step_seconds: Of one optimizer step, on average, the first epoch left out.
        peak_bytes: Of the GPU; on a CPU of the whole process, which does not describe the leg.
        parts: Of the plain loop on a CPU: the seconds a step spends in each part of it.
    """

    step_seconds: float
    peak_bytes: int
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


def clock(device: torch.device) -> Callable[[], float]:
    """The clock of a leg: on a CPU the time that this process computes.

    On a machine without a GPU, other programs take turns with the loops.
    """
    return time.monotonic if device.type == "cuda" else time.process_time


def run_of(case: Case, images: list[Path], folder: Path, *, steps: int, every: int) -> TrainingRun:
    """A run of an epoch and at least so many steps.

    Args:
        case: Size and number of its batches.
        images: As many as the case wants, or more.
        folder: The work folder.
        steps: Optimizer steps after the first epoch, rounded up to whole epochs, at least two.
        every: Epochs between checkpoints.
    """
    an_epoch = -(-case.images // case.batch_size)
    parameters = HyperParameters(
        epochs=min(1000, 1 + max(2, -(-steps // an_epoch))),  # the first warms up
        batch_size=case.batch_size,
        resolution=case.resolution,
        dropout=0.0,  # the other trainers have none
    )
    return TrainingRun(
        task_id="benchmark",
        style_id=1,
        claim=1,
        images=tuple(
            TrainingImage(path.name, str(path), f"a painting, number {index}")
            for index, path in enumerate(images[: case.images])
        ),
        parameters=parameters,
        work_folder=str(folder),
        checkpoint_interval=every,
    )


def ours(base: BaseModel, case: Case, run: TrainingRun, data: Dataset) -> Leg:
    """The product's own trainer, from the first epoch's end to the last one's."""
    ends, result = _train(base, case, run, data)
    steps = result.steps // run.parameters.epochs * (len(ends) - 1)
    return Leg((ends[-1] - ends[0]) / steps, result.peak_memory_bytes)


def _train(
    base: BaseModel, case: Case, run: TrainingRun, data: Dataset
) -> tuple[list[float], TrainingResult]:
    """Train, and take down when each epoch ended."""
    ends = _Ends(clock(base.device))
    trainer_log = logging.getLogger("training.style.trainer")
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
        free_memory(base.device)
    return ends.times, result


def checkpoint_cost(base: BaseModel, case: Case, run: TrainingRun, data: Dataset) -> dict[str, Any]:
    """The time of an epoch that follows a checkpoint, over one that does not, in one run.

    The run's `checkpoint_interval` must be 2, so that they alternate. A checkpoint is made behind
    the line `epoch_done`; the probe's mean time is taken off.
    """
    ends, result = _train(base, case, run, data)
    lengths = [later - earlier for earlier, later in zip(ends, ends[1:])]
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

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__()
        self._now = now
        self.times: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        """logging's hook."""
        if record.getMessage() == "epoch_done":
            self.times.append(self._now())


def first_step_seconds(base: BaseModel, case: Case, images: list[Path]) -> float:
    """From images on the disk to the end of the first step: vetting, encoding, training."""
    began, ended = time.monotonic(), 0.0

    def end_with_the_first(event: Event) -> None:
        nonlocal ended
        if isinstance(event, Progress) and event.done:
            if base.device.type == "cuda":
                torch.cuda.synchronize(base.device)
            ended = time.monotonic()
            raise _Enough

    with tempfile.TemporaryDirectory() as folder:
        run = run_of(case, images, Path(folder), steps=1, every=1000)
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


class _Images(TorchDataset[tuple[Tensor, str]]):
    """Decodes and scales an image whenever it is asked for."""

    def __init__(self, run: TrainingRun) -> None:
        self._images, self._side = run.images, run.parameters.resolution

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        image = self._images[index]
        with Image.open(str(image.path)) as opened:
            square = ImageOps.fit(opened.convert("RGB"), (self._side, self._side))
        pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1) / 127.5 - 1.0
        return pixels, image.caption


def _endless(loader: DataLoader[tuple[Tensor, str]]) -> Iterator[tuple[Tensor, list[str]]]:
    while True:
        yield from loader


class _Watch:
    """Adds up what each part of a step takes; a GPU would have to be waited for, and has no parts.

    Args:
        now: The leg's clock.
        looks: Whether it looks at all.
    """

    def __init__(self, now: Callable[[], float], looks: bool) -> None:
        self._now, self._looks = now, looks
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        """The time of the block belongs to this part."""
        if not self._looks:
            yield
            return
        began = self._now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - began


def plain(base: BaseModel, case: Case, run: TrainingRun) -> Leg:
    """The popular way: each step decodes, encodes image and prompt, and reads the loss.

    With the same LoRA, precision and checkpointing as ours; the UNet, the VAE and the text encoder
    are the same objects.
    """
    base.restore_encoders()
    free_memory(base.device)
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    an_epoch = -(-case.images // case.batch_size)
    counted, now = (run.parameters.epochs - 1) * an_epoch, clock(base.device)
    try:
        with one_run_accelerator(base.device, base.dtype) as accelerator:
            loop = _PlainLoop(base, case, run, accelerator)
            for _ in range(an_epoch):  # it warms up
                loop.step()
            loop.watch.seconds.clear()
            began = now()
            for _ in range(counted):
                loop.step()
            seconds = now() - began
        parts = {part: spent / counted for part, spent in loop.watch.seconds.items()}
        return Leg(seconds / counted, peak_memory_bytes(base.device), parts)
    finally:
        base.detach()
        free_memory(base.device)


class _PlainLoop:
    """The state that the popular script keeps between its steps."""

    def __init__(
        self, base: BaseModel, case: Case, run: TrainingRun, accelerator: Accelerator
    ) -> None:
        self._base, self._accelerator, self._parameters = base, accelerator, run.parameters
        self.watch = _Watch(clock(base.device), base.device.type != "cuda")
        self._weights = base.attach(run.parameters)
        if case.checkpointing:
            base.unet.enable_gradient_checkpointing()  # torch's, as the script has it
        self._optimizer = accelerator.prepare_optimizer(
            torch.optim.AdamW(self._weights, lr=run.parameters.learning_rate, weight_decay=0.01)
        )
        loader = DataLoader(_Images(run), batch_size=case.batch_size, shuffle=True)
        self._batches = _endless(loader)

    def step(self) -> None:
        """One optimizer step."""
        watch, accelerator = self.watch, self._accelerator
        with watch.on(READING):
            pixels, captions = next(self._batches)
        loss = self._loss(pixels, captions)
        with watch.on("UNet, backward"):
            accelerator.backward(loss)
        with watch.on("clipping"):
            accelerator.clip_grad_norm_(self._weights, self._parameters.max_grad_norm)
        with watch.on("AdamW"):
            self._optimizer.step()
            self._optimizer.zero_grad()
        loss.item()  # shown next to the progress bar

    def _loss(self, pixels: Tensor, captions: list[str]) -> Tensor:
        base, accelerator = self._base, self._accelerator
        device, schedule = base.device, base.scheduler
        with torch.no_grad(), accelerator.autocast():
            with self.watch.on("VAE"):
                encoded = base.vae.encode(pixels.to(device)).latent_dist.sample()
            with self.watch.on("text encoder"):
                tokens = base.tokenizer(
                    captions,
                    padding="max_length",
                    max_length=77,
                    truncation=True,
                    return_tensors="pt",
                )
                text = base.text_encoder(tokens.input_ids.to(device))[0]
        latents = encoded.float() * base.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(
            schedule.config.num_train_timesteps, (len(latents),), device=device
        )
        noisy = schedule.add_noise(latents, noise, timesteps)
        with accelerator.autocast(), self.watch.on("UNet, forward"):
            predicted = base.unet(
                noisy.to(base.dtype), timesteps, encoder_hidden_states=text.to(base.dtype)
            ).sample
        return F.mse_loss(predicted.float(), noise)
