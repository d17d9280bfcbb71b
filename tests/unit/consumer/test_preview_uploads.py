"""Small samples of checkpoints: uploaded once, under numbers only, and named in progress."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumer.life.preview_uploads import MAX_BYTES, PreviewUploads
from services.records.job_lease import JobLease
from tests.memory_s3 import MemoryS3
from utils.errors import LeaseLost


class FakeLease:
    """A claim that may be lost."""

    def __init__(self) -> None:
        self.is_lost = False
        self.claim_number = 2
        self.record = SimpleNamespace(task_id="task")

    def check(self) -> None:
        """Raises `LeaseLost`."""
        if self.is_lost:
            raise LeaseLost("lost")


@pytest.fixture(name="uploads")
def _uploads(tmp_path: Path) -> tuple[PreviewUploads, MemoryS3, FakeLease, Path]:
    s3, lease, folder = MemoryS3(), FakeLease(), tmp_path / "previews"
    return PreviewUploads(folder, s3, "state", cast(JobLease, lease)), s3, lease, folder


def put(folder: Path, name: str, content: bytes = b"RIFF") -> None:
    """A file of the trainer."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_samples_are_uploaded_once_and_the_newest_step_is_named(uploads: Any) -> None:
    previews, s3, _, folder = uploads
    previews.upload()
    assert previews.newest() == ()
    for name in ("0/0.webp", "50/0.webp", "50/1.webp"):
        put(folder, name)
    previews.upload()
    assert s3.keys("state") == [
        f"previews/task/2/{name}" for name in ("0/0.webp", "50/0.webp", "50/1.webp")
    ]
    assert previews.newest() == ("previews/task/2/50/0.webp", "previews/task/2/50/1.webp")
    before = s3.count("PUT")
    previews.upload()
    assert s3.count("PUT") == before


def test_files_that_are_no_samples_stay_where_they_are(uploads: Any, tmp_path: Path) -> None:
    previews, s3, _, folder = uploads
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    for name in ("x/0.webp", "0/..webp", "0/1.webp.partial", "0/one.webp", "0/.2.webp.partial"):
        put(folder, name)
    put(folder, "0/9.webp", b"x" * (MAX_BYTES + 1))
    (folder / "0" / "3.webp").symlink_to(secret)
    (folder / "7").symlink_to(folder / "0")
    previews.upload()
    assert s3.keys("state") == []


def test_a_claim_that_is_over_uploads_nothing_and_the_job_does_not_fail(uploads: Any) -> None:
    previews, s3, lease, folder = uploads
    lease.is_lost = True
    put(folder, "0/0.webp")
    previews.upload()
    assert s3.keys("state") == [] and previews.newest() == ()
