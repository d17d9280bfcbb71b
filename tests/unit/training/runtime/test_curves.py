"""Curves for TensorBoard, read by TensorBoard's own reader."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.layout import CURVES
from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import checkpoints, same, stop_after, trained
from training.style.families.sd15 import BaseModel

Points = dict[str, list[tuple[int, float]]]


def drawn(folder: Path) -> Points:
    """Steps and values of every curve in a folder of event files."""
    reader = EventAccumulator(str(folder))
    reader.Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in tags}


def test_a_run_draws_its_curves_and_trains_as_without(base: BaseModel, make_run: MakeRun) -> None:
    run = make_run(epochs=3, checkpoint_interval=2, learning_rate=1e-3)
    _, plain, _ = trained(base, run)
    assert not (Path(run.work_folder) / CURVES).exists(), "nobody asked for them"
    result, weights, _ = trained(base, dataclasses.replace(run, tensorboard=True))
    curves = drawn(Path(run.work_folder) / CURVES)
    assert [step for step, _ in curves["train/loss"]] == [3, 6, 9]
    assert [value for _, value in curves["train/loss"]] == pytest.approx(result.losses)
    assert [step for step, _ in curves["probe/training"]] == [0, 6, 9]
    found = [each.training for each in result.probes]
    assert [value for _, value in curves["probe/training"]] == pytest.approx(found)
    rates = [value for _, value in curves["train/learning_rate"]]
    assert len(rates) == 3 and 1e-3 >= rates[0] > rates[1] > rates[2] > 0
    assert all(value > 0 for _, value in curves["train/steps_per_second"])
    assert same(plain, weights)


def test_a_resumed_run_draws_on_from_where_it_resumes(
    base: BaseModel, make_run: MakeRun, tmp_path: Path
) -> None:
    """The worker that was there before had come further than its last checkpoint."""
    run = make_run(epochs=3, checkpoint_interval=1, tensorboard=True)
    _, _, events = trained(base, run, should_stop=stop_after(7))
    saved = next(each for each in checkpoints(events) if each.name == "epoch-0001")
    first = drawn(Path(run.work_folder) / CURVES)["train/loss"]
    assert [step for step, _ in first] == [3, 6]
    other = dataclasses.replace(
        run, work_folder=str(tmp_path / "other"), resume_from=saved.folder, claim=2
    )
    result, _, _ = trained(base, other)
    together = tmp_path / "together"
    for number, each in enumerate((run, other)):
        for file in (Path(each.work_folder) / CURVES).iterdir():
            together.mkdir(exist_ok=True)
            shutil.copy(file, together / f"claim-{number}.{file.name}")
    curves = drawn(together)
    assert [step for step, _ in curves["train/loss"]] == [3, 6, 9]
    assert [value for _, value in curves["train/loss"]] == pytest.approx(result.losses)
