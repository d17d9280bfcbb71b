"""Stores of the settings: endpoints, credentials, checksums."""

from __future__ import annotations

from pathlib import Path

import pytest

import config
from tests.unit.environment import problems, settings

pytestmark = pytest.mark.usefixtures("own_settings")

KEYS = {"AWS_ACCESS_KEY_ID": "AKIAMAIN", "AWS_SECRET_ACCESS_KEY": "secret-of-main"}
STATE_KEYS = {
    "STATE_AWS_ACCESS_KEY_ID": "AKIASTATE",
    "STATE_AWS_SECRET_ACCESS_KEY": "secret-of-state",
}


def test_the_state_bucket_is_in_the_store_of_the_images_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = settings(monkeypatch, **KEYS, AWS_SESSION_TOKEN="token-of-main")
    assert loaded.storage.state_store() == loaded.storage.main_store()
    assert loaded.storage.main_store().session_token == "token-of-main"


def test_the_state_store_can_have_a_separate_address_region_and_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = settings(
        monkeypatch,
        **KEYS,
        **STATE_KEYS,
        AWS_SESSION_TOKEN="token-of-main",
        AWS_ENDPOINT_URL_S3="https://storage.googleapis.com",
        STATE_AWS_ENDPOINT_URL_S3="https://minio.example",
        STATE_AWS_S3_REGION_NAME="eu-central-1",
    )
    state, images = loaded.storage.state_store(), loaded.storage.main_store()
    assert (state.endpoint, state.region) == ("https://minio.example", "eu-central-1")
    assert (state.access_key_id, state.secret_access_key) == ("AKIASTATE", "secret-of-state")
    assert state.session_token is None, "a token belongs to its own key"
    assert (images.endpoint, images.region) == ("https://storage.googleapis.com", "ap-northeast-2")
    assert (images.checksums, images.conditional_writes) == ("md5", False)
    assert (state.checksums, state.conditional_writes) == ("sha256", True)
    assert "secret-of-state" not in repr(state) and "secret-of-state" in loaded.secrets()


@pytest.mark.parametrize("prefix", ["", "STATE_"])
def test_a_session_token_without_its_key_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    told = problems(monkeypatch, **{f"{prefix}AWS_SESSION_TOKEN": "hunter2"})
    assert f"{prefix}AWS_SESSION_TOKEN: is part of temporary credentials" in told
    assert f"{prefix}AWS_ACCESS_KEY_ID" in told and "hunter2" not in told


@pytest.mark.parametrize("prefix", ["", "STATE_"])
def test_a_key_without_its_secret_is_refused(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    told = problems(monkeypatch, **{f"{prefix}AWS_ACCESS_KEY_ID": "AKIA"})
    assert f"{prefix}AWS_SECRET_ACCESS_KEY: belongs to {prefix}AWS_ACCESS_KEY_ID" in told


def test_all_credentials_are_read_from_the_file_too_and_kept_from_the_trainer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = KEYS | STATE_KEYS | {"AWS_SESSION_TOKEN": "t-main", "STATE_AWS_SESSION_TOKEN": "t-st"}
    text = "".join(f"{name}={value}\n" for name, value in lines.items())
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "t-main")
    loaded = settings(monkeypatch)
    assert loaded.storage.main_store().session_token == "t-main"
    assert loaded.storage.state_store().session_token == "t-st"
    assert config.unknown_names() is None
    trainer = loaded.trainer_environment()
    assert not [value for value in lines.values() if value in trainer.values()]


def test_both_names_of_the_endpoint_are_read_and_the_one_for_s3_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = settings(monkeypatch, AWS_ENDPOINT_URL="http://minio:9000")
    assert alone.storage.main_store().endpoint == alone.storage.s3_endpoint == "http://minio:9000"
    both = settings(
        monkeypatch, AWS_ENDPOINT_URL="http://all:9000", AWS_ENDPOINT_URL_S3="http://s3:9000"
    )
    assert both.storage.main_store().endpoint == "http://s3:9000"
    ignored = settings(monkeypatch, AWS_IGNORE_CONFIGURED_ENDPOINT_URLS="true")
    assert ignored.storage.main_store().endpoint is None
    assert "AWS_ENDPOINT_URL: " in problems(monkeypatch, AWS_ENDPOINT_URL="minio")


@pytest.mark.parametrize(
    ("endpoint", "chosen", "used"),
    [
        (None, "auto", "sha256"),
        ("https://storage.googleapis.com", "auto", "md5"),
        ("https://eu.storage.googleapis.com/", "auto", "md5"),
        ("https://storage.googleapis.com.evil.example", "auto", "sha256"),
        ("https://storage.googleapis.com", "sha256", "sha256"),
        ("http://minio:9000", "md5", "md5"),
    ],
)
def test_checksums_follow_the_endpoint_unless_they_are_set(
    monkeypatch: pytest.MonkeyPatch, endpoint: str | None, chosen: str, used: str
) -> None:
    more = {"AWS_ENDPOINT_URL_S3": endpoint} if endpoint else {}
    assert settings(monkeypatch, S3_CHECKSUMS=chosen, **more).storage.main_store().checksums == used
