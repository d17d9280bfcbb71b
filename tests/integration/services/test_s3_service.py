"""Objects, folders and conditional writes against a real S3 server."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from jobs.addresses import S3Location
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from services.s3.s3_service import S3Service
from tests.integration.services.s3_proxy import Fault, S3Proxy, always, once, refusal
from utils.errors import (
    AccessDenied,
    LeaseLost,
    ObjectNotFound,
    ObjectTooLarge,
    PreconditionFailed,
    StorageError,
)
from utils.metrics import PREFIX, Metrics

MEBIBYTE = 1024**2


# ---- folders and objects -------------------------------------------------------------------------


def test_an_upload_carries_its_sha256_its_type_and_its_metadata(
    s3: S3Service, s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text("{}")
    location = S3Location(bucket, "models/report.json")
    etag = s3.upload_file(
        tmp_path / "report.json", location, metadata={"task_id": "t", "claim": "3"}
    )
    info = s3.head(location)
    assert (info.etag, info.size) == (etag, 2)
    assert info.metadata == {"task_id": "t", "claim": "3"}
    told = s3_server.client().head_object(Bucket=bucket, Key=location.key, ChecksumMode="ENABLED")
    assert told["ContentType"] == "application/json"
    assert told["ChecksumSHA256"] == "RBNvo1WzZ4oRRq0W9+hknpT7T8If536DEMBg9hyq/4o="


def test_the_checksum_travels_in_a_header_and_not_in_a_trailer_that_few_stores_know(
    bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    (tmp_path / "report.json").write_text("{}")
    proxied.upload_file(tmp_path / "report.json", S3Location(bucket, "report.json"))
    proxied.create(S3Location(bucket, "record.json"), b"{}")
    for sent in proxy.headers:
        assert sent["x-amz-checksum-sha256"] == "RBNvo1WzZ4oRRq0W9+hknpT7T8If536DEMBg9hyq/4o="
        assert "aws-chunked" not in sent.get("content-encoding", "")


def test_a_large_file_arrives_complete(s3: S3Service, bucket: str, tmp_path: Path) -> None:
    content = os.urandom(12 * MEBIBYTE)
    (tmp_path / "big").write_bytes(content)
    s3.upload_file(tmp_path / "big", S3Location(bucket, "big"))
    assert s3.download(S3Location(bucket, "big"), tmp_path / "deep" / "back") == len(content)
    assert (tmp_path / "deep" / "back").read_bytes() == content


def test_a_folder_goes_up_with_its_last_file_last_and_comes_back_the_same(
    bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    names = ["a.bin", "deep/b.bin", "manifest.json", "z.bin"]
    for name in names:
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_text(name)
    etags = proxied.upload_folder(
        tmp_path / "up", bucket, "checkpoints/t/epoch-0010/", last="manifest.json"
    )
    assert sorted(etags) == names
    assert proxy.requests[-1].endswith("/epoch-0010/manifest.json")
    proxied.write(S3Location(bucket, "checkpoints/t/epoch-0010x/other"), b"not of this folder")
    assert proxied.download_folder(bucket, "checkpoints/t/epoch-0010", tmp_path / "down") == 33
    assert {
        path.relative_to(tmp_path / "down").as_posix(): path.read_text()
        for path in (tmp_path / "down").rglob("*")
        if path.is_file()
    } == {name: name for name in names}


def test_if_one_file_fails_the_last_is_not_written(
    bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    for name in ("a.bin", "b.bin", "manifest.json"):
        (tmp_path / name).write_text(name)
    broken = refusal(500, "InternalError")
    proxy.fault = lambda method, path: broken if path.endswith("b.bin") else None
    with pytest.raises(StorageError):
        proxied.upload_folder(tmp_path, bucket, "c", last="manifest.json")
    assert not proxied.exists(S3Location(bucket, "c/manifest.json"))


def test_a_stopped_upload_writes_nothing_more(s3: S3Service, bucket: str, tmp_path: Path) -> None:
    for name in ("a.bin", "b.bin", "manifest.json"):
        (tmp_path / name).write_text(name)
    checks = iter((None, None, LeaseLost()))

    def check() -> None:
        if error := next(checks):
            raise error

    with pytest.raises(LeaseLost):
        s3.upload_folder(tmp_path, bucket, "c", last="manifest.json", check=check)
    assert {found.key for found in s3.list_objects(bucket, "c/")} == {"c/a.bin", "c/b.bin"}


def test_a_folder_without_its_last_file_is_not_uploaded(s3: S3Service, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json"):
        s3.upload_folder(tmp_path, "bucket", "c", last="manifest.json")


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../outside", "/etc/x", ".hidden", "a//b", "é"]
)
def test_no_key_becomes_a_local_path(s3: S3Service, bucket: str, tmp_path: Path, name: str) -> None:
    s3.write(S3Location(bucket, f"c/{name}"), b"evil")
    with pytest.raises(StorageError, match="not a file of this server"):
        s3.download_folder(bucket, "c", tmp_path / "in")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_or_too_large_is_not_downloaded(
    s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    with pytest.raises(ObjectNotFound):
        s3.download_folder(bucket, "none", tmp_path)
    s3.write(S3Location(bucket, "c/a"), b"12345")
    with pytest.raises(ObjectTooLarge):
        s3.download_folder(bucket, "c", tmp_path, max_bytes=4)
    assert not list(tmp_path.iterdir())


def test_a_listing_goes_on_over_its_pages(s3: S3Service, s3_server: S3Server, bucket: str) -> None:
    client = s3_server.client()
    keys = [f"jobs/{n:04d}" for n in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=bucket, Key=key, Body=b"1"), keys))
    s3.write(S3Location(bucket, "other"), b"2")
    listed = list(s3.list_objects(bucket, "jobs/"))
    assert [info.key for info in listed] == keys
    assert {info.size for info in listed} == {1}
    s3.delete(bucket, keys)
    assert not list(s3.list_objects(bucket, "jobs/"))


def test_deleting_a_missing_object_is_no_error(s3: S3Service, bucket: str) -> None:
    s3.delete(bucket, ["never", "was"])
    s3.delete(bucket, [])


def test_objects_that_could_not_be_deleted_are_reported(
    bucket: str, proxy: S3Proxy, proxied: S3Service
) -> None:
    error = b"<Error><Key>k</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
    proxy.fault = always(Fault(200, b"<DeleteResult>" + error + b"</DeleteResult>"))
    with pytest.raises(AccessDenied, match=f"s3://{bucket}/k"):
        proxied.delete(bucket, ["k"])


def test_a_copy_keeps_its_metadata_or_gets_another(s3: S3Service, bucket: str) -> None:
    source, target = S3Location(bucket, "a/ü b.json"), S3Location(bucket, "archive/x.json")
    s3.write(source, b"{}")
    s3.copy(source, source, metadata={"claim": "1"})
    etag = s3.copy(source, target)
    assert (s3.head(target).metadata, s3.head(target).etag) == ({"claim": "1"}, etag)
    s3.copy(source, target, metadata={"claim": "2"})
    assert s3.head(target).metadata == {"claim": "2"}
    with pytest.raises(ObjectNotFound):
        s3.copy(S3Location(bucket, "none"), target)


def test_an_existing_object_is_distinguished_from_a_missing_one(s3: S3Service, bucket: str) -> None:
    s3.write(S3Location(bucket, "a"), b"")
    assert s3.exists(S3Location(bucket, "a")) and not s3.exists(S3Location(bucket, "b"))


# ---- conditional writes --------------------------------------------------------------------------


def test_a_read_object_has_its_version_and_both_dates_of_s3(s3: S3Service, bucket: str) -> None:
    location = S3Location(bucket, "jobs/t.json")
    etag = s3.create(location, b"{}")
    stored = s3.read(location)
    assert (stored.body, stored.etag) == (b"{}", etag)
    assert stored.last_modified.tzinfo and stored.server_date.tzinfo
    assert timedelta(0) <= stored.server_date - stored.last_modified < timedelta(seconds=30)


def test_an_object_too_large_for_a_record_is_not_read(s3: S3Service, bucket: str) -> None:
    s3.write(S3Location(bucket, "a"), b"12345")
    with pytest.raises(ObjectTooLarge):
        s3.read(S3Location(bucket, "a"), max_bytes=4)


def test_create_fails_if_the_object_exists(s3: S3Service, bucket: str) -> None:
    location = S3Location(bucket, "a")
    s3.create(location, b"first")
    with pytest.raises(PreconditionFailed):
        s3.create(location, b"second")
    assert s3.read(location).body == b"first"


def test_replace_fails_over_another_version_and_without_an_object(
    s3: S3Service, bucket: str
) -> None:
    location = S3Location(bucket, "a")
    first = s3.create(location, b"first")
    second = s3.replace(location, b"second", first)
    with pytest.raises(PreconditionFailed):
        s3.replace(location, b"third", first)
    assert s3.read(location).etag == second
    s3.delete(bucket, ["a"])
    with pytest.raises(ObjectNotFound):
        s3.replace(location, b"third", second)


def test_a_file_can_be_uploaded_under_the_same_conditions(
    s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    location = S3Location(bucket, "a")
    (tmp_path / "a").write_text("one")
    first = s3.upload_file(tmp_path / "a", location, only_over="")
    with pytest.raises(PreconditionFailed):
        s3.upload_file(tmp_path / "a", location, only_over="")
    (tmp_path / "a").write_text("two")
    s3.upload_file(tmp_path / "a", location, only_over=first)
    with pytest.raises(PreconditionFailed):
        s3.upload_file(tmp_path / "a", location, only_over=first)
    assert s3.read(location).body == b"two"


@pytest.mark.parametrize("race", ["create", "replace"])
def test_of_many_writers_exactly_one_wins(s3: S3Service, bucket: str, race: str) -> None:
    location = S3Location(bucket, "lease")
    etag = s3.write(location, b"old") if race == "replace" else ""
    gate = threading.Barrier(8)

    def claim(number: int) -> bool:
        gate.wait()
        try:
            if etag:
                s3.replace(location, b"%d" % number, etag)
            else:
                s3.create(location, b"%d" % number)
            return True
        except PreconditionFailed:
            return False

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    assert won.count(True) == 1
    assert s3.read(location).body == b"%d" % won.index(True)


def test_a_conflict_of_conditional_writes_is_tried_again(
    bucket: str, proxy: S3Proxy, proxied: S3Service
) -> None:
    proxy.fault = once(refusal(409, "ConditionalRequestConflict"), "PUT")
    proxied.create(S3Location(bucket, "a"), b"mine")
    assert proxied.read(S3Location(bucket, "a")).body == b"mine"


def test_a_conflict_that_stays_is_a_failed_precondition(
    bucket: str, proxy: S3Proxy, proxied: S3Service
) -> None:
    proxy.fault = always(refusal(409, "ConditionalRequestConflict"))
    with pytest.raises(PreconditionFailed):
        proxied.create(S3Location(bucket, "a"), b"mine")
    assert len(proxy.requests) == 4


def test_a_lost_answer_is_never_a_success(
    s3: S3Service, bucket: str, proxy: S3Proxy, proxied: S3Service
) -> None:
    location = S3Location(bucket, "a")
    proxy.fault = once(Fault(reset=True), "PUT")
    with pytest.raises(PreconditionFailed):  # the SDK's second try finds the first one's work
        proxied.create(location, b"mine")
    assert s3.read(location).body == b"mine"
    proxy.fault = always(Fault(reset=True))
    with pytest.raises(StorageError):
        proxied.replace(location, b"again", s3.read(location).etag)


def test_a_write_that_never_arrived_is_repeated_and_succeeds(
    bucket: str, proxy: S3Proxy, proxied: S3Service
) -> None:
    proxy.fault = once(Fault(reset=True, forward=False), "PUT")
    etag = proxied.create(S3Location(bucket, "a"), b"mine")
    assert proxied.read(S3Location(bucket, "a")).etag == etag


# ---- metrics -------------------------------------------------------------------------------------


def test_requests_and_bytes_are_counted(s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    metrics = Metrics()
    s3 = S3Service(
        region=REGION,
        endpoint_url=s3_server.endpoint,
        access_key_id=ACCESS_KEY_ID,
        secret_access_key=SECRET_ACCESS_KEY,
        metrics=metrics,
    )

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"{PREFIX}_s3_{name}", labels)

    (tmp_path / "file").write_bytes(b"x" * 1000)
    place = S3Location(bucket, "folder/file")
    s3.upload_file(tmp_path / "file", place)
    s3.write(place, b"y" * 500)
    assert s3.read(place).body == b"y" * 500
    assert not s3.exists(S3Location(bucket, "nothing"))
    s3.reach(bucket)
    with pytest.raises(StorageError):
        s3.reach("no-such-bucket")
    assert value("bytes_total", direction="sent") == 1500
    assert value("bytes_total", direction="received") == 500
    assert value("requests_total", operation="put_object", outcome="2xx") == 2
    assert value("requests_total", operation="head_object", outcome="4xx") == 1
    assert value("requests_total", operation="head_bucket", outcome="4xx") == 1
    assert value("request_duration_seconds_count", operation="get_object") == 1


def test_a_request_without_an_answer_is_counted_too() -> None:
    metrics = Metrics()
    s3 = S3Service(
        region=REGION,
        endpoint_url="http://127.0.0.1:1",
        access_key_id=ACCESS_KEY_ID,
        secret_access_key=SECRET_ACCESS_KEY,
        attempts=1,
        metrics=metrics,
    )
    with pytest.raises(StorageError):
        s3.reach("bucket")
    labels = {"operation": "head_bucket", "outcome": "no_answer"}
    assert metrics.registry.get_sample_value(f"{PREFIX}_s3_requests_total", labels) == 1


# ---- versions ------------------------------------------------------------------------------------


def test_a_copy_of_a_version_is_refused_once_the_source_has_another(
    s3: S3Service, bucket: str
) -> None:
    source, target = S3Location(bucket, "a b/source ü.txt"), S3Location(bucket, "target.txt")
    seen = s3.write(source, b"older")
    s3.copy(source, target, etag=seen)
    s3.write(source, b"newer")
    with pytest.raises(PreconditionFailed):
        s3.copy(source, target, etag=seen)
    assert s3.read(target).body == b"older"
    s3.delete(bucket, [source.key])
    with pytest.raises(ObjectNotFound):
        s3.copy(source, target, etag=seen)


def test_a_version_is_deleted_only_while_the_object_has_it(s3: S3Service, bucket: str) -> None:
    location = S3Location(bucket, "file.txt")
    older = s3.write(location, b"older")
    newer = s3.write(location, b"newer")
    with pytest.raises(PreconditionFailed):
        s3.delete_version(location, older)
    assert s3.exists(location)
    s3.delete_version(location, newer)
    s3.delete_version(location, newer)  # a missing object is no error
    assert not s3.exists(location)


def test_a_store_without_conditional_deletes_still_deletes(
    s3: S3Service, bucket: str, proxy: S3Proxy, proxied: S3Service
) -> None:
    location = S3Location(bucket, "file.txt")
    etag = s3.write(location, b"content")
    proxy.fault = once(refusal(501, "NotImplemented"), "DELETE")
    proxied.delete_version(location, etag)
    assert not s3.exists(location)
    assert [("if-match" in sent) for sent in proxy.headers] == [True, False]


def test_a_download_of_a_version_is_refused_once_the_object_has_another(
    s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    location = S3Location(bucket, "file.txt")
    seen = s3.write(location, b"older")
    assert s3.download(location, tmp_path / "file", etag=seen) == 5
    s3.write(location, b"newer")
    with pytest.raises(PreconditionFailed):
        s3.download(location, tmp_path / "other", etag=seen)
    assert not (tmp_path / "other").exists()
