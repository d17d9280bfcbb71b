"""The size of a job, known before anything of it is downloaded."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from config import Settings
from consumer.life.image_download import object_sizes
from consumer.life.stop_signal import StopSignal
from jobs.lora_config import HyperParameters
from jobs.record import Checkpoint
from jobs.style_job import TrainingJob
from services.s3.s3_service import S3Service
from utils.errors import DiskFull, JobTooLarge, NoRoomForJob
from utils.logger import get_logger
from utils.wording import spoken

log = get_logger(__name__)

WEIGHTS_PER_RANK = {"attention": 199_296, "attention+ff": 374_016}
"""Trained numbers of a LoRA of rank 1 on SD1.5's UNet, the family that is trained here."""
NUMBERS_PER_WEIGHT = {"adamw": 3, "adamw8bit": 2, "prodigy": 5}
"""Of four bytes each in a checkpoint: the weight and its optimizer's state, rounded up."""
CHECKPOINTS_AT_ONCE = 3
"""One is being uploaded, one waits for it, and one is being written."""
MODEL_FORMATS = 3
OTHER_FILES_BYTES = 256 * 1024**2
"""Report, sample images, curves, temporary files: generously, since other programs write, too."""


@dataclasses.dataclass(frozen=True, slots=True)
class JobSize:
    """What a job takes on the worker's disk, in bytes.

    Attributes:
        images: Those that will be downloaded, validation images included.
        checkpoint: The one to resume from; 0 without.
        output: What training writes, as estimated: checkpoints, the model in its formats, report.
    """

    images: int
    checkpoint: int
    output: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.images + self.checkpoint + self.output


def require_room(
    s3: S3Service,
    state_s3: S3Service,
    settings: Settings,
    job: TrainingJob,
    folder: Path,
    stop: StopSignal,
    *,
    checkpoints: Sequence[Checkpoint] = (),
) -> JobSize:
    """Refuse a job that is too large, before anything is downloaded.

    An image that is missing, forbidden or larger than `MAX_IMAGE_BYTES` counts nothing: it is not
    going to be downloaded. The checkpoint counts for the disk only: a job that was allowed to begin
    is allowed to go on.

    Args:
        s3: The storage of the images.
        state_s3: The storage of the checkpoints.
        settings: Limits.
        job: The job.
        folder: The job's folder.
        stop: Ends the look-up.
        checkpoints: Those that are registered, newest last.

    Raises:
        JobTooLarge: The images have more than `MAX_JOB_BYTES`.
        NoRoomForJob: The disk of this machine has too little room.
        StorageError: S3 as a whole is in trouble.
        Stopped, Cancelled: A stop was asked for.
    """
    images = [*job.images, *job.validation_images]
    sizes = object_sizes(
        s3,
        [(image.location, image.version_id) for image in images if image.location],
        stop=lambda: bool(stop.reason),
    )
    stop.check()
    size = JobSize(
        images=sum(each for each in sizes if each <= settings.max_image_bytes),
        checkpoint=_size_of(state_s3, settings.state_bucket_name, checkpoints),
        output=output_bytes(job.hyper_parameters),
    )
    if size.images > settings.max_job_bytes:
        raise JobTooLarge(
            f"The images of this job have {spoken(size.images)} in all, and "
            f"{spoken(settings.max_job_bytes)} are allowed: order the training with fewer or "
            "smaller images."
        )
    free = _free_bytes(folder)
    log.info("job_measured", bytes=size.total, images_bytes=size.images, free_bytes=free)
    if size.total > free:
        raise NoRoomForJob(
            f"This job needs {spoken(size.total)} of disk space ({spoken(size.images)} for its "
            f"images), and {spoken(free)} are free on the worker: use fewer or smaller images, "
            "or give the workers a larger disk."
        )
    return size


def output_bytes(parameters: HyperParameters) -> int:
    """What training writes into its folder at most at one time, estimated from above."""
    weights = WEIGHTS_PER_RANK.get(parameters.target, max(WEIGHTS_PER_RANK.values()))
    weights *= parameters.rank
    numbers = NUMBERS_PER_WEIGHT.get(parameters.optimizer, max(NUMBERS_PER_WEIGHT.values()))
    best = 1 if parameters.deliver == "best" else 0  # rides in every checkpoint
    checkpoints = CHECKPOINTS_AT_ONCE * weights * 4 * (numbers + best)
    return checkpoints + MODEL_FORMATS * weights * 4 + OTHER_FILES_BYTES


def _size_of(s3: S3Service, bucket: str, checkpoints: Sequence[Checkpoint]) -> int:
    """Of the newest checkpoint's files."""
    if not checkpoints:
        return 0
    return sum(found.size for found in s3.list_objects(bucket, checkpoints[-1].prefix))


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise DiskFull(f"the worker's disk cannot be measured: {error.strerror}") from error
