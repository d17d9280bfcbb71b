"""The stores as the desk opens them from the settings: addresses, credentials, buckets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import config
import main
from cli import broker
from cli.doctor import storage
from cli.doctor.findings import Finding, Verdict
from cli.jobs import order
from config import Settings
from consumer.pages.surroundings import Surroundings
from jobs.addresses import S3Location
from sandbox.photographs import photographs
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from services.broker.settlement import Publication
from services.s3.s3_service import S3Service, open_store
from tests.integration.services.s3_proxy import S3Proxy

GOOGLE = "https://storage.googleapis.com"


@pytest.fixture(name="two")
def _two(s3_server: S3Server) -> Iterator[tuple[S3Proxy, S3Proxy]]:
    """Two ways to one server: the store of the images, and the state's."""
    with S3Proxy(s3_server.endpoint) as images, S3Proxy(s3_server.endpoint) as state:
        yield images, state


def _settings(**values: Any) -> Settings:
    settings: Settings = config.load(
        _env_file=None,
        **{
            "backend_api_url": "http://localhost:1",
            "internal_api_token": "t" * 32,
            "aws_s3_region_name": REGION,
            "aws_access_key_id": ACCESS_KEY_ID,
            "aws_secret_access_key": SECRET_ACCESS_KEY,
            "aws_storage_bucket_name": "media",
        }
        | values,
    )
    return settings


def open_s3(settings: Settings) -> S3Service:
    """The store of images and models."""
    return open_store(settings.storage.main_store())


def open_state_s3(settings: Settings) -> S3Service:
    """The store of the state bucket."""
    return open_store(settings.storage.state_store())


def _found(settings: Settings) -> dict[str, Finding]:
    return {
        each.check: each for each in storage.examine_settings(settings.storage, open_s3(settings))
    }


def test_each_request_carries_the_session_token_of_its_store(
    two: tuple[S3Proxy, S3Proxy], bucket: str
) -> None:
    images, state = two
    settings = _settings(
        aws_endpoint_url_s3=images.endpoint,
        aws_session_token="token-of-the-images",
        state_aws_endpoint_url_s3=state.endpoint,
        state_aws_access_key_id="ASIASTATE",
        state_aws_secret_access_key="secret-of-the-state",
        state_aws_session_token="token-of-the-state",
    )
    for s3 in (open_s3(settings), open_state_s3(settings)):
        s3.write(S3Location(bucket, "a"), b"1")
        s3.read(S3Location(bucket, "a"))
    for proxy, token in ((images, "token-of-the-images"), (state, "token-of-the-state")):
        assert [each.get("x-amz-security-token") for each in proxy.headers] == [token] * 2


def test_the_general_endpoint_is_used_and_recognised_like_the_s3_endpoint(
    two: tuple[S3Proxy, S3Proxy], bucket: str
) -> None:
    settings = _settings(aws_endpoint_url=two[0].endpoint)
    open_s3(settings).reach(bucket)
    assert two[0].requests == [f"HEAD /{bucket}"]
    assert open_s3(settings).endpoint == settings.storage.s3_endpoint


def test_readiness_tests_each_bucket_in_its_own_store(
    two: tuple[S3Proxy, S3Proxy], s3_server: S3Server, bucket: str
) -> None:
    images, state = two
    settings = _settings(
        model_bucket_name=bucket,
        state_bucket_name=bucket,
        aws_endpoint_url_s3=images.endpoint,
        state_aws_endpoint_url_s3=state.endpoint,
    )
    assert s3_server.endpoint

    class Noted:
        """Stands in for the condition and the metrics."""

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} is not needed")

    looks: Any = Surroundings(
        [(bucket, open_s3(settings)), (bucket, open_state_s3(settings))],
        {},
        Noted(),  # type: ignore[arg-type]
        Noted(),  # type: ignore[arg-type]
    )
    assert looks._storage_problem() is None  # pylint: disable=protected-access
    assert images.requests == state.requests == [f"HEAD /{bucket}"]


def test_an_order_uploads_its_images_to_one_store_and_reads_its_record_in_the_other(
    two: tuple[S3Proxy, S3Proxy], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, state = two
    for photograph in photographs()[:3]:
        (tmp_path / photograph.name).write_bytes(photograph.content)
    published: list[Publication] = []
    monkeypatch.setattr(broker, "check_training_queue", lambda settings: None)
    monkeypatch.setattr(
        broker, "publish", lambda settings, publication: published.append(publication)
    )
    settings = _settings(
        aws_storage_bucket_name=bucket,
        aws_endpoint_url_s3=images.endpoint,
        state_aws_endpoint_url_s3=state.endpoint,
    )
    order.place(
        settings.broker,
        settings.storage,
        settings.kinds(),
        open_s3(settings),
        tmp_path,
        state_s3=open_state_s3(settings),
        style_id=1,
    )
    assert [each.split()[0] for each in images.requests] == ["PUT"] * 3
    assert [each.split()[0] for each in state.requests] == ["HEAD"] and len(published) == 1


@pytest.mark.parametrize("command", [["jobs"], ["jobs", "a-task"], ["cancel", "a-task"]])
def test_the_commands_about_jobs_use_only_the_state_store(
    two: tuple[S3Proxy, S3Proxy],
    bucket: str,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    images, state = two
    environment = {
        "AWS_ENDPOINT_URL_S3": images.endpoint,
        "STATE_AWS_ENDPOINT_URL_S3": state.endpoint,
        "AWS_S3_REGION_NAME": REGION,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
        "AWS_STORAGE_BUCKET_NAME": bucket,
        "BACKEND_API_URL": "http://localhost:1",
        "INTERNAL_API_TOKEN": "t" * 32,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    CliRunner().invoke(main.app, [*command, "--json"])
    assert state.requests and not images.requests


# ---- the doctor's findings about the stores ------------------------------------------------------


def test_models_in_s3_addresses_are_a_warning_about_a_server_that_reads_gs_only() -> None:
    finding = _found(_settings())["model address"]
    assert finding.verdict is Verdict.WARN
    assert "paints without the style and reports success" in finding.detail
    assert "MODEL_URL_SCHEME=gs" in finding.remedy


def test_gs_addresses_pass_in_the_google_store_and_are_a_warning_elsewhere() -> None:
    elsewhere = _found(_settings(model_url_scheme="gs", aws_endpoint_url="http://minio:9000"))
    assert elsewhere["model address"].verdict is Verdict.WARN
    assert "http://minio:9000" in elsewhere["model address"].detail
    there = _found(_settings(model_url_scheme="gs", aws_endpoint_url_s3=GOOGLE))
    assert there["model address"].verdict is Verdict.OK


def test_the_google_store_is_reported_with_the_checks_that_were_not_made() -> None:
    finding = _found(
        _settings(aws_endpoint_url_s3=GOOGLE, state_aws_endpoint_url_s3="http://minio:9000")
    )["Google Cloud Storage"]
    assert finding.verdict is Verdict.OK
    assert "MD5" in finding.detail and "not tried against the real service" in finding.remedy


def test_a_state_bucket_in_google_s_store_is_a_warning() -> None:
    finding = _found(_settings(aws_endpoint_url_s3=GOOGLE))["Google Cloud Storage"]
    assert finding.verdict is Verdict.WARN and "STATE_AWS_ENDPOINT_URL_S3" in finding.remedy


@pytest.mark.parametrize("prefix", ["", "STATE_"])
def test_a_temporary_key_without_its_token_is_named_by_the_setting(prefix: str) -> None:
    keys = {
        f"{prefix}aws_access_key_id".lower(): "ASIAEXAMPLE",
        f"{prefix}aws_secret_access_key".lower(): "a-secret",
    }
    finding = _found(_settings(**keys))[f"{prefix}AWS_SESSION_TOKEN"]
    assert finding.verdict is Verdict.FAIL
    token = {f"{prefix}aws_session_token".lower(): "a-token"}
    finding = _found(_settings(**keys, **token))[f"{prefix}AWS_SESSION_TOKEN"]
    assert finding.verdict is Verdict.WARN and "expire" in finding.detail


def test_an_endpoint_that_only_an_aws_configuration_file_names_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config"
    file.write_text("[default]\nendpoint_url = http://minio.example:9000\n", encoding="utf-8")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))
    finding = _found(_settings())["endpoint"]
    assert finding.verdict is Verdict.WARN
    assert "http://minio.example:9000" in finding.detail
    assert "endpoint" not in _found(_settings(aws_ignore_configured_endpoint_urls=True))
