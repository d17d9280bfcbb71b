"""Any value of a setting is used unchanged, or refused with the name of the setting."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import config
from utils.errors import ConfigurationError

REQUIRED: dict[str, Any] = {
    "_env_file": None,
    "backend_api_url": "https://api.stylelicense.com",
    "internal_api_token": "t" * 32,
    "aws_storage_bucket_name": "stylelicense-media",
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
HOSTS = st.from_regex(r"[a-z][a-z0-9]{0,10}(\.[a-z]{2,5})?", fullmatch=True)
PATHS = st.from_regex(r"(/[a-z0-9_-]{1,8}){0,3}", fullmatch=True)


def loaded(**values: Any) -> config.Settings | None:
    """The settings, or None if they are refused by name."""
    try:
        settings: config.Settings = config.load(**(REQUIRED | values))
    except ConfigurationError as error:
        for name in values:
            assert name.upper() in str(error), "a refusal names the setting"
        return None
    return settings


def value_of(settings: config.Settings, name: str) -> Any:
    """The value of a setting, from its group."""
    groups = (settings.broker, settings.storage, settings.telemetry)
    return next(getattr(group, name) for group in groups if hasattr(group, name))


@pytest.mark.parametrize(
    "name", ["rabbitmq_user", "rabbitmq_vhost", "otel_service_name", "aws_s3_region_name"]
)
@given(text=TEXTS)
def test_a_text_is_used_whole_or_refused(name: str, text: str) -> None:
    settings = loaded(**{name: text})
    if settings is not None:
        assert value_of(settings, name) == text


@pytest.mark.parametrize("name", ["rabbitmq_pass", "aws_secret_access_key", "aws_session_token"])
@given(text=TEXTS)
def test_a_secret_is_used_whole_or_refused_and_never_shown(name: str, text: str) -> None:
    other = {"aws_access_key_id": "key", "aws_secret_access_key": "s" * 20}
    others = other if name.startswith("aws") else {}
    try:
        settings = config.load(**(REQUIRED | others | {name: text}))
    except ConfigurationError as error:
        assert name.upper() in str(error)
        assert len(text) < 8 or text not in str(error)
        return
    assert value_of(settings, name).get_secret_value() == text


@given(HOSTS, PATHS)
@example("api", "/base/path")
def test_the_path_of_the_backends_address_is_kept(host: str, path: str) -> None:
    settings = loaded(backend_api_url=f"https://{host}{path}")
    if settings is not None:
        assert settings.webhooks.backend_api_url == f"https://{host}{path}"


@pytest.mark.parametrize("name", ["backend_api_url", "aws_endpoint_url_s3", "rabbitmq_host"])
@given(text=TEXTS)
def test_any_text_for_an_address_is_kept_or_refused(name: str, text: str) -> None:
    loaded(**{name: text})
