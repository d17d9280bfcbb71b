"""The report: the order, the images used and the course of the training, as plain JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from jobs.layout import MODEL_FILES, STYLE_FILES
from jobs.style import HyperParameters, TrainingImage, TrainingRun
from training.style.dataset import CAPTION_IGNORED
from training.style.examples import Dataset, ImageReport
from training.style.families.sd15 import BaseModel
from training.style.results.report import (
    MOST_REASONS,
    TrainingResult,
    build_report,
    summary,
    write_report,
)

ENTRIES = (
    ImageReport("s3://media/1/image_0.jpg", "used", (), 640, 480, "바다의 새벽"),
    ImageReport("s3://media/1/image_1.png", "warned", ("It is small.",), 300, 200, ""),
    ImageReport("s3://media/1/image_2.jpg", "left_out", ("It is damaged.",), None, None, "a cat"),
)
DATASET = Dataset(ENTRIES, (), {}, {}, warnings=("Few images.", "Twice."))
ASKED = HyperParameters(epochs=3, batch_size=4, resolution=64)
RUN = TrainingRun(
    task_id="task-1",
    style_id=10,
    claim=2,
    images=tuple(TrainingImage(entry.source, "/scratch/secret/image") for entry in ENTRIES),
    parameters=ASKED,
    work_folder="/scratch/secret",
    resume_from="/scratch/secret/checkpoint",
)
RESULT = TrainingResult(
    epochs=3,
    steps=6,
    loss=0.25,
    losses=(0.5, math.nan, 0.25),
    seconds=12.34567,
    steps_per_second=0.5,
    peak_memory_bytes=1_000_000,
    skipped_steps=1,
    resumed_from=1,
    stopped=None,
    parameters=dataclasses.replace(ASKED, batch_size=2, gradient_accumulation_steps=2),
    warnings=("Twice.", "The batch was halved."),
)


@pytest.fixture(name="report")
def fixture_report(base: BaseModel) -> dict[str, Any]:
    """The report of the run above."""
    return build_report(RUN, base, DATASET, RESULT)


def test_every_image_that_was_asked_for_has_its_entry_in_order(report: dict[str, Any]) -> None:
    assert [image["source"] for image in report["pictures"]] == [e.source for e in ENTRIES]
    assert report["pictures"][2] == {
        "source": "s3://media/1/image_2.jpg",
        "status": "left_out",
        "reasons": ["It is damaged."],
        "width": None,
        "height": None,
        "caption": "a cat",
        "decoded": None,
        "trained_as": None,
    }
    counts = ("pictures_asked", "pictures_used", "pictures_left_out")
    assert [report[name] for name in counts] == [3, 2, 1]


def test_the_hyper_parameters_in_force_stand_next_to_those_asked_for(
    report: dict[str, Any],
) -> None:
    assert report["hyperparameters"]["batch_size"] == 2
    assert report["hyperparameters_asked"]["batch_size"] == 4
    assert report["hyperparameters"].keys() == {f.name for f in dataclasses.fields(ASKED)}


def test_epochs_that_were_found_are_asked_for_as_auto(base: BaseModel) -> None:
    report = build_report(dataclasses.replace(RUN, epochs_auto=True), base, DATASET, RESULT)
    assert report["hyperparameters_asked"]["epochs"] == "auto"
    assert report["hyperparameters"]["epochs"] == RESULT.parameters.epochs


def test_the_report_has_all_that_the_protocol_lists(
    report: dict[str, Any], base: BaseModel
) -> None:
    expected = {
        "task_id": "task-1",
        "style_id": 10,
        "epochs": 3,
        "steps": 6,
        "skipped_steps": 1,
        "loss": 0.25,
        "seconds": 12.346,
        "steps_per_second": 0.5,
        "peak_memory_bytes": 1_000_000,
        "resumed_from": 1,
        "base_model": {"name": base.name, "hash": base.hash, "dtype": "float32"},
    }
    assert expected.items() <= report.items()
    assert report["versions"].keys() >= {
        *("torch", "diffusers", "transformers", "peft", "accelerate", "python", "device")
    }
    assert all(report["versions"].values())


def test_each_warning_is_listed_once_from_any_source(
    report: dict[str, Any], base: BaseModel
) -> None:
    own = ["Few images.", "Twice.", "The batch was halved."]
    assert report["warnings"] == [*base.warnings, *own]


def test_a_training_on_a_stand_in_is_labelled_so(report: dict[str, Any]) -> None:
    assert any("stand-in" in each for each in report["machine_warnings"])


def test_the_file_is_strict_json_with_the_artists_own_letters_and_no_local_path(
    report: dict[str, Any], tmp_path: Path
) -> None:
    path = write_report(report, tmp_path)
    text = path.read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse) == report
    assert report["losses"] == [0.5, None, 0.25]
    assert "바다의 새벽" in text
    assert "/scratch" not in text
    assert [file.name for file in tmp_path.iterdir()] == ["training_report.json"]


def test_the_summary_is_brief_with_the_reasons_for_images_that_were_left_out(
    report: dict[str, Any], base: BaseModel
) -> None:
    assert summary(report) == {
        "pictures_used": 2,
        "pictures_left_out": 1,
        "steps": 6,
        "seconds": 12.346,
        "steps_per_second": 0.5,
        "resumed_from": 1,
        "best_epoch": None,
        "delivered_epoch": None,
        "base_model": base.name,
        "warnings": 3 + len(base.warnings),
        "left_out": [{"reason": "It is damaged.", "pictures": 1}],
        "captions_ignored": [],
    }


def test_the_summary_has_the_reasons_for_ignored_captions_the_most_frequent_reason_first(
    report: dict[str, Any],
) -> None:
    entry = report["pictures"][0]
    reasons = ["it is binary"] + 12 * ["it is not UTF-8"] + [f"reason {n}" for n in range(12)]
    images = [
        entry | {"status": "warned", "reasons": ["looks dark", CAPTION_IGNORED + reason]}
        for reason in reasons
    ]
    found = summary(report | {"pictures": images})
    assert found["captions_ignored"][:2] == [
        {"reason": "it is not UTF-8", "pictures": 12},
        {"reason": "it is binary", "pictures": 1},
    ]
    assert len(found["captions_ignored"]) == MOST_REASONS and found["left_out"] == []


def test_the_model_itself_is_published_last_and_nothing_twice() -> None:
    assert STYLE_FILES[-1] == "lora_weights.safetensors"
    assert len(STYLE_FILES) == len(set(STYLE_FILES)) == 8
    assert set(MODEL_FILES) < set(STYLE_FILES)
