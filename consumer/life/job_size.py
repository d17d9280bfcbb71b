"""The size of a job, known before anything of it is downloaded."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from consumer.life.inputs import object_sizes
from consumer.life.stop_signal import StopSignal
from jobs.kinds import JobKind
from jobs.message import Job
from jobs.record import StoredCheckpoint
from services.s3.s3_service import S3Service
from utils.errors import DiskFull, JobTooLarge, NoRoomForJob
from utils.logger import get_logger
from utils.wording import spoken

log = get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class JobSize:
    """The disk space that a job needs on the worker, in bytes.

    Attributes:
        images: The images that are downloaded, validation images included.
        checkpoint: The checkpoint to resume from; 0 if there is none.
        output: The files that training writes, as estimated: checkpoints, the model's formats,
            report.
    """

    images: int
    checkpoint: int
    output: int

    @property
    def total(self) -> int:
        """All of these together."""
        return self.images + self.checkpoint + self.output


def require_room(
    s3: S3Service,
    state_s3: S3Service,
    kind: JobKind,
    job: Job,
    folder: Path,
    stop: StopSignal,
    *,
    state_bucket: str,
    max_job_bytes: int,
    checkpoints: Sequence[StoredCheckpoint] = (),
) -> JobSize:
    """Refuse a job that is too large, before anything is downloaded.

    An input that is missing, forbidden or larger than the kind's `max_input_bytes` counts as 0,
    because it is not downloaded. The checkpoint counts for the disk space only: a job that was
    allowed to begin is allowed to continue.

    Args:
        s3: The storage of the images.
        state_s3: The storage of the checkpoints.
        kind: The kind of the job.
        job: The job.
        folder: The job's folder.
        stop: Ends the look-up.
        state_bucket: Bucket of the checkpoints.
        max_job_bytes: The largest size of all inputs together.
        checkpoints: The registered checkpoints, newest last.

    Raises:
        JobTooLarge: The inputs have more than `MAX_JOB_BYTES`.
        NoRoomForJob: The disk of this machine has too little room.
        StorageError: S3 as a whole cannot be used.
        Stopped, Cancelled: A stop was requested.
    """
    inputs = kind.inputs(job.spec)
    sizes = object_sizes(
        s3,
        [(each.location, each.version_id) for each in inputs if each.location],
        stop=lambda: bool(stop.reason),
    )
    stop.check()
    size = JobSize(
        images=sum(each for each in sizes if each <= kind.max_input_bytes),
        checkpoint=_size_of(state_s3, state_bucket, checkpoints),
        output=kind.output_bytes(job.spec),
    )
    if size.images > max_job_bytes:
        raise JobTooLarge(
            f"The input files of this job have {spoken(size.images)} in all, and MAX_JOB_BYTES "
            f"allows {spoken(max_job_bytes)}. Order the job with fewer or smaller files, or raise "
            "MAX_JOB_BYTES."
        )
    free = _free_bytes(folder)
    log.info("job_measured", bytes=size.total, images_bytes=size.images, free_bytes=free)
    if size.total > free:
        raise NoRoomForJob(
            f"This job needs {spoken(size.total)} of disk space ({spoken(size.images)} for its "
            f"input files), and {spoken(free)} are free on the worker. Order the job with fewer or "
            "smaller files, or give the workers a larger disk (WORK_DIR)."
        )
    return size


def _size_of(s3: S3Service, bucket: str, checkpoints: Sequence[StoredCheckpoint]) -> int:
    """Of the newest checkpoint's files."""
    if not checkpoints:
        return 0
    return sum(found.size for found in s3.list_objects(bucket, checkpoints[-1].prefix))


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise DiskFull(
            f"the free space of the worker's disk (WORK_DIR) cannot be read: {error.strerror}; "
            "check the disk"
        ) from error
