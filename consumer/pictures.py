"""The pictures of a job: fetched side by side, each with its caption or the reason why not."""

from __future__ import annotations

import time
from pathlib import Path

from config import Settings
from consumer.stop_signal import StopSignal
from consumer.training_job import ImageRef, TrainingJob
from services.s3_service import FetchedPicture, PictureRequest, S3Service
from training.lora_config import Picture
from utils.errors import ImageDownloadFailed
from utils.logger import get_logger

log = get_logger(__name__)


def fetch_pictures(
    s3: S3Service, settings: Settings, job: TrainingJob, folder: Path, stop: StopSignal
) -> tuple[Picture, ...]:
    """Download a job's pictures; a caption is the message's, the `.txt` beside it, or the tags.

    Args:
        s3: The storage.
        settings: Limits.
        job: Whose pictures.
        folder: A new folder for them.
        stop: Ends the download.

    Returns:
        One entry a picture asked for, in order; one that could not be fetched says why.

    Raises:
        ImageDownloadFailed: Too few could be fetched.
        StorageError: S3 as a whole is in trouble.
        Stopped, Cancelled: A stop was asked for.
    """
    began = time.monotonic()
    folder.mkdir()
    fetched = iter(
        s3.fetch_pictures(
            [
                PictureRequest(image.source, image.location, caption)
                for image, caption in zip(job.images, job.captions, strict=True)
                if image.location
            ],
            folder,
            max_bytes=settings.max_image_bytes,
            stop=lambda: stop.reason is not None,
        )
    )
    stop.check()
    pictures = tuple(
        _picture(next(fetched), job) if image.location else _broken(image) for image in job.images
    )
    missing = [picture for picture in pictures if picture.path is None]
    there = len(pictures) - len(missing)
    log.info(
        "pictures_fetched",
        pictures=there,
        missing=len(missing),
        seconds=round(time.monotonic() - began, 3),
    )
    if there < settings.min_images <= len(pictures):
        raise ImageDownloadFailed(
            f"only {there} of {len(pictures)} pictures could be fetched, and "
            f"{settings.min_images} are needed: "
            + "; ".join(f"{picture.source}: {picture.problem}" for picture in missing)
        )
    return pictures


def _picture(fetched: FetchedPicture, job: TrainingJob) -> Picture:
    return Picture(
        source=fetched.source,
        path=str(fetched.path) if fetched.path else None,
        caption=fetched.caption if fetched.caption is not None else ", ".join(job.tags),
        problem=fetched.problem,
    )


def _broken(image: ImageRef) -> Picture:
    return Picture(source=image.source, path=None, problem=image.problem)
