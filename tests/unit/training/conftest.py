"""A tiny base model, images to train on, and runs of a few steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.kinds import TrainerOptions
from jobs.style import HyperParameters, TrainingImage, TrainingRun
from training.style.families.sd15 import BaseModel
from training.style.results import probe
from training.style.stand_in_model import build_stand_in

MakeRun = Callable[..., TrainingRun]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in another order have other last bits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is quicker, and no less a probe."""
    monkeypatch.setattr(probe, "CPU_PASSES", 4)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny base model."""
    return build_stand_in(tmp_path_factory.mktemp("models") / "stand-in")


@pytest.fixture(scope="session")
def options(stand_in: Path) -> TrainerOptions:
    """Options that load it."""
    return TrainerOptions(str(stand_in), allow_cpu=True, gradient_checkpointing="false")


@pytest.fixture(scope="session")
def warm_base(options: TrainerOptions) -> BaseModel:
    """A base model that has seen the runs of other tests."""
    return BaseModel.load(options)


@pytest.fixture
def base(warm_base: BaseModel) -> Iterator[BaseModel]:
    """The warm base model, bare before and after the test."""
    warm_base.detach()
    yield warm_base
    warm_base.detach()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ten images of coloured squares."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(7)
    paths = []
    for number in range(10):
        squares = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = folder / f"image_{number}.png"
        Image.fromarray(np.kron(squares, np.ones((16, 16, 1), dtype=np.uint8))).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingImage, ...]:
    """Three wide images, a high one and a square one: three frames at 128 pixels."""
    folder = tmp_path_factory.mktemp("mixed")
    random = np.random.default_rng(8)
    images = []
    for number, (width, height) in enumerate([(12, 4), (8, 8), (12, 4), (4, 12), (12, 4)]):
        squares = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = folder / f"mixed_{number}.png"
        Image.fromarray(np.kron(squares, np.ones((16, 16, 1), dtype=np.uint8))).save(path)
        caption = f"ink, harbour, {number} boats, gulls"
        images.append(TrainingImage(f"s3://media/training/{path.name}", str(path), caption))
    return tuple(images)


@pytest.fixture
def make_run(tmp_path: Path, photographs: list[Path]) -> MakeRun:
    """Runs of three images and small steps; parameters and fields can be set by name."""

    def make(*, count: int = 3, **wanted: Any) -> TrainingRun:
        images = tuple(
            TrainingImage(f"s3://media/training/{path.name}", str(path), f"caption {number}")
            for number, path in enumerate(photographs[:count])
        )
        named = {field.name for field in dataclasses.fields(HyperParameters)}
        small = {"epochs": 2, "resolution": 64, "rank": 2, "alpha": 4.0, "learning_rate": 1e-3}
        parameters = HyperParameters(
            **(small | {name: value for name, value in wanted.items() if name in named})
        )
        run = TrainingRun(
            task_id="task-1",
            style_id=10,
            claim=1,
            images=images,
            parameters=parameters,
            work_folder=str(tmp_path / "work"),
        )
        fields = {name: value for name, value in wanted.items() if name not in named}
        return dataclasses.replace(run, **fields)

    return make
