"""The inputs of a job: fetched several at a time, each with its caption or the reason why not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from consumer.life.image_download import ImageRequest, download_images
from consumer.life.stop_signal import StopSignal
from jobs.kinds import Fetched, Input
from services.s3.s3_service import S3Service
from utils.logger import get_logger

log = get_logger(__name__)


def fetch_inputs(
    s3: S3Service, inputs: Sequence[Input], folder: Path, *, max_bytes: int, stop: StopSignal
) -> tuple[Fetched, ...]:
    """Download a job's inputs, one role after the other, into a separate folder per role.

    Args:
        s3: The storage.
        inputs: The inputs, in the order of their roles.
        folder: The job's folder.
        max_bytes: Larger objects are not fetched.
        stop: Ends the download.

    Returns:
        One entry per input, in order.

    Raises:
        StorageError: S3 as a whole cannot be used.
        Stopped, Cancelled: A stop was requested.
    """
    fetched: list[Fetched] = []
    for role in dict.fromkeys(each.role for each in inputs):
        of_role = [each for each in inputs if each.role == role]
        fetched += _fetch(s3, of_role, folder / role, max_bytes, stop)
    return tuple(fetched)


def _fetch(
    s3: S3Service, inputs: Sequence[Input], folder: Path, max_bytes: int, stop: StopSignal
) -> list[Fetched]:
    began = time.monotonic()
    folder.mkdir()
    downloads = iter(
        download_images(
            s3,
            [
                ImageRequest(each.source, each.location, each.caption, each.version_id)
                for each in inputs
                if each.location
            ],
            folder,
            max_bytes=max_bytes,
            stop=lambda: stop.reason is not None,
        )
    )
    stop.check()
    fetched = []
    for each in inputs:
        if each.location is None:
            fetched.append(Fetched(each, None, problem=each.problem))
            continue
        found = next(downloads)
        fetched.append(
            Fetched(each, found.path, found.caption, found.problem, found.caption_problem)
        )
    log.info(
        "pictures_fetched",
        images=sum(each.path is not None for each in fetched),
        missing=sum(each.path is None for each in fetched),
        seconds=round(time.monotonic() - began, 3),
    )
    return fetched
