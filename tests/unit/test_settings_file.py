"""`--config FILE`: below the environment, every problem named, no secret told."""

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
    assert settings.storage.model_bucket_name == "media", "what is empty is not set"
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


def test_a_name_that_is_no_setting_is_named_with_the_one_it_may_be(file: Path) -> None:
    file.write_text(TOML + 'RABBIT_HOST = "x"\nfavourite_colour = "blue"\n', encoding="utf-8")
    unknown = config.unknown_names(file) or ""
    assert "RABBIT_HOST (did you mean RABBITMQ_HOST?)" in unknown and "FAVOURITE_COLOUR" in unknown
    assert "blue" not in unknown and str(file) in unknown


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.toml", b"INTERNAL_API_TOKEN = hunter2hunter2", "is not TOML"),
        ("a.toml", b'[rabbitmq]\nhost = "hunter2"', "has tables (rabbitmq)"),
        ("a.toml", b'EPOCHS = 1\nepochs = 2\nX = "hunter2"', "a name twice"),
        ("a.toml", b"# hunter2 \xff", "not UTF-8"),
        ("a.json", b'{"INTERNAL_API_TOKEN": "hunter2', "is not JSON"),
        ("a.json", b'{"HF_TOKEN": "hunter2", "HF_TOKEN": ""}', "twice"),
        ("a.json", b'["hunter2"]', "one object"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.toml", b"x = " + b"[" * 100_000, "not TOML"),
        ("a.yaml", b"hf_token: hunter2", ".toml or .json"),
        ("a.toml", b"# hunter2" * 200_000, "too large"),
        ("missing.toml", None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_sentence_without_its_content(
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
    """A file that is not there is the first thing that each of them stumbles over."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    ran = CliRunner().invoke(main.app, [*command, "--config", "nowhere.toml"])
    assert "nowhere.toml cannot be read" in " ".join(ran.output.split())
    assert (ended or [ran.exit_code]) == [2]
