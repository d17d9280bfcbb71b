"""The style's runner without a process around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from jobs.kinds import TrainerOptions
from tests.unit.training.conftest import MakeRun
from training.style import recovery
from training.style.families.sd15 import BaseModel
from training.style.work import StyleWork
from utils.errors import (
    GpuBroken,
    GpuOutOfMemory,
    LowQualityData,
    StopReason,
    TrainingFailed,
)
from utils.events import BaseModelReady, Finished

Told = list[Any]


@pytest.fixture
def told() -> Told:
    """The events that the work has emitted."""
    return []


@pytest.fixture
def work(
    base: BaseModel, options: TrainerOptions, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StyleWork]:
    """The runner with the base model of all tests."""
    monkeypatch.setattr(BaseModel, "load", lambda _: base)
    yield StyleWork(options)
    monkeypatch.undo()
    base.detach()
    base.drifted = False


def not_stopped() -> None:
    """No stop is asked for."""


def fail_in(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, error: Exception) -> None:
    """Make a function raise an error."""

    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(place, name, failing)


def test_the_base_model_is_loaded_once_and_reported_and_again_after_a_release(
    work: StyleWork, told: Told
) -> None:
    work.load(told.append)
    work.load(told.append)
    work.release(told.append)
    work.release(told.append)
    work.load(told.append)
    assert [each.ready for each in told] == [True, False, True]
    assert not work.on_gpu


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), GpuBroken),
        (torch.OutOfMemoryError("CUDA out of memory."), GpuOutOfMemory),
        (LowQualityData("too few"), LowQualityData),
        (KeyError("other"), KeyError),
    ],
)
def test_errors_of_the_device_are_raised_as_ours_and_others_as_they_are(
    work: StyleWork,
    make_run: MakeRun,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    raised: type[Exception],
) -> None:
    fail_in(monkeypatch, recovery, "train", error)
    with pytest.raises(raised):
        work.run(make_run(epochs=1), told.append, not_stopped)
    assert work.is_usable


def test_a_stop_before_the_first_step_is_an_ending_without_files(
    work: StyleWork, make_run: MakeRun, told: Told
) -> None:
    finished = work.run(make_run(epochs=1), told.append, lambda: StopReason.SHUTDOWN)
    assert (finished.stopped, finished.folder, finished.done) == (StopReason.SHUTDOWN, "", 0)


def test_a_failed_run_whose_base_cannot_be_restored_makes_the_process_unusable(
    work: StyleWork, make_run: MakeRun, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in(monkeypatch, recovery, "train", LowQualityData("too few"))
    fail_in(monkeypatch, BaseModel, "detach", TrainingFailed("The weights changed."))
    with pytest.raises(LowQualityData):
        work.run(make_run(epochs=1), told.append, not_stopped)
    assert not work.is_usable


def test_a_finished_run_whose_base_cannot_be_restored_fails(
    work: StyleWork, make_run: MakeRun, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in(monkeypatch, BaseModel, "detach", TrainingFailed("The weights changed."))
    with pytest.raises(TrainingFailed):
        work.run(make_run(epochs=1), told.append, lambda: StopReason.SHUTDOWN)
    assert not work.is_usable


@pytest.mark.parametrize("reason", ["out of memory", "drifted"])
def test_a_finished_run_stays_finished_where_loading_the_base_again_helps(
    work: StyleWork,
    base: BaseModel,
    make_run: MakeRun,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    if reason == "drifted":
        monkeypatch.setattr(base, "drifted", True)
    else:
        fail_in(monkeypatch, BaseModel, "detach", torch.OutOfMemoryError("CUDA out of memory."))
    ending = work.run(make_run(epochs=1), told.append, lambda: StopReason.SHUTDOWN)
    assert isinstance(ending, Finished) and work.is_usable
    assert told[-1] == BaseModelReady(False)
