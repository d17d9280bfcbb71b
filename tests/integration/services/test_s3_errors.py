"""Every error of S3, boto3 or the network leaves S3Service as an error of this server."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3.exceptions
import botocore.exceptions
import pytest
import urllib3.exceptions

from consumer.life.inputs import download
from jobs.addresses import S3Location
from jobs.kinds import Input
from jobs.style import caption_beside
from sandbox.s3_server import REGION, S3Server
from services.s3 import client as s3_client
from services.s3 import errors as s3_errors
from services.s3.errors import BucketMissing
from services.s3.s3_service import S3Service
from tests.integration.services.s3_proxy import (
    Fault,
    S3Proxy,
    always,
    impatient,
    refusal,
)
from utils.errors import (
    AccessDenied,
    ConfigurationError,
    ObjectNotFound,
    ObjectTooLarge,
    PreconditionFailed,
    StorageError,
    TrainingServerError,
)


def families() -> list[type[BaseException]]:
    """Every class of error that boto3 and urllib3 can raise."""
    roots = (
        botocore.exceptions.BotoCoreError,
        botocore.exceptions.ClientError,
        boto3.exceptions.Boto3Error,
        urllib3.exceptions.HTTPError,
    )
    found: list[type[BaseException]] = []

    def walk(cls: type[BaseException]) -> None:
        found.append(cls)
        for child in cls.__subclasses__():
            walk(child)

    for root in roots:
        walk(root)
    named = {
        cls
        for cls in vars(botocore.exceptions).values()
        if inspect.isclass(cls) and issubclass(cls, botocore.exceptions.BotoCoreError)
    }
    assert named <= set(found)
    return sorted(set(found), key=lambda cls: f"{cls.__module__}.{cls.__qualname__}")


@pytest.mark.parametrize("cls", families(), ids=lambda cls: cls.__name__)
def test_every_error_of_boto3_becomes_an_error_of_this_server(cls: type[BaseException]) -> None:
    error = cls.__new__(cls)
    if isinstance(error, botocore.exceptions.ClientError):
        error.response = {}
    with pytest.raises(StorageError, match="s3://bucket/key"):
        with s3_client.translated("s3://bucket/key"):
            raise error


@pytest.mark.parametrize("code", [*s3_errors.CODES, "SomethingNew", "403", "404", ""])
@pytest.mark.parametrize("status", [0, 200, 301, 400, 403, 404, 409, 412, 413, 429, 500, 503])
def test_every_code_of_s3_becomes_an_error_of_this_server(code: str, status: int) -> None:
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(StorageError) as caught:
        with s3_client.translated("s3://bucket/key"):
            raise botocore.exceptions.ClientError(response, "GetObject")
    expected = s3_errors.CODES.get(code, (StorageError,))[0]
    assert isinstance(caught.value, expected)


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (404, "NoSuchKey", ObjectNotFound),
        (404, "NoSuchBucket", BucketMissing),
        (403, "AccessDenied", AccessDenied),
        (412, "PreconditionFailed", PreconditionFailed),
        (412, "", PreconditionFailed),
        (403, "", AccessDenied),
        (404, "", ObjectNotFound),
        (400, "EntityTooLarge", ObjectTooLarge),
    ],
)
def test_the_codes_that_callers_depend_on_have_their_classes(
    status: int, code: str, error: type[StorageError]
) -> None:
    assert s3_errors.from_answer(code, status, "x").__class__ is error


def fetch_two(s3: S3Service, folder: Path) -> object:
    """Two images with captions to look for."""
    places = [S3Location("bucket", key) for key in ("a.jpg", "b.jpg")]
    wanted = [Input(each.key, each, text_source=caption_beside(each)) for each in places]
    return download(s3, wanted, folder, max_bytes=100, stop=lambda: False)


CALLS: dict[str, Callable[[S3Service, Path], object]] = {
    "download_inputs": fetch_two,
    "download": lambda s3, folder: s3.download(S3Location("bucket", "a"), folder / "a"),
    "download_folder": lambda s3, folder: s3.download_folder("bucket", "a", folder / "a"),
    "read": lambda s3, folder: s3.read(S3Location("bucket", "a")),
    "head": lambda s3, folder: s3.head(S3Location("bucket", "a")),
    "exists": lambda s3, folder: s3.exists(S3Location("bucket", "a")),
    "reach": lambda s3, folder: s3.reach("bucket"),
    "list_objects": lambda s3, folder: list(s3.list_objects("bucket", "a")),
    "upload_file": lambda s3, folder: s3.upload_file(folder / "file", S3Location("bucket", "a")),
    "upload_folder": lambda s3, folder: s3.upload_folder(folder, "bucket", "a", last="file"),
    "write": lambda s3, folder: s3.write(S3Location("bucket", "a"), b"1"),
    "create": lambda s3, folder: s3.create(S3Location("bucket", "a"), b"1"),
    "replace": lambda s3, folder: s3.replace(S3Location("bucket", "a"), b"1", '"e"'),
    "copy": lambda s3, folder: s3.copy(S3Location("bucket", "a"), S3Location("bucket", "b")),
    "delete": lambda s3, folder: s3.delete("bucket", ["a"]),
    "delete_version": lambda s3, folder: s3.delete_version(S3Location("bucket", "a"), '"1"'),
}


def listing(content: bytes) -> Fault:
    """A listing of one object."""
    body = b"<IsTruncated>false</IsTruncated><Contents>" + content + b"</Contents>"
    return Fault(200, b"<ListBucketResult>" + body + b"</ListBucketResult>")


FAULTS = {
    "reset": Fault(reset=True, forward=False),
    "an empty 200": Fault(200),
    "a web page": Fault(200, b"<html>please log in</html>"),
    "broken XML": Fault(200, b"<ListBucketResult><"),
    "a number that is none": listing(b"<Size>many</Size>"),
    "a date that is none": listing(b"<LastModified>today</LastModified>"),
    "a listing without keys": listing(b""),
    "503": refusal(503, "SlowDown"),
    "400 without XML": Fault(400, b"bad gateway"),
    "403": refusal(403, "AccessDenied"),
    "redirect": Fault(301),
    "no answer in time": Fault(500, delay=0.6),
}
# Calls that these faults leave without an error.
HARMLESS = {
    ("delete", 200),  # asked to be quiet, S3 names only what it could not delete
    ("delete_version", 200),  # the answer has no body; publishers look at the folder again
    ("download_inputs", 200),  # whether it is an image is judged later
    ("reach", 200),  # the answer to a HEAD has no body to judge by
    ("download", 200),  # an object without a checksum may be anything
}


def test_every_public_method_is_among_the_calls() -> None:
    public = {name for name, _ in inspect.getmembers(S3Service, inspect.isfunction)}
    public = {name for name in public if not name.startswith("_")} | {"download_inputs"}
    assert public == set(CALLS)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_foreign_error_escapes_with_any_answer_of_s3(
    proxy: S3Proxy, tmp_path: Path, fault: str
) -> None:
    proxy.fault = always(FAULTS[fault])
    patient = impatient(proxy.endpoint, attempts=1, read_timeout=0.2)
    for name, call in CALLS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "file").write_text("content")
        try:
            call(patient, folder)
        except TrainingServerError:
            continue
        assert (name, FAULTS[fault].status) in HARMLESS


def test_without_credentials_the_error_names_the_settings(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    s3 = S3Service(region=REGION, endpoint_url=s3_server.endpoint)
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        s3.read(S3Location("bucket", "a"))


@pytest.mark.parametrize(
    "settings", [{"endpoint_url": "no address"}, {"endpoint_url": None, "region": "no region!"}]
)
def test_a_service_that_cannot_be_set_up_reports_it_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        S3Service(**({"region": REGION} | settings))
