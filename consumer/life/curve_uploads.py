"""Uploads a run's event files for TensorBoard, each time as far as they have grown."""

from __future__ import annotations

from pathlib import Path

from jobs.addresses import S3Location
from services.records.job_lease import JobLease
from services.s3.s3_service import S3Service
from utils.errors import LeaseLost, StorageError
from utils.logger import get_logger

log = get_logger(__name__)


class CurveUploads:
    """Uploads one claim's event files.

    Each claim writes its own objects, whose names sort in the order of the claims, as TensorBoard
    reads them. So a late write of an earlier claim changes nothing of a newer one.

    Args:
        folder: The trainer's folder of event files; it is missing if none are written.
        s3: The storage.
        bucket: The state bucket.
        prefix: Key prefix of the objects.
        lease: Once it is lost, nothing more is uploaded.
    """

    def __init__(
        self, folder: Path, s3: S3Service, bucket: str, prefix: str, lease: JobLease
    ) -> None:
        self._folder = folder
        self._s3 = s3
        self._bucket = bucket
        self._prefix = f"{prefix}claim-{lease.claim_number:04d}."
        self._lease = lease
        self._uploaded: dict[str, int] = {}

    def upload(self) -> None:
        """Upload the files that have grown since the last call.

        A failure is logged, and the next call tries again; the job does not fail because of it.
        """
        try:
            for path in sorted(self._folder.glob("*")):
                content = path.read_bytes()  # at once: the trainer goes on writing
                if len(content) > self._uploaded.get(path.name, 0):
                    self._lease.check()
                    location = S3Location(self._bucket, self._prefix + path.name)
                    self._s3.write(location, content, "application/octet-stream")
                    self._uploaded[path.name] = len(content)
        except (LeaseLost, StorageError, OSError) as error:
            log.warning("curves_not_uploaded", reason=str(error))
