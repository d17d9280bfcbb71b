"""The doctor tests the API's database, and says what to do."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from api.store.database import Database
from api.store.migrating import migrate
from cli.doctor.api_server import examine
from cli.doctor.findings import Verdict
from utils.settings.groups import ApiSettings

BACKEND = "https://train.example.org"


def settings(url: str | None, **values: object) -> ApiSettings:
    """The settings of an API with this database."""
    return ApiSettings.model_validate({"api_database_url": url} | values)


def test_a_machine_without_an_api_has_no_findings() -> None:
    assert not list(examine(settings(None), BACKEND))


def test_old_tables_are_reported_until_they_are_migrated(database_url: str) -> None:
    given = settings(database_url, api_key_pepper=SecretStr("p" * 32))
    old, keys = examine(given, BACKEND)
    assert old.verdict is Verdict.WARN and "main.py api migrate" in old.remedy
    assert keys.verdict is Verdict.OK
    database = Database(database_url)
    migrate(database)
    database.close()
    assert next(iter(examine(given, BACKEND))).verdict is Verdict.OK


@pytest.mark.parametrize(
    "url", ["postgresql+psycopg://user:a-password@127.0.0.1:1/x", "sqlite:////no/such/folder/x.db"]
)
def test_a_database_that_cannot_be_used_fails_without_its_password(url: str) -> None:
    found = next(iter(examine(settings(url), BACKEND)))
    assert found.verdict is Verdict.FAIL
    assert "a-password" not in found.detail


def test_a_missing_pepper_and_two_addresses_are_warned_about(database_url: str) -> None:
    given = settings(database_url, api_public_url="https://other.example.org")
    verdicts = {each.check: each.verdict for each in examine(given, BACKEND)}
    assert verdicts["API keys"] is verdicts["API address"] is Verdict.WARN
