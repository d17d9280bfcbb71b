"""Images from a real S3 server, some of the time behind a proxy that breaks things."""

from __future__ import annotations

import errno
import gzip
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consumer.life import inputs
from jobs.addresses import S3Location
from jobs.kinds import Fetched, Input
from jobs.style import caption_beside
from sandbox.s3_server import S3Server
from services.s3 import body as s3_body
from services.s3.s3_service import S3Service
from tests.integration.services.s3_proxy import (
    Fault,
    S3Proxy,
    always,
    impatient,
    once,
    refusal,
)
from utils.errors import (
    AccessDenied,
    DiskFull,
    MachineError,
    StorageError,
    TrainingServerError,
)

MEBIBYTE = 1024**2


def never() -> bool:
    """No stop is requested."""
    return False


def fetch(
    s3: S3Service,
    folder: Path,
    bucket: str,
    *keys: str,
    max_bytes: int = MEBIBYTE,
    stop: Callable[[], bool] = never,
) -> tuple[Fetched, ...]:
    """Fetch images that have no captions in the message."""
    places = [S3Location(bucket, key) for key in keys]
    wanted = [Input(each.uri(), each, text_source=caption_beside(each)) for each in places]
    return inputs.download(s3, wanted, folder, max_bytes=max_bytes, stop=stop)


def test_images_are_in_the_order_of_the_requests_under_generated_names(
    s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    keys = [
        "a/same.jpg",
        "b/same.jpg",
        "../../etc/passwd",
        "/etc/x.png",
        "한글 é.jpg",
        "a/same.jpg",
    ]
    for key in set(keys):
        s3.write(S3Location(bucket, key), key.encode())
    fetched = fetch(s3, tmp_path / "job", bucket, *keys)
    assert [each.path.name for each in fetched if each.path] == [f"{n:04d}.img" for n in range(6)]
    assert [each.path.read_bytes().decode() for each in fetched if each.path] == keys
    assert sorted(tmp_path.iterdir()) == [tmp_path / "job"]
    assert len(list((tmp_path / "job").iterdir())) == 6


def test_a_missing_image_is_reported_and_the_others_are_downloaded(
    s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    s3.write(S3Location(bucket, "there.jpg"), b"image")
    requests = [
        Input("gone", S3Location(bucket, "gone.jpg")),
        Input("there", S3Location(bucket, "there.jpg")),
        Input("no bucket", S3Location("no-such-bucket", "there.jpg")),
        Input("no key", S3Location(bucket, "")),
        Input("half a letter", S3Location(bucket, "\ud800.jpg")),
        Input("long", S3Location(bucket, "x" * 1100)),
    ]
    fetched = inputs.download(s3, requests, tmp_path, max_bytes=100, stop=never)
    assert [each.input.source for each in fetched] == [each.source for each in requests]
    assert [each.path is not None for each in fetched] == [False, True] + 4 * [False]
    assert {each.problem for each in fetched if not each.path} == {inputs.NOT_FOUND}
    assert [path.name for path in tmp_path.iterdir()] == ["0001.img"]


def test_an_image_that_declares_too_many_bytes_is_refused_before_it_is_read(
    s3: S3Service, bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    s3.write(S3Location(bucket, "big.jpg"), b"x" * 5000)
    proxy.fault = always(Fault(drip=0.01))  # it would take 50 seconds
    began = time.monotonic()
    (fetched,) = fetch(proxied, tmp_path, bucket, "big.jpg", max_bytes=4096)
    assert time.monotonic() - began < 5
    assert fetched.path is None
    assert fetched.problem == "is too large: send a file of at most 4 KiB"
    assert not list(tmp_path.iterdir())


def test_an_image_without_a_declared_size_is_cut_off_at_the_limit(
    s3: S3Service, bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    s3.write(S3Location(bucket, "big.jpg"), b"x" * 200_000)
    proxy.fault = always(Fault(no_length=True))
    (fetched,) = fetch(proxied, tmp_path, bucket, "big.jpg", max_bytes=100_000)
    assert fetched.problem and "too large" in fetched.problem
    assert not list(tmp_path.iterdir())


def test_an_image_of_exactly_the_limit_is_taken(s3: S3Service, bucket: str, tmp_path: Path) -> None:
    s3.write(S3Location(bucket, "a.jpg"), b"x" * 4096)
    assert fetch(s3, tmp_path, bucket, "a.jpg", max_bytes=4096)[0].path


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        (b"a harbour\n at dawn \n", "a harbour at dawn"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        (b"caf\xe9", None),
        ("빨간 집".encode("cp949"), None),
        ("빨간 집, ink".encode("utf-16"), "빨간 집, ink"),
        ("a harbour".encode("utf-16-le"), "a harbour"),
        (b"", None),
        (b" \n", None),
        (b"x" * (16 * 1024 + 1), None),
        (b"x" * (16 * 1024), "x" * (16 * 1024)),
        (None, None),
    ],
)
def test_the_text_file_next_to_an_image_is_its_caption(
    s3: S3Service, bucket: str, tmp_path: Path, text: bytes | None, caption: str | None
) -> None:
    s3.write(S3Location(bucket, "a.b/one.two.jpg"), b"image")
    if text is not None:
        s3.write(S3Location(bucket, "a.b/one.two.txt"), text)
    (fetched,) = fetch(s3, tmp_path, bucket, "a.b/one.two.jpg")
    assert (fetched.text, fetched.problem) == (caption, None)
    # A file that exists but is not used has a reason. A missing or empty file has none.
    assert bool(fetched.text_problem) == (caption is None and bool(text and text.strip()))


@pytest.mark.parametrize(
    ("image", "caption"),
    [
        ("a/b.png", "a/b.TXT"),
        ("a/b.png", "a/b.caption"),
        ("a/b.png", "a/b.png.txt"),
        ("a/\u00e9.png", "a/e\u0301.txt"),
        ("a/e\u0301.png", "a/\u00e9.png.txt"),
    ],
)
def test_a_caption_is_found_under_the_other_names_that_people_give_it(
    s3: S3Service, bucket: str, tmp_path: Path, image: str, caption: str
) -> None:
    s3.write(S3Location(bucket, image), b"image")
    s3.write(S3Location(bucket, caption), b"a harbour")
    assert fetch(s3, tmp_path, bucket, image)[0].text == "a harbour"


def put_as_gzip(server: S3Server, bucket: str, key: str, body: bytes) -> None:
    """Store an object with `Content-Encoding: gzip`."""
    server.client().put_object(Bucket=bucket, Key=key, Body=body, ContentEncoding="gzip")


@pytest.mark.parametrize(
    ("body", "content"),
    [
        (gzip.compress(b"image" * 20_000), b"image" * 20_000),
        (b"not compressed at all", b"not compressed at all"),
        (b"x", b"x"),
        (b"", b""),
        (gzip.compress(bytes(4 * MEBIBYTE)), None),
    ],
    ids=["gzip", "only said", "one byte", "empty", "bomb"],
)
def test_an_object_that_is_stored_as_gzip_is_unpacked_within_the_limit(
    s3_server: S3Server,
    bucket: str,
    tmp_path: Path,
    s3: S3Service,
    body: bytes,
    content: bytes | None,
) -> None:
    put_as_gzip(s3_server, bucket, "a.jpg", body)
    put_as_gzip(s3_server, bucket, "a.txt", gzip.compress("항구".encode()))
    (fetched,) = fetch(s3, tmp_path, bucket, "a.jpg")
    if content is None:
        assert fetched.problem and "too large" in fetched.problem
    else:
        assert fetched.path and fetched.path.read_bytes() == content
        assert fetched.text == "항구"


def test_a_caption_in_the_message_wins_and_no_file_is_looked_for(
    s3: S3Service, bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    s3.write(S3Location(bucket, "a.jpg"), b"image")
    s3.write(S3Location(bucket, "a.txt"), b"another")
    request = Input("a", S3Location(bucket, "a.jpg"), text="")
    (fetched,) = inputs.download(proxied, [request], tmp_path, max_bytes=100, stop=never)
    assert fetched.text == ""
    assert proxy.requests == [f"GET /{bucket}/a.jpg"]


def test_a_forbidden_caption_is_ignored(
    s3: S3Service, bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    s3.write(S3Location(bucket, "a.jpg"), b"image")
    forbidden = refusal(403, "AccessDenied")
    proxy.fault = lambda method, path: forbidden if path.endswith(".txt") else None
    (fetched,) = fetch(proxied, tmp_path, bucket, "a.jpg")
    assert fetched.path and fetched.text is None


@pytest.mark.parametrize(
    ("key", "beside"),
    [("a/b.jpg", "a/b.txt"), ("a.b/c", "a.b/c.txt"), ("x", "x.txt"), (".hidden", ".hidden.txt")],
)
def test_a_caption_file_has_the_same_name_with_another_suffix(key: str, beside: str) -> None:
    found = caption_beside(S3Location("b", key))
    assert found and found.places[0] == S3Location("b", beside)


def test_one_forbidden_image_is_left_out(
    s3: S3Service, bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    for key in ("a.jpg", "b.jpg"):
        s3.write(S3Location(bucket, key), b"image")
    forbidden = refusal(403, "AccessDenied")
    proxy.fault = lambda method, path: forbidden if path.endswith("a.jpg") else None
    first, second = fetch(proxied, tmp_path, bucket, "a.jpg", "b.jpg")
    assert first.problem == inputs.REFUSED and second.path


def test_when_every_image_is_forbidden_the_policy_is_at_fault(
    bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    proxy.fault = always(refusal(403, "AccessDenied"))
    with pytest.raises(AccessDenied, match=bucket):
        fetch(proxied, tmp_path, bucket, "a.jpg", "b.jpg")


@pytest.mark.parametrize(
    "fault",
    [
        refusal(503, "SlowDown"),
        refusal(500, "InternalError"),
        refusal(403, "InvalidAccessKeyId"),
        refusal(403, "SignatureDoesNotMatch"),
        Fault(reset=True),
        Fault(keep=10),
    ],
    ids=["slow down", "500", "key", "secret", "reset", "half a body"],
)
def test_if_s3_as_a_whole_fails_it_is_a_storage_error_and_no_partial_file_remains(
    s3: S3Service, bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service, fault: Fault
) -> None:
    keys = [f"{n}.jpg" for n in range(30)]
    for key in keys:
        s3.write(S3Location(bucket, key), b"x" * 100)
    proxy.fault = lambda method, path: fault if path.endswith("/3.jpg") else None
    with pytest.raises(StorageError) as caught:
        fetch(proxied, tmp_path, bucket, *keys)
    assert not isinstance(caught.value, AccessDenied)
    assert not list(tmp_path.glob("*.part"))


def test_an_unreachable_s3_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="could not be reached"):
        fetch(impatient("http://127.0.0.1:1"), tmp_path, "bucket", "a.jpg")


def test_a_body_that_breaks_off_is_fetched_again(
    s3: S3Service, bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    s3.write(S3Location(bucket, "a.bin"), bytes(range(256)) * 1000)
    proxy.fault = once(Fault(keep=100_000), "GET")
    assert proxied.download(S3Location(bucket, "a.bin"), tmp_path / "a") == 256_000
    assert (tmp_path / "a").read_bytes() == bytes(range(256)) * 1000
    assert len(proxy.requests) == 2


def test_a_changed_body_is_noticed_by_its_checksum(
    s3: S3Service, bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    s3.write(S3Location(bucket, "a.bin"), b"x" * 1000)
    proxy.fault = always(Fault(flip=True))
    with pytest.raises(StorageError, match="checksum"):
        proxied.download(S3Location(bucket, "a.bin"), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_body_that_arrives_too_slowly_is_given_up(
    s3: S3Service,
    bucket: str,
    tmp_path: Path,
    proxy: S3Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3.write(S3Location(bucket, "a.bin"), b"x" * 1000)
    proxy.fault = always(Fault(drip=0.05))
    monkeypatch.setattr(s3_body, "GRACE_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(StorageError):
        impatient(proxy.endpoint, attempts=1).download(S3Location(bucket, "a.bin"), tmp_path / "a")
    assert time.monotonic() - began < 5


def test_after_one_storage_error_no_further_download_begins(
    bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    broken, slow = refusal(403, "InvalidAccessKeyId"), Fault(delay=0.2)
    proxy.fault = lambda method, path: broken if path.endswith("/0.jpg") else slow
    with pytest.raises(StorageError):
        fetch(proxied, tmp_path, bucket, *(f"{n}.jpg" for n in range(60)))
    assert len(proxy.requests) < 30


def test_an_earlier_stop_fetches_nothing(
    bucket: str, tmp_path: Path, proxy: S3Proxy, proxied: S3Service
) -> None:
    fetched = fetch(proxied, tmp_path, bucket, "a.jpg", "b.jpg", stop=lambda: True)
    assert {each.problem for each in fetched} == {inputs.STOPPED}
    assert not proxy.requests


def test_a_download_can_be_ended_between_two_chunks(
    s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    s3.write(S3Location(bucket, "a.bin"), b"x" * 1_000_000)

    def watch() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s3.download(S3Location(bucket, "a.bin"), tmp_path / "a", watch=watch)
    assert not list(tmp_path.iterdir())


def test_a_stop_ends_downloads_between_two_chunks(
    s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    keys = [f"{n}.jpg" for n in range(20)]
    for key in keys:
        s3.write(S3Location(bucket, key), b"x" * 200_000)
    asked = iter(range(1000))
    fetched = fetch(s3, tmp_path, bucket, *keys, stop=lambda: next(asked) > 10)
    stopped = [each for each in fetched if each.problem == inputs.STOPPED]
    assert stopped and len(fetched) == 20
    assert not list(tmp_path.glob("*.part"))


class _FullDisk:
    """Opens as a file and has no room."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, *_: object, **__: object) -> Any:
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, MachineError)],
)
def test_errors_of_the_disk_are_errors_of_the_machine(
    s3: S3Service,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[TrainingServerError],
) -> None:
    s3.write(S3Location(bucket, "a.jpg"), b"image")
    monkeypatch.setattr(Path, "open", _FullDisk(number))
    with pytest.raises(error) as caught:
        fetch(s3, tmp_path, bucket, "a.jpg", "b.jpg")
    assert str(tmp_path) not in str(caught.value)


def test_a_full_disk_is_reported_as_such_and_leaves_no_partial_file(
    s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    s3.write(S3Location(bucket, "a.jpg"), b"image")
    (tmp_path / "a.part").symlink_to("/dev/full")
    with pytest.raises(DiskFull):
        s3.download(S3Location(bucket, "a.jpg"), tmp_path / "a")
    assert not list(tmp_path.iterdir())
