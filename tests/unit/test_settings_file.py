"""`--config FILE`: it is below the environment, problems are named, no error shows a secret."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import config
import main
from config import Settings, setting_names
from utils.errors import ConfigurationError
from utils.settings.names import OLD_NAMES

TOKEN = "a-token-that-is-long-enough-for-the-rule"
TOML = f"""
# A comment, as TOML has them.
AWS_STORAGE_BUCKET_NAME = "media"
backend_api_url = "https://backend.example"
INTERNAL_API_TOKEN = "{TOKEN}"
RABBITMQ_HOST = ["one.example", "two.example"]
RETRY_DELAYS_SECONDS = "1,2"
EPOCHS = 7
LEARNING_RATE = 2e-4
ALLOW_CPU = true
MODEL_BUCKET_NAME = ""
"""


@pytest.fixture(autouse=True)
def _no_settings_but_the_test_s_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in tuple(os.environ):
        if name.upper() in setting_names() | OLD_NAMES.keys():
            monkeypatch.delenv(name)


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text(TOML, encoding="utf-8")
    return path


def test_a_toml_file_is_enough(file: Path) -> None:
    settings = config.load(file=file)
    style = settings.parameters["style"]
    assert settings.broker.rabbitmq_host == ("one.example", "two.example")
    assert (style.epochs, style.learning_rate, settings.trainer.allow_cpu) == (7, 2e-4, True)
    assert settings.limits.retry_delays_seconds == (1.0, 2.0)
    assert settings.storage.model_bucket_name == "media", "an empty value is not set"
    assert config.unknown_names(file) is None


def test_a_json_file_means_the_same(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "worker.json"
    values = tomllib.loads(file.read_text(encoding="utf-8")) | {"HF_TOKEN": None}
    other.write_text(json.dumps(values), encoding="utf-8")
    same = config.load(file=other)
    assert same.model_dump(exclude={"source"}) == config.load(file=file).model_dump(
        exclude={"source"}
    )


def test_the_environment_wins_and_env_too(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("EPOCHS=8\nSEED=1\n")
    monkeypatch.setenv("SEED", "2")
    style = config.load(file=file).parameters["style"]
    assert (style.epochs, style.seed) == (8, 2)


def test_training_takes_its_part_of_the_same_file(file: Path) -> None:
    settings = config.load_local(file=file)
    assert settings.parameters["style"].epochs == 7 and not isinstance(settings, Settings)


def test_a_secret_of_the_file_is_a_secret(file: Path) -> None:
    settings = config.load(file=file)
    assert TOKEN in settings.secrets()
    assert TOKEN not in repr(settings)
    file.write_text(TOML.replace(TOKEN, "too-short-secret"), encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        config.load(file=file)
    assert "INTERNAL_API_TOKEN: must have 32" in str(caught.value)
    assert "too-short-secret" not in str(caught.value)


def test_an_unknown_name_in_the_file_is_reported_with_a_suggestion(file: Path) -> None:
    file.write_text(TOML + 'RABBIT_HOST = "x"\nfavourite_colour = "blue"\n', encoding="utf-8")
    unknown = config.unknown_names(file) or ""
    assert "RABBIT_HOST (did you mean RABBITMQ_HOST?)" in unknown and "FAVOURITE_COLOUR" in unknown
    assert "blue" not in unknown and str(file) in unknown


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.toml", b"INTERNAL_API_TOKEN = hunter2hunter2", "is not valid TOML"),
        ("a.toml", b'[rabbitmq]\nhost = "hunter2"', "has tables (rabbitmq)"),
        ("a.toml", b'EPOCHS = 1\nepochs = 2\nX = "hunter2"', "a name twice"),
        ("a.toml", b"# hunter2 \xff", "not text in UTF-8"),
        ("a.json", b'{"INTERNAL_API_TOKEN": "hunter2', "is not valid JSON"),
        ("a.json", b'{"HF_TOKEN": "hunter2", "HF_TOKEN": ""}', "twice"),
        ("a.json", b'["hunter2"]', "one object"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.toml", b"x = " + b"[" * 100_000, "not valid TOML"),
        ("a.yaml", b"hf_token: hunter2", ".toml or .json"),
        ("a.toml", b"# hunter2" * 200_000, "is larger than"),
        ("missing.toml", None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_reported_without_its_content(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        config.load(file=tmp_path / name)
    assert says in str(caught.value) and name in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "command", [["worker"], ["doctor"], ["train", "pictures", "--output", "model"]]
)
def test_every_command_that_has_settings_takes_the_file(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command reads the file first, so a missing file is the first error."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    ran = CliRunner().invoke(main.app, [*command, "--config", "nowhere.toml"])
    assert "nowhere.toml cannot be read" in " ".join(ran.output.split())
    assert (ended or [ran.exit_code]) == [2]


# ---- names of the earlier training container -----------------------------------------------------

CONTAINER = {
    "model_name": "owner/name",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "lora_r": 8,
    "lora_alpha": 16,
    "learning_rate": 0.0002,
    "seed": 7,
}


def test_the_earlier_containers_file_sets_the_settings_with_its_own_names(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONTAINER), encoding="utf-8")
    settings = config.load_local(file=path)
    style = settings.parameters["style"]
    assert settings.trainer.base_model == "owner/name"
    assert (style.epochs, style.batch_size, style.rank) == (3, 4, 8)
    assert (style.alpha, style.learning_rate, style.seed) == (16.0, 2e-4, 7)
    assert config.unknown_names(path) is None


def test_the_earlier_containers_file_configures_language_models_if_they_come_first(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.json"
    more = {"kinds": "llm", "use_4bit": False, "max_seq_length": 1024}
    path.write_text(json.dumps(CONTAINER | more), encoding="utf-8")
    settings = config.load_local(file=path)
    language = settings.parameters["llm"]
    assert settings.options["llm"].default_base_model == "owner/name"
    assert (language.epochs, language.batch_size, language.rank) == (3.0, 4, 8)
    assert (language.max_length, settings.options["llm"].use_4bit) == (1024, False)
    assert config.unknown_names(path) is None


def test_its_names_for_language_models_are_reported_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    more = {"use_4bit": True, "max_seq_length": 1024, "use_flash_attention": True}
    path.write_text(json.dumps(CONTAINER | more), encoding="utf-8")
    config.load_local(file=path)
    unknown = config.unknown_names(path) or ""
    assert all(f"{name.upper()} (" in unknown for name in more)


def test_its_names_have_no_effect_outside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_NAME", "of/another-program")
    (tmp_path / ".env").write_text("NUM_TRAIN_EPOCHS=3\n", encoding="utf-8")
    settings = config.load_local()
    assert settings.trainer.base_model != "of/another-program"
    assert settings.parameters["style"].epochs == 100
    assert "NUM_TRAIN_EPOCHS (now EPOCHS)" in (config.unknown_names() or "")


def test_two_names_of_one_setting_in_a_file_are_refused_by_both_names(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONTAINER | {"epochs": 5}), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="EPOCHS and NUM_TRAIN_EPOCHS: two names of one"):
        config.load_local(file=path)
