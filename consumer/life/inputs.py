"""The images of a job: fetched side by side, each with its caption or the reason why not."""

from __future__ import annotations

import time
from pathlib import Path

from config import Settings
from consumer.life.image_download import FetchedImage, ImageRequest, download_images
from consumer.life.stop_signal import StopSignal
from jobs.lora_config import TrainingImage
from jobs.style_job import ImageRef, TrainingJob
from services.s3.s3_service import S3Service
from utils.errors import ImageDownloadFailed
from utils.logger import get_logger
from utils.wording import grouped

log = get_logger(__name__)


def fetch_images(
    s3: S3Service, settings: Settings, job: TrainingJob, folder: Path, stop: StopSignal
) -> tuple[TrainingImage, ...]:
    """Download a job's images; a caption is the message's, the `.txt` beside it, or the tags.

    Args:
        s3: The storage.
        settings: Limits.
        job: Whose images.
        folder: A new folder for them.
        stop: Ends the download.

    Returns:
        One entry an image asked for, in order; one that could not be fetched says why.

    Raises:
        ImageDownloadFailed: Too few could be fetched.
        StorageError: S3 as a whole is in trouble.
        Stopped, Cancelled: A stop was asked for.
    """
    images = _fetch(s3, settings, job, (job.images, job.captions), folder, stop)
    missing = [image for image in images if image.path is None]
    there = len(images) - len(missing)
    if there < settings.min_images <= len(images):
        raise ImageDownloadFailed(
            f"only {there} of {len(images)} images could be fetched, and "
            f"{settings.min_images} are needed: "
            + grouped(((image.source, image.problem or "") for image in missing), "image")
        )
    return images


def fetch_validation_images(
    s3: S3Service, settings: Settings, job: TrainingJob, folder: Path, stop: StopSignal
) -> tuple[TrainingImage, ...]:
    """Download the images that are held out; none of them has to be there.

    Args:
        s3, settings, job, folder, stop: As for `fetch_images`.

    Raises:
        StorageError: S3 as a whole is in trouble.
        Stopped, Cancelled: A stop was asked for.
    """
    if not job.validation_images:
        return ()
    captions = (None,) * len(job.validation_images)
    return _fetch(s3, settings, job, (job.validation_images, captions), folder, stop)


def _fetch(
    s3: S3Service,
    settings: Settings,
    job: TrainingJob,
    wanted: tuple[tuple[ImageRef, ...], tuple[str | None, ...]],
    folder: Path,
    stop: StopSignal,
) -> tuple[TrainingImage, ...]:
    """Download images with their captions, side by side."""
    began = time.monotonic()
    folder.mkdir()
    fetched = iter(
        download_images(
            s3,
            [
                ImageRequest(image.source, image.location, caption, image.version_id)
                for image, caption in zip(*wanted, strict=True)
                if image.location
            ],
            folder,
            max_bytes=settings.max_image_bytes,
            stop=lambda: stop.reason is not None,
        )
    )
    stop.check()
    images = tuple(
        _image(next(fetched), job) if image.location else _broken(image) for image in wanted[0]
    )
    log.info(
        "pictures_fetched",
        images=sum(image.path is not None for image in images),
        missing=sum(image.path is None for image in images),
        seconds=round(time.monotonic() - began, 3),
    )
    return images


def _image(fetched: FetchedImage, job: TrainingJob) -> TrainingImage:
    return TrainingImage(
        source=fetched.source,
        path=str(fetched.path) if fetched.path else None,
        caption=fetched.caption if fetched.caption is not None else ", ".join(job.tags),
        problem=fetched.problem,
        caption_problem=fetched.caption_problem,
    )


def _broken(image: ImageRef) -> TrainingImage:
    return TrainingImage(source=image.source, path=None, problem=image.problem)
