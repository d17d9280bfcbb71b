"""Uploads the small samples that a run makes at its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

from jobs.addresses import S3Location
from jobs.layout import PREVIEW_SUFFIX, preview_at
from services.records.job_lease import JobLease
from services.s3.s3_service import S3Service
from utils.errors import LeaseLost, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

MAX_BYTES = 256 * 1024
_NUMBER = re.compile(r"\d{1,9}")


class PreviewUploads:
    """Uploads one claim's samples, each once.

    Only regular files with numbers for names are taken, as `jobs.layout.preview_at` names them.

    Args:
        folder: The trainer's folder of samples; it is missing if none are made.
        s3: The storage.
        bucket: The state bucket.
        lease: Once it is lost, nothing more is uploaded.
    """

    def __init__(self, folder: Path, s3: S3Service, bucket: str, lease: JobLease) -> None:
        self._folder = folder
        self._s3 = s3
        self._bucket = bucket
        self._lease = lease
        self._uploaded: dict[int, dict[int, str]] = {}

    def newest(self) -> tuple[str, ...]:
        """Keys of the newest step's samples that are uploaded, for progress reports."""
        uploaded = self._uploaded
        return tuple(uploaded[max(uploaded)].values()) if uploaded else ()

    def upload(self) -> None:
        """Upload the samples that are new since the last call.

        A failure is logged, and the next call tries again; the job does not fail because of it.
        """
        try:
            for step, number, path in self._found():
                if number not in self._uploaded.get(step, {}):
                    self._lease.check()
                    location = self._place(step, number)
                    self._s3.write(location, path.read_bytes(), "image/webp")
                    found = self._uploaded.get(step, {}) | {number: location.key}
                    self._uploaded = self._uploaded | {step: found}
        except (LeaseLost, StorageError, OSError) as error:
            log.warning("previews_not_uploaded", reason=str(error))

    def _place(self, step: int, number: int) -> S3Location:
        task_id = self._lease.record.task_id
        return preview_at(self._bucket, task_id, self._lease.claim_number, step, number)

    def _found(self) -> list[tuple[int, int, Path]]:
        """Step, number and path of each sample, in order."""
        return sorted(
            (int(path.parent.name), int(path.stem), path)
            for path in self._folder.glob(f"*/*{PREVIEW_SUFFIX}")
            if _NUMBER.fullmatch(path.parent.name)
            and _NUMBER.fullmatch(path.stem)
            and path.is_file()
            and not path.is_symlink()
            and not path.parent.is_symlink()
            and path.stat().st_size <= MAX_BYTES
        )
