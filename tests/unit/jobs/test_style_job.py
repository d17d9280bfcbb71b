"""A job goes into its record and comes back, and is written as a message again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.kinds import Claim, Fetched
from jobs.message import from_understood, to_message
from jobs.style import TrainingRun
from tests.unit.jobs.message_samples import (
    BUCKET,
    CONTRACT,
    SETTINGS,
    envelope,
    flat,
    make_settings,
    read,
    refused,
    style_kind,
)


def test_a_job_is_restored_from_its_record_independent_of_later_defaults() -> None:
    job = read(envelope(captions=["c"], tags=["t"], parameters={"rank": 4, "alpha": 8}))
    stored = json.loads(json.dumps(job.understood()))
    back = from_understood(style_kind(make_settings(epochs=3)), stored)
    assert back == job
    assert back.identity == job.identity
    del stored["hyper_parameters"]
    assert (
        from_understood(style_kind(make_settings(epochs=3)), stored).spec.hyper_parameters.epochs
        == 3
    )


@pytest.mark.parametrize("broken", [{}, {"task_id": 5}, {"images": [1]}])
def test_a_damaged_record_is_a_value_error(broken: dict[str, Any]) -> None:
    stored = read(flat()).understood()
    with pytest.raises(ValueError):
        from_understood(style_kind(SETTINGS), (stored | broken) if broken else {})


def test_a_job_written_as_a_message_parses_to_the_same_job() -> None:
    for path in CONTRACT.glob("valid/*"):
        job = read(path.read_bytes())
        again = read(to_message(style_kind(), job))
        assert again == dataclasses.replace(job, id_is_derived=False, ignored_fields=())
        assert from_understood(style_kind(SETTINGS), job.understood()).body == to_message(
            style_kind(), job
        )


@pytest.mark.parametrize(
    "address",
    [
        "\x1f",
        "",
        "photo\n.png",
        f"https://{BUCKET}.s3.amazonaws.com/photo.png?versionId=one&versionId=two",
        "both 'quotes' and \"quotes\" and a \\ \x07",
        f"s3://{BUCKET}/{'long' * 600}.png",
        f"s3://{BUCKET}/../photo.png",
    ],
)
def test_a_broken_address_is_the_same_broken_one_in_each_copy_of_the_message(address: str) -> None:
    job = read(envelope(images=[f"s3://{BUCKET}/sound.png", address], validation_images=[address]))
    copy = read(to_message(style_kind(), job))
    once_more = read(to_message(style_kind(), copy))
    for each in (copy, once_more):
        assert each.identity == job.identity
        assert each.spec.images[1].location is None
        assert each.spec.images[1].source == job.spec.images[1].source


def test_identity_depends_on_the_meaning_of_a_message_and_not_on_its_spelling() -> None:
    job = read(envelope(parameters={"epochs": 5}, tags=["a"]))
    https = f"https://{BUCKET}.s3.amazonaws.com/a.jpg?X-Amz-Date=1"
    same = flat(image_urls=[https], parameters={"epochs": 5.0}, tags=["a "], task_id="t-1")
    same |= {"created_at": "2025-01-01", "webhook_url": "https://b", "x": 1, "captions": [None]}
    assert read(same).identity == job.identity
    assert read(same, settings=make_settings(rank=4, lora_rank=4)).identity == job.identity
    for other in (
        envelope(parameters={"epochs": 6}, tags=["a"]),
        envelope(parameters={"epochs": 5}, tags=["b"]),
        envelope(parameters={"epochs": 5}, tags=["a"], style_id=11),
        envelope(parameters={"epochs": 5}, tags=["a"], captions=["x"]),
        envelope(parameters={"epochs": 5}, tags=["a"], images=["b.jpg"]),
    ):
        assert read(other).identity != job.identity


def test_images_to_judge_by_and_prompts_are_part_of_the_job_and_of_its_identity() -> None:
    job = read(envelope(validation_images=["v.jpg"], sample_prompts=["a boat"], trigger_word="ink"))
    assert from_understood(style_kind(), json.loads(json.dumps(job.understood()))) == job
    assert read(to_message(style_kind(), job)).spec.validation_images == job.spec.validation_images
    assert read(to_message(style_kind(), job)).spec.sample_prompts == job.spec.sample_prompts
    assert read(to_message(style_kind(), job)).spec.trigger_word == "ink"
    others = [
        envelope(trigger_word="ink"),
        envelope(sample_prompts=["a boat"]),
        envelope(validation_images=["v.jpg"]),
        envelope(),
    ]
    assert len({job.identity, *(read(each).identity for each in others)}) == 5


def test_the_identity_of_a_message_without_them_is_the_one_in_older_records() -> None:
    stored = read(envelope()).understood()
    del stored["validation_images"], stored["sample_prompts"], stored["trigger_word"]
    assert from_understood(style_kind(SETTINGS), stored).identity == read(envelope()).identity


@pytest.mark.parametrize(
    ("images", "epochs"), [(1, 500), (6, 500), (10, 300), (30, 100), (200, 15)]
)
def test_auto_epochs_follow_the_number_of_images(images: int, epochs: int) -> None:
    order = envelope(
        images=[f"s3://{BUCKET}/{each}.jpg" for each in range(images)],
        parameters={"epochs": "auto"},
    )
    by_message = read(order)
    assert by_message.spec.hyper_parameters.epochs == epochs
    del order["data"]["parameters"]
    assert read(order, settings=make_settings(epochs="auto")).spec.hyper_parameters.epochs == epochs


def test_auto_epochs_are_a_number_in_the_record_and_the_word_in_a_copy_of_the_message() -> None:
    job = read(envelope(parameters={"epochs": "auto"}))
    stored = job.understood()
    assert stored["hyper_parameters"]["epochs"] == 500
    assert stored["parameters"] == {"epochs": "auto"}
    restored = from_understood(style_kind(), stored)
    assert restored.spec == job.spec
    assert json.loads(restored.body)["data"]["parameters"] == {"epochs": "auto"}
    assert job.identity != read(envelope(parameters={"epochs": 500})).identity


@pytest.mark.parametrize("epochs", [0, "many", "Auto", True, 1001])
def test_other_words_and_numbers_for_epochs_are_refused(epochs: Any) -> None:
    assert refused(envelope(parameters={"epochs": epochs})).field == "data.parameters.epochs"


def test_the_run_and_its_report_know_that_the_epochs_were_found() -> None:
    claim = Claim("t-1", 1, Path("/work"), None)
    for parameters, auto in (({"epochs": "auto"}, True), ({"epochs": 500}, False)):
        spec = read(envelope(parameters=parameters)).spec
        kind = style_kind(make_settings(min_images=1))
        fetched = [Fetched(each, Path("/scratch/a.jpg")) for each in kind.inputs(spec)]
        run = kind.run(spec, fetched, claim)
        assert isinstance(run, TrainingRun) and run.epochs_auto is auto
        assert run.parameters.epochs == 500
