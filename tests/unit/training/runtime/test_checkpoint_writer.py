"""Checkpoints on their way to the disk: during training, one at a time, none reported too early."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.style import TrainingRun
from tests.unit.training.conftest import MakeRun
from training.style import checkpoint
from training.style.checkpoint import Checkpoint
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from training.style.trainer import LoRATrainer
from utils.events import CheckpointSaved, Event, Progress


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that writes nothing before this is set."""
    opened = threading.Event()
    save = checkpoint.save

    def slow(folder: Path, captured: Checkpoint) -> None:
        assert opened.wait(60)
        save(folder, captured)

    monkeypatch.setattr(checkpoint, "save", slow)
    return opened


def train(base: BaseModel, run: TrainingRun, hear: Callable[[Event], None]) -> None:
    try:
        LoRATrainer(run, base, prepare(run, base), emit=hear).train()
    finally:
        base.detach()


def test_training_goes_on_while_the_disk_writes_and_no_checkpoint_is_reported_before_it_is_written(
    base: BaseModel, make_run: MakeRun, gate: threading.Event
) -> None:
    """The disk waits for the step after the checkpoint: were it the other way round, for ever."""
    told: list[Event] = []

    def hear(event: Event) -> None:
        told.append(event)
        if isinstance(event, Progress) and event.done > 3 and not gate.is_set():
            assert not any(isinstance(each, CheckpointSaved) for each in told)
            gate.set()

    run = make_run(count=3, epochs=2, checkpoint_interval=1)
    train(base, run, hear)
    saved = [each for each in told if isinstance(each, CheckpointSaved)]
    assert [each.name for each in saved] == ["epoch-0001", "epoch-0002"]
    for each in saved:
        assert checkpoint.load(Path(each.folder)).state.step == each.step


def test_a_disk_that_fails_ends_the_run_and_reports_no_checkpoint(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    told: list[Event] = []
    with pytest.raises(OSError, match="No space left"):
        train(base, make_run(epochs=3, checkpoint_interval=1), told.append)
    assert not any(isinstance(each, CheckpointSaved) for each in told)
