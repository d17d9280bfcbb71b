"""Orders of language models: accepted, refused by name, and reported in webhooks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.kinds import Claim, Fetched, JobKind
from jobs.llm import LlmKind, LlmOptions, LlmParameters, LlmSpec
from jobs.message import Job, parse, to_message
from tests.unit.jobs.message_samples import BUCKET, CONTRACT, make_settings
from utils.errors import InvalidMessage, TrainingDataUnavailable, code_of
from utils.events import Finished, Progress, Stage

SAMPLES = CONTRACT / "llm"
SETTINGS = make_settings(image_buckets=BUCKET, aws_endpoint_url_s3=None, kinds="style,llm")
KINDS = SETTINGS.kinds()


def llm_kind() -> JobKind:
    """The kind with the defaults of the settings."""
    return KINDS.of("llm")


def order(**data: Any) -> bytes:
    """The smallest valid order with these fields in it."""
    message = json.loads((SAMPLES / "valid" / "smallest.json").read_bytes())
    message["data"] |= data
    return json.dumps(message).encode()


def read(body: bytes) -> Job:
    """The job of a message."""
    return parse(body, message_id=None, kinds=KINDS)


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("valid/*")), ids=lambda path: path.stem)
def test_every_valid_sample_becomes_a_job_and_comes_back_from_its_record(path: Path) -> None:
    job = read(path.read_bytes())
    kind = llm_kind()
    assert (job.kind, job.spec.subject) == ("llm", "reply-bot")
    values = json.loads(json.dumps(dataclasses.asdict(job.spec)))
    assert kind.restored(values) == job.spec
    assert read(to_message(kind, job)).spec.identity == job.spec.identity


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("base_model_is_a_path", "data.base_model"),
        ("base_model_is_not_allowed", "data.base_model"),
        ("dora", "data.parameters.use_dora"),
        ("foreign_bucket", "data.training_file"),
        ("no_training_file", "data.training_file"),
        ("rank_out_of_range", "data.parameters.rank"),
        ("subject_is_a_path", "data.subject"),
        ("target_modules_are_a_pattern", "data.parameters.target_modules"),
        ("template_date_is_none", "data.template_date"),
        ("unknown_parameter", "data.parameters.lora_rank"),
    ],
)
def test_every_invalid_sample_is_refused_by_the_name_of_its_field(name: str, field: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        read((SAMPLES / "invalid" / f"{name}.json").read_bytes())
    assert caught.value.field == field
    assert len(list(SAMPLES.glob("invalid/*"))) == 10


def test_the_date_is_fixed_when_the_order_is_read_and_is_no_part_of_its_identity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    specs = []
    for day in ("2026-01-01", "2026-01-03"):
        monkeypatch.setattr("jobs.llm._date", lambda given, _, day=day: given or day)
        specs.append(read(order()).spec)
    assert [spec.template_date for spec in specs] == ["2026-01-01", "2026-01-03"]
    assert specs[0].identity == specs[1].identity
    given = read(order(template_date="2026-02-02")).spec
    assert given.identity != specs[0].identity


@pytest.mark.parametrize(
    ("name", "source"),
    [("a/b", "a/b"), ("a/c", "a/c"), ("tiny", "/models/tiny"), ("x/y", None), ("a", None)],
)
def test_the_allow_list_has_patterns_and_folders(name: str, source: str | None) -> None:
    options = LlmOptions(base_models="a/*, tiny=/models/tiny")
    assert options.source_of(name) == source


def test_a_mapped_folder_must_be_absolute() -> None:
    with pytest.raises(ValueError, match="absolute"):
        LlmOptions(base_models="tiny=models/tiny")


def fetched(spec: LlmSpec, path: Path | None) -> tuple[Fetched, ...]:
    """The files of an order, fetched or not."""
    problem = None if path else "could not be found in storage"
    return tuple(Fetched(each, path, problem=problem) for each in llm_kind().inputs(spec))


def test_a_run_names_its_files_and_its_base(tmp_path: Path) -> None:
    spec = read(order(validation_file=f"s3://{BUCKET}/v.jsonl")).spec
    run: Any = llm_kind().run(
        spec, fetched(spec, tmp_path / "f"), Claim("llm-1", 2, tmp_path, None)
    )
    assert run.training_file == run.validation_file == str(tmp_path / "f")
    assert (run.base_model, run.base_source) == (spec.base_model, spec.base_model)
    assert run.template_date == spec.template_date


def test_a_missing_file_ends_the_job_with_its_name(tmp_path: Path) -> None:
    spec = read(order()).spec
    with pytest.raises(TrainingDataUnavailable, match="train.jsonl could not be found") as caught:
        llm_kind().run(spec, fetched(spec, None), Claim("llm-1", 1, tmp_path, None))
    assert str(code_of(caught.value)) == "TRAINING_DATA_UNAVAILABLE"


def test_the_webhooks_have_steps_losses_and_the_verdict() -> None:
    kind, spec = llm_kind(), read(order()).spec
    assert kind.identity_fields("reply-bot") == {"kind": "llm", "subject": "reply-bot"}
    progress = Progress("t", Stage.TRAINING, 5, 20, per_second=1.0, facts={"loss": 2.5})
    assert kind.progress(progress) == {
        "step": 5,
        "total_steps": 20,
        "progress_percent": 25,
        "estimated_seconds": 15,
        "stage": "training",
        "loss": 2.5,
    }
    summary = {"perplexity_before": 9.0, "perplexity_after": 3.0, "verdict": "fell"}
    finished = Finished("t", "", (), 20, 1.0, summary=summary)
    told = kind.complete(spec, finished, "s3://m/models/llm/a/b/adapter_model.safetensors")
    assert told["training_metric"]["perplexity_after"] == 3.0
    assert told["training_metric"]["report_url"] == "s3://m/models/llm/a/b/training_report.html"


def test_the_settings_of_the_documents_work_without_a_prefix_when_the_kind_is_first() -> None:
    given = {
        "lora_r": "8",
        "lora_target_modules": "q_proj,v_proj",
        "num_train_epochs": "5",
        "use_4bit": "false",
        "max_seq_length": "1024",
        "batch_size": "2",
        "default_base_model": "meta-llama/Llama-2-7b-chat-hf",
    }
    settings = make_settings(kinds="llm", **given)
    parameters: LlmParameters = settings.parameters["llm"]
    assert (parameters.rank, parameters.epochs, parameters.max_length) == (8, 5.0, 1024)
    assert parameters.batch_size == 2 and settings.parameters["style"].batch_size == 1
    assert settings.options["llm"].use_4bit is False
    assert settings.trainer_options().runner == LlmKind.runner


def test_the_default_base_is_used_when_an_order_names_none() -> None:
    settings = make_settings(
        kinds="llm",
        default_base_model="TinyLlama/t",
        image_buckets=BUCKET,
        aws_endpoint_url_s3=None,
    )
    message = json.loads(order())
    del message["data"]["base_model"]
    job = parse(json.dumps(message).encode(), message_id=None, kinds=settings.kinds())
    assert job.spec.base_model == "TinyLlama/t"
