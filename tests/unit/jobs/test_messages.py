"""Every rule of docs/protocol.md, section 2: messages that become jobs, and refusals by field."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import uuid
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobs.addresses import S3Location
from jobs.message import derive_task_id, from_understood
from jobs.style import MAX_CAPTION, MAX_TAG, HyperParameters
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
from utils.errors import ErrorCode, InvalidMessage, UnknownType, code_of

# --- the contract's samples


@pytest.mark.parametrize("path", sorted(CONTRACT.glob("valid/*")), ids=lambda path: path.stem)
def test_every_valid_sample_becomes_a_job(path: Path) -> None:
    settings = make_settings(image_buckets=BUCKET, aws_endpoint_url_s3=None)
    job = read(path.read_bytes(), settings=settings)
    assert job.spec.style_id in (10, 11, 123, 124)
    assert {image.location and image.location.bucket for image in job.spec.images} == {BUCKET}
    assert len(job.spec.images) == len(job.spec.captions) > 0


@pytest.mark.parametrize(
    ("name", "field", "code"),
    [
        ("epochs_out_of_range.json", "data.parameters.epochs", "INVALID_MESSAGE"),
        ("foreign_bucket.json", "image_urls.0", "INVALID_MESSAGE"),
        ("image_is_a_local_path.json", "image_urls.0", "INVALID_MESSAGE"),
        ("no_images.json", "image_urls", "INVALID_MESSAGE"),
        ("no_style_id.json", "style_id", "INVALID_MESSAGE"),
        ("not_an_object.json", "body", "INVALID_MESSAGE"),
        ("not_json.txt", "body", "INVALID_MESSAGE"),
        ("other_type.json", "type", "UNKNOWN_TYPE"),
        ("style_id_is_text.json", "style_id", "INVALID_MESSAGE"),
        ("task_id_is_a_path.json", "task_id", "INVALID_MESSAGE"),
        ("unknown_parameter.json", "data.parameters.epoch", "INVALID_MESSAGE"),
    ],
)
def test_every_invalid_sample_is_refused_by_the_name_of_its_field(
    name: str, field: str, code: str
) -> None:
    error = refused((CONTRACT / "invalid" / name).read_bytes())
    assert error.field == field
    assert str(error).startswith(f"{field}: ")
    assert code_of(error) == ErrorCode(code)


def test_no_sample_of_the_contract_is_left_out() -> None:
    assert len(list(CONTRACT.glob("invalid/*"))) == 11
    assert len(list(CONTRACT.glob("valid/*"))) == 6


# --- the job


def test_every_field_of_an_envelope_is_understood() -> None:
    message = envelope(
        images=["s3://stylelicense-media/a.jpg", "gs://second-bucket/b c.png"],
        captions=["a harbour at dawn", None],
        tags=["watercolor", "portrait"],
        parameters={"epochs": 200, "learning_rate": 0.001, "rank": 8},
    ) | {"webhook_url": "https://x.example/y", "created_at": "2025-01-20T10:00:00.000Z"}
    job = read(message)
    assert job.task_id == "t-1"
    assert not job.id_is_derived
    assert [image.location for image in job.spec.images] == [
        S3Location(BUCKET, "a.jpg"),
        S3Location("second-bucket", "b c.png"),
    ]
    assert job.spec.images[1].source == "gs://second-bucket/b c.png"
    assert job.spec.captions == ("a harbour at dawn", None)
    assert job.spec.tags == ("watercolor", "portrait")
    assert job.spec.parameters == {"epochs": 200, "learning_rate": 0.001, "rank": 8}
    assert job.spec.hyper_parameters == HyperParameters(epochs=200, learning_rate=0.001, rank=8)
    assert job.webhook_url == "https://x.example/y"
    assert job.created_at == "2025-01-20T10:00:00.000Z"
    assert not job.ignored_fields
    assert job.body == json.dumps(message).encode()


def test_defaults_come_from_the_settings() -> None:
    assert read(flat()).spec.hyper_parameters.epochs == 100
    job = read(flat(parameters={"rank": 4}), settings=make_settings(epochs=7))
    assert (job.spec.hyper_parameters.epochs, job.spec.hyper_parameters.rank) == (7, 4)


def test_null_counts_as_absent() -> None:
    names = ("task_id", "type", "captions", "tags", "parameters", "webhook_url", "data")
    job = read(flat(**dict.fromkeys(names), parameters_={"x": 1}) | {"created_at": None})
    assert job == dataclasses.replace(
        read(flat()), task_id=job.task_id, ignored_fields=("parameters_",)
    )
    assert not read(flat(parameters={"epochs": None})).spec.parameters
    assert read(flat(captions=[])).spec.captions == (None,)


def test_a_message_with_data_is_the_envelope_and_order_fields_outside_it_are_ignored() -> None:
    job = read(envelope() | {"style_id": 99, "image_urls": ["s3://elsewhere/x.jpg"]})
    assert job.spec.style_id == 10
    assert job.ignored_fields == ("style_id", "image_urls")


def test_each_dialect_also_accepts_the_images_under_the_other_name() -> None:
    assert len(read({"style_id": 1, "images": ["a.jpg"]}).spec.images) == 1
    assert refused({"style_id": 1, "images": [3]}).field == "images.0"
    message = envelope()
    message["data"]["image_urls"] = message["data"].pop("images")
    assert len(read(message).spec.images) == 1


def test_an_absent_id_is_the_amqp_message_id_and_then_the_bodys_uuid() -> None:
    assert read(flat(), message_id="m-7").task_id == "m-7"
    assert not read(flat(), message_id="m-7").id_is_derived
    assert read(flat(task_id="own"), message_id="m-7").task_id == "own"
    for useless in (None, "", "not an id", "x" * 129):
        job = read(flat(), message_id=useless)
        assert job.id_is_derived
        assert job.task_id == derive_task_id(job.body)
    assert uuid.UUID(job.task_id).version == 5
    assert read(flat(style_id=11)).task_id != job.task_id


def test_captions_and_tags_are_one_line_each() -> None:
    job = read(flat(captions=[" a\nred\x00\ud800house "], tags=["  oil ", "", "\n"]))
    assert job.spec.captions == ("a red house",)
    assert job.spec.tags == ("oil",)
    assert read(flat(captions=[""])).spec.captions == ("",)


def test_long_captions_and_tags_are_cut_and_do_not_fail_the_job() -> None:
    job = read(flat(captions=["c" * 1_000_000], tags=["t" * 500]))
    assert job.spec.captions == ("c" * MAX_CAPTION,)
    assert job.spec.tags == ("t" * MAX_TAG,)


def test_fields_without_an_effect_are_named_once_in_a_log_line() -> None:
    message = envelope(prompt="x") | {"future": True, "created_at": 7, "webhook_url": 5}
    with capture_logs() as lines:
        job = read(message)
    assert job.ignored_fields == ("future", "created_at", "webhook_url", "data.prompt")
    assert job.webhook_url is None
    assert [line["fields"] for line in lines] == [list(job.ignored_fields)]


def test_dora_is_refused_with_the_reason() -> None:
    error = refused(json.dumps(flat(parameters={"use_dora": True})).encode())
    assert error.field == "parameters.use_dora"
    assert "is not offered: readers of kohya files" in str(error)


def test_a_thousand_unknown_fields_do_not_flood_the_log() -> None:
    assert len(read(flat() | {f"f{n}": n for n in range(1000)}).ignored_fields) == 20


def test_the_callback_address_stands_in_for_the_webhook_address() -> None:
    assert read(flat(callback_url="https://a/")).webhook_url == "https://a/"
    both = flat(callback_url="https://a/", webhook_url="https://b/")
    assert read(both).webhook_url == "https://b/"


# --- refusals


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"style_id": 0}, "style_id", "at least 1"),
        ({"style_id": -3}, "style_id", "at least 1 (it is -3)"),
        ({"style_id": True}, "style_id", "a whole number"),
        ({"style_id": "10"}, "style_id", "a whole number"),
        ({"style_id": 10.5}, "style_id", "a whole number (it is 10.5)"),
        ({"style_id": 2**63}, "style_id", "at most"),
        ({"style_id": None}, "style_id", "is required"),
        ({"image_urls": None}, "image_urls", "is required"),
        ({"image_urls": "a.jpg"}, "image_urls", "a list"),
        ({"image_urls": []}, "image_urls", "must have at least 1 entry and has none"),
        ({"image_urls": ["a.jpg"] * 201}, "image_urls", "at most 200 entries and has 201"),
        ({"image_urls": [None]}, "image_urls.0", "is empty"),
        ({"image_urls": [{"url": "a.jpg"}]}, "image_urls.0", "be text"),
        ({"captions": ["a", "b"]}, "captions", "has 2 entries for 1 image"),
        ({"captions": [5]}, "captions.0", "be text"),
        ({"captions": "a"}, "captions", "a list"),
        ({"tags": ["t"] * 51}, "tags", "at most 50 entries and has 51"),
        ({"tags": "oil"}, "tags", "a list"),
        ({"parameters": []}, "parameters", "an object"),
        ({"parameters": {"epochs": 0}}, "parameters.epochs", "at least 1"),
        ({"parameters": {"epochs": True}}, "parameters.epochs", "a whole number"),
        ({"parameters": {"epochs": "5"}}, "parameters.epochs", "a whole number"),
        ({"parameters": {"epochs": 2.5}}, "parameters.epochs", "a whole number"),
        ({"parameters": {"learning_rate": "0.1"}}, "parameters.learning_rate", "a number"),
        ({"parameters": {"learning_rate": 1}}, "parameters.learning_rate", "at most 0.01"),
        ({"parameters": {"dropout": False}}, "parameters.dropout", "a number"),
        ({"parameters": {"resolution": 500}}, "parameters.resolution", "a multiple of 64"),
        ({"parameters": {"lr_schedule": "warm"}}, "parameters.lr_schedule", "'cosine'"),
        ({"parameters": {"seed": 2**31}}, "parameters.seed", "at most"),
        ({"parameters": {"zzz": 1}}, "parameters.zzz", "the parameters are epochs, learning_rate"),
        ({"parameters": {"\ud800": 1}}, "parameters", "Unicode"),
        ({"task_id": ""}, "task_id", "1 to 128"),
        ({"task_id": 5}, "task_id", "1 to 128"),
        ({"task_id": "a b"}, "task_id", "1 to 128"),
        ({"task_id": "a\n"}, "task_id", "1 to 128"),
        ({"task_id": "x" * 129}, "task_id", "1 to 128"),
        ({"data": "x"}, "data", "an object"),
        ({"data": []}, "data", "an object"),
        ({"data": {}}, "data.style_id", "is required"),
    ],
)
def test_a_broken_rule_is_named_with_its_field(
    changes: dict[str, Any], field: str, words: str
) -> None:
    error = refused(flat(**changes))
    assert error.field == field
    assert words in str(error)


def test_an_optimizer_that_this_worker_lacks_is_refused_by_its_library_s_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = refused(flat(parameters={"optimizer": "prodigy"}))
    assert error.field == "parameters.optimizer"
    assert "the library prodigyopt that it needs is not installed" in str(error)


def test_a_misspelled_parameter_gets_a_suggestion() -> None:
    error = refused(envelope(parameters={"epoch": 5, "learningrate": 1e-4}))
    assert str(error) == (
        "data.parameters.epoch: is not a parameter; did you mean epochs?; "
        "data.parameters.learningrate: is not a parameter; did you mean learning_rate?"
    )


def test_every_hyper_parameter_can_be_set_within_its_limits_and_not_beyond(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # all that is optional
    for field in dataclasses.fields(HyperParameters):
        limits = field.metadata
        good: tuple[Any, ...] = limits["choices"]
        bad: tuple[Any, ...] = ("", 5)
        if isinstance(field.default, bool):
            good, bad = (True, False), (1, "true")
        elif not good:
            good = (limits["low"], limits["high"])
            bad = (limits["low"] - 1, limits["high"] + 1, str(limits["low"]))
        for value in good:
            job = read(flat(parameters={field.name: value}))
            assert getattr(job.spec.hyper_parameters, field.name) == value
        for value in bad:
            error = refused(flat(parameters={field.name: value}))
            assert error.field == f"parameters.{field.name}"


def test_a_whole_number_may_be_written_with_a_point() -> None:
    job = read(b'{"style_id": 1e1, "images": ["a"], "parameters": {"epochs": 200.0, "alpha": 8}}')
    assert (
        job.spec.style_id,
        job.spec.hyper_parameters.epochs,
        job.spec.hyper_parameters.alpha,
    ) == (10, 200, 8)
    assert isinstance(job.spec.hyper_parameters.epochs, int)
    assert isinstance(job.spec.hyper_parameters.alpha, float)


def test_a_refusal_has_the_values_that_can_be_read_safely() -> None:
    message = envelope(style_id=7, images=[]) | {"webhook_url": "https://a/b"}
    error = refused(message)
    assert (error.task_id, error.subject, error.webhook_url) == ("t-1", "7", "https://a/b")
    error = refused(flat(style_id=True, task_id="../x", webhook_url=["https://a"]))
    assert (error.task_id, error.subject, error.webhook_url) == (None, None, None)
    assert refused(flat(images=[], image_urls=[]), message_id="m-1").task_id == "m-1"
    assert refused(b"[]", message_id="m-1").task_id is None


@pytest.mark.parametrize("kind", ["image_generation", "", 5, {"a": 1}, ["model_training"], False])
def test_the_refusal_of_a_message_for_another_worker_names_no_style(kind: Any) -> None:
    error = refused(envelope(style_id=123, images=[]) | {"type": kind})
    assert isinstance(error, UnknownType)
    assert (error.field, error.task_id, error.subject) == ("type", "t-1", None)


def test_a_field_that_occurs_twice_is_refused_and_not_used() -> None:
    error = refused(b'{"style_id": 1, "style_id": 2, "task_id": "t", "images": ["a.jpg"]}')
    assert (error.field, error.subject, error.task_id) == ("style_id", None, "t")
    error = refused(b'{"type": "image_generation", "type": "model_training", "style_id": 1}')
    assert (error.field, error.subject) == ("type", None)
    error = refused(b'{"style_id": 1, "images": ["a.jpg"], "parameters": {"rank": 4, "rank": 8}}')
    assert (error.field, error.subject) == ("rank", "1")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{",
        b"\xff\xfe{\x00}\x00",
        b'{"style_id": NaN}',
        b'{"style_id": -Infinity}',
        b'{"style_id": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
        b'{"data":' * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"style_id": 1, "image_urls": ["' + b"x" * 10_000_000 + b'"]}',
        b'{"\x00": 1}',
        b"\xed\xa0\x80",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_any_bytes_raise_nothing_else(body: bytes) -> None:
    error = refused(body)
    assert error.field == "body"
    assert len(str(error)) < 500


def test_a_huge_number_is_reported_as_a_wrong_number() -> None:
    body = b'{"style_id": ' + b"9" * 399 + b', "images": ["a"], "parameters": {"alpha": 1e999}}'
    assert refused(body).field == "style_id"
    assert len(str(refused(body))) < 300
    assert refused(flat(parameters={"alpha": 10**390})).field == "parameters.alpha"


def test_control_characters_and_surrogates_in_names_are_shown_escaped() -> None:
    names = read(flat() | {"a\x1b[31m": 1, "\ud800": 2, "n" * 500: 3}).ignored_fields
    assert names[:2] == ("a\\x1b[31m", "\\ud800")
    assert len(names[2]) == 80


def test_mutilated_messages_become_a_job_or_a_refusal_and_nothing_else() -> None:
    rng = random.Random(7)
    samples = [path.read_bytes() for path in CONTRACT.glob("**/*.json")]
    values: list[Any] = [
        None,
        True,
        -1,
        0.5,
        1e308,
        "",
        "\ud800",
        "\x00",
        [],
        {},
        [[]],
        "s3://",
        "x" * 3000,
    ]
    for _ in range(3000):
        body = bytearray(rng.choice(samples))
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(body))
            body[at : at + rng.randrange(4)] = rng.choice(
                [bytes([rng.randrange(256)]), json.dumps(rng.choice(values)).encode(), b""]
            )
        try:
            job = read(bytes(body), message_id=rng.choice([None, "m", "\ud800"]))
        except InvalidMessage as error:
            assert error.field
            str(error).encode()
        else:
            assert from_understood(style_kind(SETTINGS), job.understood()) == job


# --- validation images and sample prompts


def test_validation_images_prompts_and_trigger_word_are_understood_in_both_dialects() -> None:
    more = {
        "validation_images": [f"s3://{BUCKET}/v.jpg", None],
        "sample_prompts": ["a\nboat", ""],
        "trigger_word": " ink\nstyle ",
        "parameters": {"shuffle_tags": True},
    }
    for job in (read(envelope(**more)), read(flat(**more))):
        assert [image.location for image in job.spec.validation_images] == [
            S3Location(BUCKET, "v.jpg"),
            None,
        ]
        assert job.spec.validation_images[1].problem
        assert job.spec.sample_prompts == ("a boat",)
        assert job.spec.trigger_word == "ink style"
        assert job.spec.hyper_parameters.shuffle_tags
        assert not job.ignored_fields
    assert read(flat(sample_prompts=["p" * 501])).spec.sample_prompts == ("p" * 500,)
    assert not read(flat(validation_images=["", "s3://x"])).spec.validation_images[0].location
    plain = read(envelope())
    assert (plain.spec.validation_images, plain.spec.sample_prompts, plain.spec.trigger_word) == (
        (),
        (),
        "",
    )
    assert not plain.spec.hyper_parameters.shuffle_tags


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"validation_images": "a.jpg"}, "validation_images"),
        ({"validation_images": ["a.jpg"] * 201}, "validation_images"),
        ({"validation_images": ["s3://somebody-elses/a.jpg"]}, "validation_images.0"),
        ({"validation_images": ["file:///etc/passwd"]}, "validation_images.0"),
        ({"sample_prompts": ["a"] * 5}, "sample_prompts"),
        ({"sample_prompts": [5]}, "sample_prompts.0"),
        ({"trigger_word": 5}, "trigger_word"),
        ({"trigger_word": "x" * 65}, "trigger_word"),
        ({"trigger_word": "ink, style"}, "trigger_word"),
        ({"parameters": {"deliver": "first"}}, "parameters.deliver"),
        ({"parameters": {"shuffle_tags": 1}}, "parameters.shuffle_tags"),
        ({"parameters": {"shuffle_tags": "true"}}, "parameters.shuffle_tags"),
    ],
)
def test_validation_images_and_prompts_have_the_limits_of_images_and_their_own(
    wrong: dict[str, Any], field: str
) -> None:
    assert refused(envelope(**wrong)).field == f"data.{field}"
    assert refused(flat(**wrong)).field == field
