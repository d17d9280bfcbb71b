"""Rules without servers: values that cannot be stored, file names, ids, settings."""

from __future__ import annotations

import math
from typing import Any

import pytest

import config
from api.gate.cleaning import check, cleaned, loads
from api.gate.intake import plain_name
from api.gate.problems import CODES, Problem
from api.life.orders import model_id_of
from utils.errors import ConfigurationError


@pytest.mark.parametrize(
    "value", ["a\x00", "\ud83d", {"a": ["\x00"]}, {"\x00": 1}, 2**63, -(2**70), math.nan, math.inf]
)
def test_values_that_no_database_stores_are_refused_and_cleaned(value: Any) -> None:
    with pytest.raises(Problem):
        check(value)
    check(cleaned(value))


def test_deep_nesting_is_refused() -> None:
    value: Any = 1
    for _ in range(100):
        value = [value]
    with pytest.raises(Problem, match="nested"):
        check(value)
    with pytest.raises(Problem):
        loads(b"[" * 100_000)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("a/b.png", "b.png"),
        ("..", "file"),
        ("", "file"),
        ("a\r\nb", "a  b"),
        ("x" * 999, "x" * 255),
    ],
)
def test_a_file_name_is_one_plain_name(given: str, name: str) -> None:
    assert plain_name(given) == name


@pytest.mark.parametrize("base", ["owner/Model-7B", "a%b#c?d e", "./models/x/", ""])
def test_the_id_of_a_model_has_no_character_that_an_address_escapes(base: str) -> None:
    made = model_id_of(base, "org_1", "My Suffix/%", "ftjob-0123456789abcdef01234567")
    assert not set(made) & set("/%#? ")
    assert made.endswith(":01234567")


def test_every_code_is_an_error_with_a_title() -> None:
    for code, (status, title) in CODES.items():
        assert 400 <= status <= 599
        assert title
        assert Problem(code, "x").body("req_1")["error"]["code"] == code


def settings(**values: Any) -> config.Settings:
    """Settings with what is required."""
    required = {
        "_env_file": None,
        "aws_storage_bucket_name": "media",
        "internal_api_token": "t" * 32,
    }
    return config.load_api(**(required | values))


def test_an_open_server_is_refused_beyond_this_machine() -> None:
    assert settings(api_open="true").api.api_open
    with pytest.raises(ConfigurationError, match="API_OPEN"):
        settings(api_open="true", api_host="0.0.0.0")


def test_the_api_is_the_backend_of_its_workers() -> None:
    assert settings(api_port="8123").webhooks.backend_api_url == "http://127.0.0.1:8123"
    public = settings(api_public_url="https://train.example.org/x")
    assert public.webhooks.backend_api_url == "https://train.example.org/x"
    assert settings(backend_api_url="https://b.example.org").webhooks.backend_api_url == (
        "https://b.example.org"
    )
