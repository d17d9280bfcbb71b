"""Google Cloud Storage by its S3-compatible interface, as documented; not the real service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from consumer.life.inputs import NO_VERSIONS, download, object_sizes
from jobs.addresses import S3Location
from jobs.kinds import Input
from sandbox.s3_server import S3Server
from services.records.condition_probe import probe
from services.s3.errors import NotSupported
from services.s3.s3_service import S3Service
from tests.integration.services.google_store import client, google
from tests.integration.services.s3_proxy import (
    Fault,
    Request,
    S3Proxy,
    impatient,
    refusal,
)
from utils.errors import ObjectNotFound, StorageError


@pytest.fixture(name="store")
def _store(s3_server: S3Server) -> Iterator[S3Proxy]:
    with S3Proxy(s3_server.endpoint) as proxy:
        proxy.judge = google
        yield proxy


def test_everything_that_the_worker_does_with_images_and_models_works(
    store: S3Proxy, bucket: str, tmp_path: Path
) -> None:
    s3 = client(store)
    (tmp_path / "model").mkdir()
    for name in ("a.json", "lora_weights.safetensors"):
        (tmp_path / "model" / name).write_bytes(name.encode() * 1000)
    etags = s3.upload_folder(
        tmp_path / "model",
        bucket,
        "models/style_1",
        last="lora_weights.safetensors",
        metadata={"task_id": "t"},
    )
    assert len(etags) == 2
    listed = [each.key for each in s3.list_objects(bucket, "models/")]
    assert listed == ["models/style_1/a.json", "models/style_1/lora_weights.safetensors"]
    weights = S3Location(bucket, listed[1])
    assert s3.head(weights).metadata == {"task_id": "t"}
    s3.copy(weights, S3Location(bucket, "archive/1"))
    assert s3.read(S3Location(bucket, "archive/1")).body == b"lora_weights.safetensors" * 1000
    s3.download(weights, tmp_path / "down")
    s3.delete(bucket, [*listed, "archive/1"])
    assert not list(s3.list_objects(bucket, ""))
    s3.reach(bucket)


def test_deleting_a_missing_object_is_no_error_although_the_store_answers_404(
    store: S3Proxy, bucket: str
) -> None:
    s3 = client(store)
    s3.write(S3Location(bucket, "b"), b"1")
    store.judge = lambda request: (
        refusal(404, "NoSuchKey")
        if request.method == "DELETE" and request.path.endswith("/a")
        else google(request)
    )
    s3.delete(bucket, ["a", "b"])
    assert not list(s3.list_objects(bucket, ""))
    store.judge = lambda request: refusal(404, "NoSuchBucket")
    with pytest.raises(ObjectNotFound, match="bucket does not exist"):
        s3.delete("no-such-bucket", ["a"])


def test_an_upload_carries_an_md5_that_the_store_verifies(
    store: S3Proxy, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"weights")
    client(store).upload_file(tmp_path / "file", S3Location(bucket, "file"))
    assert store.headers[-1]["content-md5"]
    store.judge = lambda request: google(
        Request(request.method, request.path, request.headers, b"damaged on the way")
    )
    with pytest.raises(StorageError, match="arrived damaged"):
        client(store).upload_file(tmp_path / "file", S3Location(bucket, "file"))


def test_the_checksums_for_aws_would_be_refused_there(store: S3Proxy, bucket: str) -> None:
    with pytest.raises(StorageError):
        client(store, checksums="sha256").write(S3Location(bucket, "a"), b"1")


def test_ignored_conditions_are_noticed(store: S3Proxy, bucket: str) -> None:
    support = probe(client(store), bucket)
    assert not support.complete
    assert support.missing == "If-None-Match and If-Match"


def test_an_upload_over_a_version_goes_without_the_condition(
    store: S3Proxy, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"new")
    s3, place = client(store), S3Location(bucket, "file")
    s3.write(place, b"old")
    s3.upload_file(tmp_path / "file", place, only_over='"of-another-version"')
    assert "if-match" not in store.headers[-1]
    assert s3.read(place).body == b"new"


def test_a_version_that_the_store_does_not_return_leaves_the_image_out(
    store: S3Proxy, bucket: str, tmp_path: Path
) -> None:
    s3, place = client(store), S3Location(bucket, "a.jpg")
    s3.write(place, b"the present one")
    wanted = Input("a", place, version_id="3", text="caption")
    (fetched,) = download(s3, [wanted], tmp_path, max_bytes=100, stop=lambda: False)
    assert (fetched.path, fetched.problem) == (None, NO_VERSIONS)


# ---- other stores that lack something ------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        refusal(501, "NotImplemented"),
        refusal(405, "MethodNotAllowed"),
        refusal(400, "MissingContentMD5"),
    ],
)
def test_objects_are_deleted_one_by_one_if_the_request_for_many_is_refused(
    proxy: S3Proxy, s3: S3Service, bucket: str, answer: Fault
) -> None:
    keys = [f"a/{n}" for n in range(3)]
    for key in keys:
        s3.write(S3Location(bucket, key), b"x")
    proxy.judge = lambda request: answer if request.method == "POST" else None
    behind = impatient(proxy.endpoint)
    behind.delete(bucket, [*keys, "was-never-there"])
    assert not list(s3.list_objects(bucket, "a/"))
    behind.delete(bucket, ["b"])
    assert sum(each.startswith("POST ") for each in proxy.requests) == 1, "it is asked once only"


def test_a_missing_bucket_is_no_reason_to_delete_one_by_one(s3: S3Service) -> None:
    with pytest.raises(ObjectNotFound, match="bucket does not exist"):
        s3.delete("no-such-bucket", ["a"])


def test_a_store_that_refuses_conditions_outright_is_noticed(
    proxy: S3Proxy, bucket: str, tmp_path: Path
) -> None:
    def refuse_conditions(request: Request) -> Fault | None:
        conditional = {"if-match", "if-none-match"} & set(request.headers)
        return refusal(501, "NotImplemented") if conditional else None

    proxy.judge = refuse_conditions
    proxied = impatient(proxy.endpoint)
    assert probe(proxied, bucket).missing == "If-None-Match and If-Match"
    with pytest.raises(NotSupported):
        proxied.create(S3Location(bucket, "record"), b"{}")
    (tmp_path / "file").write_bytes(b"model")
    proxied.upload_file(tmp_path / "file", S3Location(bucket, "file"), only_over="")
    assert proxied.read(S3Location(bucket, "file")).body == b"model"


# ---- versions ------------------------------------------------------------------------------------


def test_the_requested_version_is_the_one_that_is_returned(
    s3_server: S3Server, s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    amazon = s3_server.client()
    amazon.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    old = amazon.put_object(Bucket=bucket, Key="a.jpg", Body=b"the old one")["VersionId"]
    amazon.put_object(Bucket=bucket, Key="a.jpg", Body=b"new")
    place = S3Location(bucket, "a.jpg")
    requests = [
        Input("old", place, version_id=old),
        Input("present", place),
        Input("none", place, version_id="5f2a7a1e-0000-4000-8000-000000000000"),
    ]
    fetched = download(s3, requests, tmp_path, max_bytes=100, stop=lambda: False)
    assert [each.path.read_bytes() for each in fetched if each.path] == [b"the old one", b"new"]
    assert fetched[2].problem
    sizes = object_sizes(s3, [(place, old), (place, None)], stop=lambda: False)
    assert sizes == (len(b"the old one"), len(b"new"))
