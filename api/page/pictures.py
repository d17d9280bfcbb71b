"""Sample images of a job's checkpoints, from the state bucket. Browsers never see S3 itself."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from fastapi import Response

from api.gate.problems import Problem
from api.services import Services
from jobs.addresses import S3Location
from jobs.layout import preview_at, previews_of
from services.s3.s3_service import S3Service
from utils.errors import ObjectNotFound

MAX_BYTES = 1024**2
"""Of a small image."""
_NAME = re.compile(r"(\d{1,9})/(\d{1,12})/(\d{1,3})\.webp")


@dataclasses.dataclass(frozen=True, slots=True)
class SampleStep:
    """The samples of one checkpoint.

    Attributes:
        step: Its step; 0 is the base model.
        images: Addresses on this server, in the order of the prompts.
    """

    step: int
    images: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class JobSamples:
    """All samples of a job.

    Attributes:
        steps: One per checkpoint, in order. The newest claim's images replace earlier ones.
    """

    steps: tuple[SampleStep, ...] = ()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each prompt's image of the base model, and of the newest checkpoint."""
        if len(self.steps) < 2 or self.steps[0].step != 0:
            return []
        return list(zip(self.steps[0].images, self.steps[-1].images))


def samples_of(services: Services, job: dict[str, Any]) -> JobSamples:
    """The samples of a job that has begun. Raises `StorageError`."""
    if job["started_at"] is None:
        return JobSamples()
    prefix = previews_of(job["id"])
    newest: dict[int, tuple[int, set[int]]] = {}
    for info in services.state_s3.list_objects(services.buckets.state, prefix):
        name = _NAME.fullmatch(info.key.removeprefix(prefix))
        if name is None:
            continue
        claim, step, number = (int(each) for each in name.groups())
        known = newest.get(step, (claim, set()))
        if claim > known[0]:
            known = (claim, set())
        if claim == known[0]:
            newest[step] = (claim, known[1] | {number})
    return JobSamples(
        tuple(
            SampleStep(
                step,
                tuple(f"/jobs/{job['id']}/samples/{claim}/{step}/{each}" for each in sorted(found)),
            )
            for step, (claim, found) in sorted(newest.items())
        )
    )


def sample_image(
    services: Services, job: dict[str, Any], claim: int, step: int, number: int
) -> Response:
    """One sample image. A sample never changes, so browsers may keep it.

    Raises:
        Problem: There is none.
    """
    place = preview_at(services.buckets.state, job["id"], claim, step, number)
    return small_image(services.state_s3, place, "image/webp")


def small_image(s3: S3Service, place: S3Location, content_type: str) -> Response:
    """An image of S3 as an answer, never as anything but an image.

    Raises:
        Problem: There is none.
    """
    try:
        content = s3.read(place, max_bytes=MAX_BYTES).body
    except ObjectNotFound:
        raise Problem("file_not_found", "There is no such image.") from None
    headers = {"Cache-Control": "private, max-age=86400, immutable"}
    return Response(content, media_type=content_type, headers=headers)
