"""Names that are not settings, and placeholders that are still in place."""

from __future__ import annotations

from pathlib import Path

import pytest

import config
from config import load
from tests.unit.environment import NAMES, REQUIRED, problems, settings
from utils.errors import ConfigurationError
from utils.settings.names import OLD_NAMES, misspelled

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
pytestmark = pytest.mark.usefixtures("own_settings")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INTERNAL_API_TOKEN", "replace-me-with-32-characters-or-more"),
        ("INTERNAL_API_TOKEN", "REPLACE-ME-" + "x" * 32),
        ("RABBITMQ_PASS", "replace-me"),
        ("AWS_SECRET_ACCESS_KEY", " replace-me-too"),
        ("STATE_BUCKET_NAME", "replace-me-bucket"),
        ("IMAGE_BUCKETS", "media,replace-me"),
        ("RABBITMQ_HOST", "broker,api.example.com"),
        ("BACKEND_API_URL", "https://API.example.com:8443/prefix"),
        ("WEBHOOK_ALLOWED_ORIGINS", "https://ok.example,https://api.example.com."),
        ("SENTRY_DSN", "https://key@api.example.com/1"),
    ],
)
def test_a_placeholder_is_refused_in_every_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    told = problems(monkeypatch, **{name: value}, EPOCHS="0")
    assert f"{name}: " in told and "placeholder" in told and "EPOCHS: " in told


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_STORAGE_BUCKET_NAME", "stylelicense-media"),
        ("BACKEND_API_URL", "https://my-api.example.com"),
        ("BACKEND_API_URL", "https://api.example.com.my-host.de"),
        ("RABBITMQ_PASS", "do-not-replace-me"),
    ],
)
def test_a_real_value_that_resembles_a_placeholder_is_accepted(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    settings(monkeypatch, **{name: value})


def test_unknown_names_in_the_file_are_reported_with_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EPOCHE", "3")  # the environment has names of other programs
    assert config.unknown_names() is None
    (tmp_path / ".env").write_text("EPOCH=7\nlora_rank=8\nZZ=hunter2\n", encoding="utf-8")
    assert config.unknown_names() == ("unknown settings in .env: EPOCH (did you mean EPOCHS?), ZZ")


def test_unknown_names_are_reported_together_with_missing_settings(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "GCS_BUCKET_NAME=media\nBACKEND_URL=https://backend.example\nINTERNAL_TOKEN=hunter2\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigurationError) as caught:
        load()
    told = str(caught.value)
    assert all(f"{name}: not set" in told for name in REQUIRED)
    assert "GCS_BUCKET_NAME (now AWS_STORAGE_BUCKET_NAME; " in told
    assert "BACKEND_URL (now BACKEND_API_URL)" in told
    assert "INTERNAL_TOKEN (now INTERNAL_API_TOKEN)" in told
    assert "STATE_BUCKET_NAME" not in told and "hunter2" not in told


def test_an_old_name_in_the_environment_is_reported_until_the_new_one_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("S3_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert config.unknown_names() == (
        "old names in the environment: AWS_REGION (now AWS_S3_REGION_NAME; the name for boto3 is "
        "not read), S3_REGION (now AWS_S3_REGION_NAME)"
    )
    monkeypatch.setenv("AWS_S3_REGION_NAME", "eu-central-1")
    assert config.unknown_names() is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EPOCH", "EPOCHS"),
        ("RABBIT_MQ_HOST", "RABBITMQ_HOST"),
        ("RABBITMQ_HOSTS", "RABBITMQ_HOST"),
        ("STATE_BUCKETNAME", "STATE_BUCKET_NAME"),
        ("GCS_BUCKET_NAME", None),
        ("MEDIA_BUCKET_NAME", None),
        ("PUBLIC_BUCKET_NAME", None),
        ("WEBHOOK_TOKEN", None),
        ("AWS_ACCESS_KEY", None),
    ],
)
def test_only_a_misspelling_gets_a_suggestion(name: str, meant: str | None) -> None:
    assert misspelled(name, NAMES) == meant


def test_every_old_name_leads_to_settings_that_exist() -> None:
    assert {name for old in OLD_NAMES.values() for name in old.now} <= NAMES
    # With KINDS=llm, some of these are settings of language models.
    of_language_models = {f"LLM_{name}" for name in OLD_NAMES} & NAMES
    assert {f"LLM_{name}" for name in OLD_NAMES.keys() & NAMES} == of_language_models
    assert all(old.now or old.note for old in OLD_NAMES.values())


def test_the_operations_page_has_every_old_name_with_its_successors() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name, old in OLD_NAMES.items():
        row = next((row for row in rows if f"`{name}`" in row.split("|")[1]), None)
        assert row, f"{name} is not in the table"
        assert all(f"`{successor}`" in row.split("|")[2] for successor in old.now), name
