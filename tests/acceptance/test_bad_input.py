"""Bad messages, images and answers do not stop the worker, and none is lost."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from sandbox.worker_process import WorkerProcess
from tests.acceptance.world import World, log_lines, until

INVALID = Path(__file__).resolve().parents[1] / "contract" / "messages" / "invalid"
FIELDS = {
    "epochs_out_of_range.json": ("INVALID_MESSAGE", "data.parameters.epochs"),
    "foreign_bucket.json": ("INVALID_MESSAGE", "image_urls.0"),
    "image_is_a_local_path.json": ("INVALID_MESSAGE", "image_urls.0"),
    "no_images.json": ("INVALID_MESSAGE", "image_urls"),
    "no_style_id.json": ("INVALID_MESSAGE", "style_id"),
    "not_an_object.json": ("INVALID_MESSAGE", "object"),
    "not_json.txt": ("INVALID_MESSAGE", "JSON"),
    "other_type.json": ("UNKNOWN_TYPE", "type"),
    "style_id_is_text.json": ("INVALID_MESSAGE", "style_id"),
    "task_id_is_a_path.json": ("INVALID_MESSAGE", "task_id"),
    "unknown_parameter.json": ("INVALID_MESSAGE", "data.parameters.epoch"),
}


def test_every_invalid_message_of_the_contract_is_covered_here() -> None:
    assert {path.name for path in INVALID.iterdir()} == set(FIELDS)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_an_invalid_message_is_in_the_dead_queue_with_a_code_and_the_field(
    world: World, worker: WorkerProcess, name: str
) -> None:
    body = (INVALID / name).read_bytes()
    world.publish(body)
    properties, dead = until(lambda: world.take(f"{world.queue}.dead"))
    code, field = FIELDS[name]
    assert dead == body
    assert properties.headers["x-error-code"] == code
    assert field in properties.headers["x-error-message"]
    assert properties.delivery_mode == 2
    assert worker.exit_code is None


def test_the_job_behind_them_completes_and_a_readable_style_is_reported_once(
    world: World, worker: WorkerProcess
) -> None:
    message = world.envelope(style_id=11)
    world.publish(message)
    assert world.ending(message["task_id"])[0] == "complete"
    told = {each.body["style_id"]: each.body for each in world.backend.endings() if each.accepted}
    assert told[10]["error_code"] == "INVALID_MESSAGE"
    assert 123 not in told, "the style of another kind of message may be a finished one"
    assert worker.exit_code is None


def test_a_task_id_that_comes_again_with_another_body_is_refused_and_the_first_job_untouched(
    world: World, worker: WorkerProcess
) -> None:
    first = world.envelope(style_id=12)
    world.publish(first)
    world.ending(first["task_id"])
    world.publish(world.envelope(style_id=13) | {"task_id": first["task_id"]})
    properties, _ = until(lambda: world.take(f"{world.queue}.dead"))
    assert properties.headers["x-error-code"] == "INVALID_MESSAGE"
    assert "task_id" in properties.headers["x-error-message"]
    assert len({each.webhook_id for each in world.backend.endings(first["task_id"])}) == 1
    assert worker.exit_code is None


def test_files_that_are_not_images_are_left_out_by_name_and_the_job_goes_on(
    world: World, worker: WorkerProcess
) -> None:
    bad = _bad_images(world)
    message = world.envelope(
        style_id=14, images=[*world.photographs[:3], *bad], captions=None, tags=["ink"]
    )
    world.publish(message)
    kind, ending = world.ending(message["task_id"])
    assert kind == "complete", ending
    report = json.loads(world.read(world.media, "models/style_14/training_report.json"))
    assert [each["status"] for each in report["pictures"][3:]] == ["left_out"] * len(bad)
    assert all(image["reasons"] for image in report["pictures"] if image["status"] == "left_out")
    assert worker.exit_code is None


def test_a_line_that_a_c_library_prints_about_an_image_reaches_the_log_as_json(
    world: World, worker: WorkerProcess
) -> None:
    whole = io.BytesIO()
    Image.effect_noise((96, 96), 100).save(whole, "TIFF", compression="tiff_lzw")
    content = bytearray(whole.getvalue())
    content[2000:2040] = b"\xff" * 40
    bad = world.upload("broken.tif", bytes(content))
    message = world.envelope(style_id=18, images=[*world.photographs[:3], bad], captions=None)
    world.publish(message)
    assert world.ending(message["task_id"])[0] == "complete"
    said = [line["text"] for line in log_lines(worker, "native_stderr")]
    assert any(".tif: Using code not yet in table" in text for text in said)
    for line in worker.log.read_text(encoding="utf-8").splitlines():
        assert isinstance(json.loads(line), dict)


def test_too_few_good_images_end_in_low_quality_data_that_names_them(
    world: World, worker: WorkerProcess
) -> None:
    bad = _bad_images(world)[:-2]  # all but those that are not there
    message = world.envelope(style_id=15, images=[*world.photographs[:2], *bad], captions=None)
    world.publish(message)
    kind, ending = world.ending(message["task_id"])
    assert (kind, ending["error_code"]) == ("failed", "LOW_QUALITY_DATA")
    for source in bad:
        assert source.rsplit("/", 1)[1] in ending["error_message"]
    assert str(world.folder) not in ending["error_message"]
    assert ending["retryable"] is False
    assert worker.exit_code is None


def test_too_few_fetched_images_end_in_image_download_failed(
    world: World, worker: WorkerProcess
) -> None:
    missing = [f"s3://{world.media}/nowhere/{number}.jpg" for number in range(3)]
    message = world.envelope(style_id=16, images=[*world.photographs[:2], *missing], captions=None)
    world.publish(message)
    kind, ending = world.ending(message["task_id"])
    assert (kind, ending["error_code"]) == ("failed", "IMAGE_DOWNLOAD_FAILED")
    assert "nowhere/2.jpg" in ending["error_message"]
    assert worker.exit_code is None


def test_two_images_of_the_same_name_do_not_collide(world: World, worker: WorkerProcess) -> None:
    photographs = [world.read(world.media, url.split("/", 3)[3]) for url in world.photographs[:3]]
    sources = [
        world.upload(f"folder-{number}/same.jpg", content)
        for number, content in enumerate(photographs)
    ]
    message = world.envelope(style_id=17, images=sources, captions=None)
    world.publish(message)
    assert world.ending(message["task_id"])[0] == "complete"
    report = json.loads(world.read(world.media, "models/style_17/training_report.json"))
    assert len({(each["width"], each["height"]) for each in report["pictures"]}) == 3
    assert worker.exit_code is None


def test_a_backend_that_is_broken_at_first_still_gets_the_ending(
    world: World, worker: WorkerProcess
) -> None:
    soon = {"Retry-After": "1"}
    answers = iter([(500, soon, b"broken"), (429, soon, b"<html>")])
    world.backend.answer = lambda request: (
        next(answers, None) if not request.path.endswith("progress") else (500, {}, b"broken")
    )
    try:
        message = world.envelope(style_id=18)
        world.publish(message)
        world.ending(message["task_id"])
    finally:
        world.backend.answer = None
    heard = world.backend.endings(message["task_id"])
    assert len(heard) == 3
    assert len({each.webhook_id for each in heard}) == 1
    assert worker.exit_code is None


def test_an_ending_that_the_backend_refuses_is_kept_with_the_message_as_it_was_sent(
    world: World, worker: WorkerProcess
) -> None:
    world.backend.answer = lambda request: (422, {}, b'{"error": "unknown style"}')
    empty = world.upload("nothing.jpg", b"")
    body = b'{ "task_id": "refused-1", "style_id": 19, "extra": 1, "image_urls": ["%s"] }'
    body = body.replace(b"%s", empty.encode())
    try:
        world.publish(body, headers={"tenant": "abc"})
        properties, dead = until(lambda: world.take(f"{world.queue}.dead"))
    finally:
        world.backend.answer = None
    assert dead == body
    assert properties.headers["x-error-code"] == "WEBHOOK_REJECTED"
    assert "422" in properties.headers["x-error-message"]
    assert properties.headers["x-task-id"] == "refused-1"
    assert worker.exit_code is None


def _bad_images(world: World) -> list[str]:
    """Files with an image's name that are not images; the last two do not exist."""
    whole = io.BytesIO()
    Image.new("RGB", (300, 300), "teal").save(whole, "JPEG")
    return [
        world.upload("truncated.jpg", whole.getvalue()[: len(whole.getvalue()) // 2]),
        world.upload("empty.jpg", b""),
        world.upload("page.jpg", b"<!doctype html><title>404</title>"),
        world.upload("bomb.png", _bomb()),
        f"s3://{world.media}/training/missing.jpg",
        f"s3://{world.media}/training/",
    ]


def _bomb() -> bytes:
    """A PNG of 60,000 by 60,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
