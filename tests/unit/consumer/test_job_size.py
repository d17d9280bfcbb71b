"""A job that is too large is refused before anything of it is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumer.life.job_size import JobSize, require_room
from consumer.life.stop_signal import StopSignal
from jobs.addresses import S3Location
from jobs.record import StoredCheckpoint
from services.s3.s3_service import S3Service
from tests.memory_s3 import MemoryS3
from tests.unit.jobs.message_samples import BUCKET, envelope, make_settings, read, style_kind
from utils.errors import (
    AccessDenied,
    Cancelled,
    JobTooLarge,
    NoRoomForJob,
    StopReason,
    StorageError,
)
from utils.wording import spoken

MIB = 1024**2
Measure = Callable[..., JobSize]


@pytest.fixture(name="s3")
def _s3() -> MemoryS3:
    return MemoryS3()


@pytest.fixture(name="free")
def _free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free space of the disk."""

    def set_free(size: int) -> None:
        usage = SimpleNamespace(free=size)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    set_free(10**15)
    return set_free


@pytest.fixture(name="measure")
def _measure(s3: MemoryS3, free: Any, tmp_path: Path) -> Measure:
    """Measures a job of images `0`, `1`, … and validation images `v0`, `v1`, …."""
    del free

    def measure(
        *, images: int = 3, validation: int = 0, stop: StopSignal | None = None, **how: Any
    ) -> JobSize:
        checkpoints = how.pop("checkpoints", ())
        settings = make_settings(state_bucket_name="state", **how)
        message = envelope(
            images=[f"s3://{BUCKET}/{number}" for number in range(images)],
            validation_images=[f"s3://{BUCKET}/v{number}" for number in range(validation)],
        )
        job = read(message, settings=settings)
        return require_room(
            cast(S3Service, s3),
            cast(S3Service, s3),
            style_kind(settings),
            job,
            tmp_path,
            stop or StopSignal(),
            state_bucket="state",
            max_job_bytes=settings.limits.max_job_bytes,
            checkpoints=checkpoints,
        )

    return measure


def output_bytes(**parameters: Any) -> int:
    """The estimate for a job with these parameters."""
    return style_kind().output_bytes(read(envelope(parameters=parameters)).spec)


def put(s3: MemoryS3, sizes: dict[str, int], bucket: str = BUCKET) -> None:
    """Store objects of these sizes."""
    for key, size in sizes.items():
        s3.write(S3Location(bucket, key), b"x" * size)


def test_images_and_validation_images_count_and_nothing_is_downloaded(
    s3: MemoryS3, measure: Measure
) -> None:
    put(s3, {"0": 1000, "1": 200, "2": 30, "v0": 4})
    assert measure(validation=1).images == 1234
    assert s3.count("HEAD") == 4 and s3.count("GET") == 0


def test_an_image_that_will_not_be_downloaded_counts_as_zero(
    s3: MemoryS3, measure: Measure
) -> None:
    put(s3, {"0": 1000, "1": 5000})  # 2 is missing

    def forbid(_: str, __: str, key: str) -> None:
        if key == "3":
            raise AccessDenied()

    s3.before = forbid
    assert measure(images=4, max_image_bytes=4096).images == 1000


def test_a_job_with_more_bytes_than_the_limit_fails_and_both_sizes_are_named(
    s3: MemoryS3, measure: Measure
) -> None:
    put(s3, {"0": MIB, "1": MIB, "2": MIB, "v0": MIB // 2})
    assert measure(validation=1, max_job_bytes=3 * MIB + MIB // 2).images
    with pytest.raises(JobTooLarge) as caught:
        measure(validation=1, max_job_bytes=3 * MIB)
    sentence = str(caught.value)
    assert "3.5 MiB in all" in sentence and "MAX_JOB_BYTES allows 3 MiB" in sentence
    assert "fewer or smaller files" in sentence


def test_the_default_limit_takes_the_largest_job_that_the_other_limits_allow() -> None:
    settings = make_settings()
    assert settings.limits.max_job_bytes >= 200 * settings.options["style"].max_image_bytes


def test_a_job_that_needs_more_than_the_free_space_goes_to_another_machine(
    s3: MemoryS3, measure: Measure, free: Callable[[int], None]
) -> None:
    put(s3, {"0": MIB, "1": MIB, "2": MIB})
    needed = 3 * MIB + output_bytes()
    free(needed)
    assert measure().total == needed
    free(needed - 1)
    with pytest.raises(NoRoomForJob) as caught:
        measure()
    sentence = str(caught.value)
    assert f"needs {spoken(needed)}" in sentence and f"{spoken(needed - 1)} are free" in sentence
    assert "larger disk" in sentence


def test_the_checkpoint_to_resume_from_needs_room_too_but_never_fails_the_job(
    s3: MemoryS3, measure: Measure, free: Callable[[int], None]
) -> None:
    """A job that was allowed to begin is allowed to go on."""
    put(s3, {"0": 10, "1": 10, "2": 10})
    put(s3, {"old/lora": 500, "new/lora": 3000, "new/optimizer": 4000}, bucket="state")
    checkpoints = tuple(
        StoredCheckpoint(name=name, epoch=1, step=1, prefix=f"{name}/", claim=1)
        for name in ("old", "new")
    )
    size = measure(checkpoints=checkpoints, max_job_bytes=1024)
    assert (size.images, size.checkpoint) == (30, 7000)
    free(30 + 7000 + output_bytes() - 1)
    with pytest.raises(NoRoomForJob):
        measure(checkpoints=checkpoints)


def test_a_stop_ends_the_look_up_at_once(s3: MemoryS3, measure: Measure) -> None:
    stop = StopSignal()
    stop.request(StopReason.CANCELLED)
    with pytest.raises(Cancelled):
        measure(images=50, stop=stop)
    assert s3.count("HEAD") == 0


def test_an_error_of_s3_is_raised_and_no_further_object_is_measured(
    s3: MemoryS3, measure: Measure
) -> None:
    def fail(method: str, _: str, key: str) -> None:
        raise StorageError(f"{method} {key}")

    s3.before = fail
    with pytest.raises(StorageError):
        measure(images=200)
    assert s3.count("HEAD") < 200


@pytest.mark.parametrize(
    ("more", "mebibytes"),
    [
        ({}, 402),
        ({"rank": 256, "target": "attention+ff"}, 4639),
        ({"deliver": "best"}, 438),
        ({"optimizer": "prodigy"}, 475),
    ],
)
def test_the_files_of_training_are_estimated_from_the_parameters(
    more: dict[str, Any], mebibytes: int
) -> None:
    assert round(output_bytes(**more) / MIB) == mebibytes


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "0.977 KiB"),
        (52428800, "50 MiB"),
        (10 * 1024**3, "10 GiB"),
        (12_345_678_901, "11.5 GiB"),
        (1024**3 - 500_000, "1 GiB"),
        (5 * 1024**5, "5120 TiB"),
    ],
)
def test_a_size_is_written_in_readable_units(size: int, text: str) -> None:
    assert spoken(size) == text
