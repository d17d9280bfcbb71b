"""Every spelling of an image's address, and texts that are not addresses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from consumer.life import inputs as images
from consumer.life.stop_signal import StopSignal
from jobs.addresses import S3Location
from jobs.message import from_understood
from tests.memory_s3 import MemoryS3
from tests.unit.jobs.message_samples import (
    BUCKET,
    ENDPOINT,
    SETTINGS,
    envelope,
    flat,
    make_settings,
    read,
    refused,
    style_kind,
)


@pytest.mark.parametrize(
    ("address", "bucket", "key"),
    [
        ("s3://second-bucket/a/b.jpg", "second-bucket", "a/b.jpg"),
        ("S3://second-bucket/100%25.jpg", "second-bucket", "100%25.jpg"),
        ("gs://second-bucket/a.jpg", "second-bucket", "a.jpg"),
        ("training/11/image 2.jpg", BUCKET, "training/11/image 2.jpg"),
        ("photo:1.jpg", BUCKET, "photo:1.jpg"),
        (f"https://{BUCKET}.s3.ap-northeast-2.amazonaws.com/a%20b.jpg", BUCKET, "a b.jpg"),
        (f"https://{BUCKET}.s3.amazonaws.com/%EC%88%98.jpg", BUCKET, "수.jpg"),
        (f"https://{BUCKET}.s3-us-west-2.amazonaws.com/a+b.jpg", BUCKET, "a+b.jpg"),
        (f"https://{BUCKET}.s3.dualstack.eu-west-1.amazonaws.com/a.jpg", BUCKET, "a.jpg"),
        (f"https://{BUCKET}.s3-accelerate.amazonaws.com/a.jpg", BUCKET, "a.jpg"),
        (f"https://{BUCKET}.s3.cn-north-1.amazonaws.com.cn/a.jpg", BUCKET, "a.jpg"),
        (f"https://{BUCKET}.s3.us-gov-west-1.amazonaws.com:443/a.jpg", BUCKET, "a.jpg"),
        ("https://with.dots.s3.eu-west-1.amazonaws.com/a.jpg", "with.dots", "a.jpg"),
        (f"https://s3.ap-northeast-2.amazonaws.com/{BUCKET}/a/b.jpg", BUCKET, "a/b.jpg"),
        (f"https://s3.amazonaws.com/{BUCKET}/a.jpg", BUCKET, "a.jpg"),
        (f"https://s3-eu-west-1.amazonaws.com/{BUCKET}/a.jpg", BUCKET, "a.jpg"),
        (f"https://S3.Amazonaws.com/{BUCKET}/a.jpg", BUCKET, "a.jpg"),
        (f"{ENDPOINT}/{BUCKET}/a.jpg", BUCKET, "a.jpg"),
        (f"http://{BUCKET}.127.0.0.1:9000/a.jpg", BUCKET, "a.jpg"),
    ],
)
def test_every_way_of_writing_an_address_is_understood(address: str, bucket: str, key: str) -> None:
    image = read(flat(image_urls=[address])).spec.images[0]
    assert image.location == S3Location(bucket, key)
    assert image.source.lower() == address.lower()


def test_a_signature_in_an_address_is_not_kept() -> None:
    address = f"https://{BUCKET}.s3.amazonaws.com/a.jpg"
    job = read(flat(image_urls=[address + "?X-Amz-Signature=secret#part"]))
    assert job.spec.images[0].source == address
    assert "secret" not in json.dumps(job.understood())


OBJECT = f"https://{BUCKET}.s3.amazonaws.com/a.jpg"


@pytest.mark.parametrize(
    ("query", "version"),
    [
        ("versionId=3HL4kqtJlcpXroDTDmJ-rmSpXd3dIbrHY", "3HL4kqtJlcpXroDTDmJ-rmSpXd3dIbrHY"),
        ("versionId=a%2Fb%3D&X-Amz-Signature=secret", "a/b="),
        ("X-Amz-Expires=60&versionid=null", "null"),
        ("X-Amz-Signature=secret", None),
    ],
)
def test_a_version_in_an_address_is_kept_through_record_and_message(
    query: str, version: str | None
) -> None:
    job = read(flat(image_urls=[f"{OBJECT}?{query}"]))
    assert job.spec.images[0].version_id == version
    assert job.spec.images[0].location == S3Location(BUCKET, "a.jpg")
    assert "secret" not in json.dumps(job.understood())
    again = from_understood(style_kind(), json.loads(json.dumps(job.understood())))
    assert again.spec.images == job.spec.images and again.spec.images[0].version_id == version
    assert read(again.body).spec.images[0].version_id == version


def test_the_version_is_asked_for_when_the_images_are_fetched(tmp_path: Path) -> None:
    asked: list[str | None] = []

    class Store(MemoryS3):
        """Has every object, and notes the requested version."""

        def download(self, location: S3Location, path: Path, **options: Any) -> int:
            del location, path
            asked.append(options["version_id"])
            return 0

    job = read(
        flat(
            image_urls=[f"{OBJECT}?versionId=7", OBJECT],
            validation_images=[f"{OBJECT}?versionId=8"],
        )
    )
    store, stop = Store(), StopSignal()
    inputs = style_kind().inputs(job.spec)
    fetched = images.fetch_inputs(store, inputs, tmp_path, max_bytes=10**6, stop=stop)
    assert sorted(asked[:2], key=str) == ["7", None] and asked[2:] == ["8"]
    assert (
        fetched[0].input.source == f"{OBJECT}?versionId=7"
    ), "the report shows which version it was"


def test_a_version_adds_no_field_to_the_record_that_earlier_releases_would_refuse() -> None:
    plain = read(flat(image_urls=[OBJECT])).understood()["images"][0]
    versioned = read(flat(image_urls=[f"{OBJECT}?versionId=1"])).understood()["images"][0]
    assert plain.keys() == versioned.keys() == {"source", "location", "problem"}
    assert plain["location"] == versioned["location"]


def test_two_versions_of_an_image_are_not_the_same_job() -> None:
    one, other, none = (
        read(flat(task_id="t", image_urls=[OBJECT + query])).identity
        for query in ("?versionId=1", "?versionId=2", "")
    )
    assert len({one, other, none}) == 3
    signed = read(flat(task_id="t", image_urls=[f"{OBJECT}?X-Amz-Signature=1"]))
    assert signed.identity == none


def test_a_question_mark_of_an_s3_address_is_part_of_the_key() -> None:
    image = read(flat(image_urls=[f"s3://{BUCKET}/what?versionId=1.jpg"])).spec.images[0]
    assert image.location == S3Location(BUCKET, "what?versionId=1.jpg")
    assert image.version_id is None


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("versionId=", "names no valid version"),
        ("versionId=1&versionId=2", "names no valid version, or several"),
        ("versionId=%00", "names no valid version"),
        ("versionId=" + "1" * 1025, "names no valid version"),
        ("partNumber=2", "'partNumber'"),
        ("torrent", "'torrent'"),
        ("generation=17", "'generation'"),
        ("&".join(f"a{n}=1" for n in range(101)), "more than 100"),
    ],
)
def test_an_address_that_does_not_name_an_object_is_left_out_with_the_reason(
    query: str, says: str
) -> None:
    job = read(flat(image_urls=[f"s3://{BUCKET}/ok.jpg", f"{OBJECT}?{query}"]))
    broken = job.spec.images[1]
    assert broken.location is None and says in (broken.problem or "")


def test_no_other_part_of_an_address_is_dropped_without_a_notice() -> None:
    signature = "X-Amz-Signature=s&X-Goog-Date=d&AWSAccessKeyId=k&Expires=1&response-content-type=t"
    job = read(
        flat(
            image_urls=[f"{OBJECT}?{signature}", f"{OBJECT}?width=640&v=2&width=8#left"],
            validation_images=[f"{OBJECT}?crop=1"],
        )
    )
    assert job.ignored_fields == (
        "image_urls.1?width",
        "image_urls.1?v",
        "image_urls.1#",
        "validation_images.0?crop",
    )
    assert all(image.location for image in job.spec.images)


@pytest.mark.parametrize("name", ["aws_endpoint_url_s3", "aws_endpoint_url"])
def test_addresses_of_the_store_are_recognised_by_either_name_of_its_endpoint(name: str) -> None:
    values = {"aws_endpoint_url_s3": None, name: "https://minio.example"}
    settings = make_settings(**values)
    image = read(flat(image_urls=[f"https://minio.example/{BUCKET}/a.jpg"]), settings=settings)
    assert image.spec.images[0].location == S3Location(BUCKET, "a.jpg")


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "file:/etc/passwd",
        "data:image/png;base64,AAAA",
        "ftp://stylelicense-media/a.jpg",
        "/etc/passwd",
        "s3://second-bucket-of-another/a/../b.jpg",
        "https://example.com/stylelicense-media/a.jpg",
        f"https://{BUCKET}.s3.amazonaws.com.evil.example/a.jpg",
        f"https://{BUCKET}.s3.amazonaws.com:8443/a.jpg",
        f"https://user:secret@{BUCKET}.s3.amazonaws.com/a.jpg",
        f"http://{BUCKET}.s3.amazonaws.com/a.jpg",
        f"https://127.0.0.1:9000/{BUCKET}/a.jpg",
        "https://stylelicense-media.s3-website-us-east-1.amazonaws.com/a.jpg",
    ],
)
def test_an_address_that_points_elsewhere_makes_the_message_invalid(address: str) -> None:
    error = refused(envelope(images=["s3://stylelicense-media/ok.jpg", address]))
    assert error.field == "data.images.1"
    assert "secret" not in str(error)


BROKEN = [
    "",
    " ",
    None,
    "s3://stylelicense-media",
    "s3://stylelicense-media/",
    "s3://stylelicense-media/folder/",
    "s3:///a.jpg",
    "s3://UPPER/a.jpg",
    "s3://stylelicense-media/a/../b.jpg",
    "s3://stylelicense-media/../second-bucket/b.jpg",
    f"https://s3.amazonaws.com/{BUCKET}/%2E%2E/somebody-elses/a.jpg",
    "s3://stylelicense-media/a\x00.jpg",
    "s3://stylelicense-media/" + "수" * 342,
    "x" * 8193,
    "https://[::1/a.jpg?X-Amz-Signature=secret",
    "https://s3.amazonaws.com:99999/a/b.jpg",
    f"https://s3.amazonaws.com/{BUCKET}/%FF.jpg",
    f"https://s3.amazonaws.com/{BUCKET}/a%0Ab.jpg",
]


@pytest.mark.parametrize("address", BROKEN)
def test_a_broken_address_costs_one_image_and_has_a_reason(address: str | None) -> None:
    job = read(envelope(images=["s3://stylelicense-media/ok.jpg", address], captions=None))
    sound, broken = job.spec.images
    assert sound.location == S3Location(BUCKET, "ok.jpg") and sound.problem is None
    assert broken.location is None and "has an address that" in (broken.problem or "")
    assert "secret" not in repr(job)
    assert from_understood(style_kind(SETTINGS), job.understood()) == job


@pytest.mark.parametrize("address", BROKEN)
def test_a_message_without_a_valid_address_is_invalid(address: str | None) -> None:
    error = refused(envelope(images=[address, address], captions=None))
    assert error.field == "data.images.0"


def test_spaces_around_an_address_are_ignored() -> None:
    image = read(flat(image_urls=[" s3://stylelicense-media/a b.jpg "])).spec.images[0]
    assert image.location == S3Location(BUCKET, "a b.jpg")


def test_a_bucket_outside_the_allowlist_is_named() -> None:
    error = refused(flat(image_urls=["gs://somebody-elses-bucket/a.jpg"]))
    assert "'somebody-elses-bucket'" in str(error)
    assert "IMAGE_BUCKETS" in str(error)
