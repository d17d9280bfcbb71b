"""The doctor and S3: buckets, rights, conditions, privacy, clock; its test objects are removed."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from cli.doctor import storage
from cli.doctor.findings import Finding, Verdict
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from tests.integration.services.s3_proxy import Fault, S3Proxy, always, refusal
from utils.settings.storage import StorageSettings

DENIED = refusal(403, "AccessDenied")


@dataclasses.dataclass
class _Buckets:
    """Three buckets behind a proxy."""

    server: S3Server
    proxy: S3Proxy
    media: str
    models: str
    state: str

    def settings(self, **values: Any) -> StorageSettings:
        """The settings of a worker's storage."""
        return StorageSettings(
            **{
                "aws_endpoint_url_s3": self.proxy.endpoint,
                "aws_s3_region_name": REGION,
                "aws_access_key_id": ACCESS_KEY_ID,
                "aws_secret_access_key": SECRET_ACCESS_KEY,
                "aws_storage_bucket_name": self.media,
                "model_bucket_name": self.models,
                "state_bucket_name": self.state,
                "image_buckets": self.media,
            }
            | values,
        )

    def examine(self, **values: Any) -> dict[str, Finding]:
        """The doctor's findings, by check."""
        return {each.check: each for each in storage.examine(self.settings(**values))}

    def keys(self) -> list[str]:
        """Everything in all three."""
        return [
            found["Key"]
            for bucket in (self.media, self.models, self.state)
            for found in self.server.client().list_objects_v2(Bucket=bucket).get("Contents", ())
        ]


@pytest.fixture(name="buckets")
def _buckets(s3_server: S3Server) -> Iterator[_Buckets]:
    names = [f"{what}-{secrets.token_hex(4)}" for what in ("media", "models", "state")]
    for name in names:
        s3_server.create_bucket(name)
    with S3Proxy(s3_server.endpoint) as proxy:
        yield _Buckets(s3_server, proxy, *names)


def _failed(found: dict[str, Finding]) -> dict[str, Finding]:
    return {name: each for name, each in found.items() if each.verdict is Verdict.FAIL}


def test_in_healthy_buckets_everything_is_tried_and_nothing_stays(buckets: _Buckets) -> None:
    found = buckets.examine()
    assert not _failed(found)
    assert found[f"bucket {buckets.media}"].detail == "*: list, read"
    assert found[f"bucket {buckets.models}"].detail == "models/: list, write, read, delete"
    assert "archive/: list, write, read, delete" in found[f"bucket {buckets.state}"].detail
    for bucket in (buckets.models, buckets.state):
        assert "honoured" in found[f"conditional writes in {bucket}"].detail
    assert found["clock (S3)"].verdict is Verdict.OK
    assert not buckets.keys()


def test_only_test_objects_are_written_into_buckets_with_content(buckets: _Buckets) -> None:
    buckets.server.client().put_object(
        Bucket=buckets.models, Key="models/style_1/lora_weights.safetensors", Body=b"precious"
    )
    assert not _failed(buckets.examine())
    changed = [
        each for each in buckets.proxy.requests if each.startswith(("PUT ", "DELETE ", "POST "))
    ]
    assert changed
    # Deletions name their keys in the body of a POST to the bucket.
    assert all("/.probe-" in each for each in changed if not each.startswith("POST "))
    assert buckets.keys() == ["models/style_1/lora_weights.safetensors"]


def test_a_missing_bucket_is_named_with_the_settings_that_could(buckets: _Buckets) -> None:
    denied = _failed(buckets.examine(state_bucket_name="no-such-bucket"))
    assert list(denied) == ["bucket no-such-bucket"]
    assert "does not exist" in denied["bucket no-such-bucket"].detail
    assert "STATE_BUCKET_NAME" in denied["bucket no-such-bucket"].remedy


def test_a_store_that_ignores_conditions_fails_since_jobs_could_be_trained_twice(
    buckets: _Buckets,
) -> None:
    buckets.proxy.fault = always(Fault(careless=True))
    found = buckets.examine()
    assert list(_failed(found)) == [f"conditional writes in {buckets.state}"]
    finding = found[f"conditional writes in {buckets.state}"]
    assert "does not honour If-None-Match and If-Match" in finding.detail
    assert "refuses to start" in finding.detail
    assert "ALLOW_UNGUARDED_STATE=true" in finding.remedy
    assert "STATE_AWS_ENDPOINT_URL_S3" in finding.remedy
    assert not buckets.keys()


def test_a_model_bucket_without_conditional_writes_is_a_warning(buckets: _Buckets) -> None:
    buckets.proxy.fault = always(Fault(careless=True))
    finding = buckets.examine()[f"conditional writes in {buckets.models}"]
    assert finding.verdict is Verdict.WARN
    assert "relies on the style's turn" in finding.detail


def test_an_unguarded_state_bucket_that_is_allowed_is_a_warning(buckets: _Buckets) -> None:
    buckets.proxy.fault = always(Fault(careless=True))
    found = buckets.examine(allow_unguarded_state=True)
    finding = found[f"conditional writes in {buckets.state}"]
    assert finding.verdict is Verdict.WARN and not _failed(found)
    assert "exactly one worker" in finding.remedy


def test_the_state_bucket_is_tested_in_its_own_store_with_its_own_keys(
    buckets: _Buckets, s3_server: S3Server
) -> None:
    with S3Proxy(s3_server.endpoint) as state_proxy:
        found = buckets.examine(
            state_aws_endpoint_url_s3=state_proxy.endpoint,
            state_aws_access_key_id="AKIASTATE",
            state_aws_secret_access_key="secret-of-state",
        )
    assert not _failed(found)
    assert (
        "jobs/: list, write, read, delete" in found[f"bucket {buckets.state} (state store)"].detail
    )
    assert all(f"/{buckets.state}" in each for each in state_proxy.requests)
    assert not any(f"/{buckets.state}" in each for each in buckets.proxy.requests)
    signed = [each["authorization"] for each in state_proxy.headers if "authorization" in each]
    assert signed and all("Credential=AKIASTATE/" in each for each in signed)
    assert not any("AKIASTATE" in str(each) for each in buckets.proxy.headers)


def test_the_settings_of_the_state_store_are_named_when_it_cannot_be_reached(
    buckets: _Buckets,
) -> None:
    denied = _failed(buckets.examine(state_aws_endpoint_url_s3="http://127.0.0.1:1"))
    assert list(denied) == [f"bucket {buckets.state} (state store)"]
    assert "STATE_AWS_ENDPOINT_URL_S3" in denied[f"bucket {buckets.state} (state store)"].remedy


@pytest.mark.parametrize(
    ("method", "place", "says"),
    [
        ("PUT", "/checkpoints/", "write under checkpoints/"),
        ("GET", "/jobs/", "read under jobs/"),
        ("GET", "list-type=2&prefix=jobs", "list under jobs/"),
    ],
)
def test_a_refusal_of_s3_is_reported_with_its_prefix(
    buckets: _Buckets, method: str, place: str, says: str
) -> None:
    buckets.proxy.fault = lambda how, path: DENIED if how == method and place in path else None
    finding = buckets.examine()[f"bucket {buckets.state}"]
    assert finding.verdict is Verdict.FAIL
    assert says in finding.detail
    assert "doctor --policy" in finding.remedy


def test_a_refused_deletion_is_named(buckets: _Buckets) -> None:
    buckets.proxy.fault = lambda how, path: DENIED if how == "POST" else None
    assert "delete under jobs/" in buckets.examine()[f"bucket {buckets.state}"].detail


def test_images_that_may_not_be_read_are_found_in_an_empty_bucket_too(buckets: _Buckets) -> None:
    buckets.proxy.fault = lambda how, path: (
        DENIED if how == "HEAD" and f"/{buckets.media}/" in path else None
    )
    assert "read under any prefix" in buckets.examine()[f"bucket {buckets.media}"].detail


def test_an_image_bucket_that_may_not_be_listed_is_a_warning(buckets: _Buckets) -> None:
    """The worker does not need it: it reads images by their names."""

    def only_by_name(how: str, path: str) -> Fault | None:
        unknown = "list-type=2" in path or "/.probe-" in path
        return (
            DENIED if how in ("GET", "HEAD") and f"/{buckets.media}" in path and unknown else None
        )

    buckets.proxy.fault = only_by_name
    finding = buckets.examine()[f"bucket {buckets.media}"]
    assert finding.verdict is Verdict.WARN
    assert "reading could not be tested" in finding.detail
    assert "s3:ListBucket" in finding.remedy


def test_a_bucket_that_answers_forbidden_for_missing_objects_stops_the_worker(
    buckets: _Buckets,
) -> None:
    def missing_is_forbidden(how: str, path: str) -> Fault | None:
        return DENIED if how == "HEAD" and "/jobs/.probe-" in path else None

    buckets.proxy.fault = missing_is_forbidden
    finding = buckets.examine()[f"bucket {buckets.state}"]
    assert finding.verdict is Verdict.FAIL
    assert "s3:ListBucket" in finding.remedy


def test_publicly_readable_state_is_a_warning(buckets: _Buckets) -> None:
    # moto answers an unsigned list of any bucket.
    finding = buckets.examine()[f"privacy of {buckets.state}"]
    assert finding.verdict is Verdict.WARN
    assert "list job records" in finding.detail
    assert "STATE_BUCKET_NAME" in finding.remedy


def test_state_in_a_public_media_bucket_names_the_setting_that_was_not_set(
    buckets: _Buckets,
) -> None:
    plain = buckets.settings().model_dump(exclude={"state_bucket_name", "model_bucket_name"})
    settings = StorageSettings(**plain)
    assert settings.state_bucket_name == buckets.media
    found = {each.check: each for each in storage.examine(settings)}
    finding = found[f"privacy of {buckets.media}"]
    assert finding.verdict is Verdict.WARN
    assert "STATE_BUCKET_NAME is not set" in finding.detail
    assert "Set STATE_BUCKET_NAME to a private bucket" in finding.remedy


def test_state_that_is_not_publicly_readable_passes(buckets: _Buckets) -> None:
    def refuse_the_unsigned(_how: str, _path: str) -> Fault | None:
        return None if "authorization" in buckets.proxy.headers[-1] else DENIED

    buckets.proxy.fault = refuse_the_unsigned
    finding = buckets.examine()[f"privacy of {buckets.state}"]
    assert (finding.verdict, finding.detail) == (
        Verdict.OK,
        "S3 refuses to read and to list it without a key.",
    )


def test_a_wrong_access_key_is_named_by_its_setting(buckets: _Buckets) -> None:
    buckets.proxy.fault = always(refusal(403, "InvalidAccessKeyId"))
    denied = _failed(buckets.examine())
    assert len(denied) == 3
    assert all("AWS_ACCESS_KEY_ID" in each.remedy for each in denied.values())


def test_unreachable_storage_is_reported_within_the_time_limit(buckets: _Buckets) -> None:
    denied = _failed(buckets.examine(aws_endpoint_url_s3="http://127.0.0.1:1"))
    assert len(denied) == 3
    assert all("AWS_ENDPOINT_URL_S3" in each.remedy for each in denied.values())
