"""The pictures of a job: fetched side by side, each with its caption or the reason why not."""

from __future__ import annotations

import time
from pathlib import Path

from config import Settings
from consumer.life.stop_signal import StopSignal
from jobs.lora_config import Picture
from jobs.style_job import ImageRef, TrainingJob
from services.s3.s3_service import FetchedPicture, PictureRequest, S3Service
from utils.errors import ImageDownloadFailed
from utils.logger import get_logger
from utils.wording import grouped

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
    pictures = _fetch(s3, settings, job, (job.images, job.captions), folder, stop)
    missing = [picture for picture in pictures if picture.path is None]
    there = len(pictures) - len(missing)
    if there < settings.min_images <= len(pictures):
        raise ImageDownloadFailed(
            f"only {there} of {len(pictures)} pictures could be fetched, and "
            f"{settings.min_images} are needed: "
            + grouped(((picture.source, picture.problem or "") for picture in missing), "picture")
        )
    return pictures


def fetch_validation_pictures(
    s3: S3Service, settings: Settings, job: TrainingJob, folder: Path, stop: StopSignal
) -> tuple[Picture, ...]:
    """Download the pictures that are held out; none of them has to be there.

    Args:
        s3, settings, job, folder, stop: As for `fetch_pictures`.

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
) -> tuple[Picture, ...]:
    """Download pictures with their captions, side by side."""
    began = time.monotonic()
    folder.mkdir()
    fetched = iter(
        s3.fetch_pictures(
            [
                PictureRequest(image.source, image.location, caption, image.version_id)
                for image, caption in zip(*wanted, strict=True)
                if image.location
            ],
            folder,
            max_bytes=settings.max_image_bytes,
            stop=lambda: stop.reason is not None,
        )
    )
    stop.check()
    pictures = tuple(
        _picture(next(fetched), job) if image.location else _broken(image) for image in wanted[0]
    )
    log.info(
        "pictures_fetched",
        pictures=sum(picture.path is not None for picture in pictures),
        missing=sum(picture.path is None for picture in pictures),
        seconds=round(time.monotonic() - began, 3),
    )
    return pictures


def _picture(fetched: FetchedPicture, job: TrainingJob) -> Picture:
    return Picture(
        source=fetched.source,
        path=str(fetched.path) if fetched.path else None,
        caption=fetched.caption if fetched.caption is not None else ", ".join(job.tags),
        problem=fetched.problem,
        caption_problem=fetched.caption_problem,
    )


def _broken(image: ImageRef) -> Picture:
    return Picture(source=image.source, path=None, problem=image.problem)
