"""`python main.py publish`: a folder of images becomes a job, as the backend would order it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cli import broker
from cli.training.local import images_in
from jobs import message as messages
from jobs.addresses import S3Location
from jobs.kinds import Kinds
from jobs.layout import record_at, uploads_of
from jobs.style import StyleKind, TrainingImage
from services.broker.settlement import MIN_LEVEL, Publication, Queue
from services.s3.s3_service import S3Service
from utils.errors import ConfigurationError, InvalidMessage
from utils.settings.groups import BrokerSettings
from utils.settings.storage import StorageSettings

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_NAME = 80


@dataclasses.dataclass(frozen=True, slots=True)
class PlacedOrder:
    """The order of a training.

    Attributes:
        task_id: The job's id.
        style_id: The style.
        images: The images' addresses on S3.
        epochs: As the job will be trained with these settings.
    """

    task_id: str
    style_id: int
    images: tuple[str, ...]
    epochs: int


def place(
    settings: BrokerSettings,
    storage: StorageSettings,
    kinds: Kinds,
    s3: S3Service,
    folder: Path,
    *,
    state_s3: S3Service | None = None,
    style_id: int,
    task_id: str | None = None,
    tags: Sequence[str] = (),
    parameters: dict[str, Any] | None = None,
    on_upload: Callable[[int, int], None] = lambda done, total: None,
) -> PlacedOrder:
    """Upload the images of a folder, and publish the message that asks for a training on them.

    Nothing is uploaded before the order is found sound and the broker is there. `NAME.txt` captions
    the image of the same name.

    Args:
        settings: The broker and the queue.
        storage: The buckets.
        kinds: Check the order.
        s3: The storage of images.
        folder: The images.
        state_s3: The storage of the state bucket; None: the same.
        style_id: The style that is trained.
        task_id: The job's id; None makes one.
        tags: As in a message.
        parameters: As in a message.
        on_upload: Receives the number of uploaded images and of all images.

    Raises:
        ConfigurationError: The folder or the order is wrong; the message names the part.
        StorageError: The images cannot be uploaded.
        BrokerError: The broker did not take the message.
    """
    images = images_in(folder)
    task_id = task_id or str(uuid.uuid4())
    places = _places(storage.aws_storage_bucket_name, uploads_of(str(style_id), task_id), images)
    body = _message(task_id, style_id, images, places, tags, parameters or {})
    job = _checked(body, kinds)
    if (state_s3 or s3).exists(record_at(storage.state_bucket_name, task_id)):
        raise ConfigurationError(f"A job {task_id} already exists. Choose another --task-id.")
    broker.check_training_queue(settings)
    _upload(s3, images, places, on_upload)
    broker.publish(
        settings, Publication(Queue.TRAINING, body, task_id, headers=_headers(job, kinds))
    )
    return PlacedOrder(
        task_id, style_id, tuple(each.uri() for each in places), job.spec.hyper_parameters.epochs
    )


def _headers(job: messages.Job, kinds: Kinds) -> dict[str, int]:
    """The lowest level of the workers that understand the order."""
    level = kinds.of(job.kind).min_level(job.spec)
    return {MIN_LEVEL: level} if level else {}


def _checked(body: bytes, kinds: Kinds) -> messages.Job:
    try:
        return messages.parse(body, message_id=None, kinds=kinds)
    except InvalidMessage as error:
        raise ConfigurationError(f"This order is refused: {error}") from error


def _upload(
    s3: S3Service,
    images: Sequence[TrainingImage],
    places: Sequence[S3Location],
    on_upload: Callable[[int, int], None],
) -> None:
    for index, image in enumerate(images):
        s3.upload_file(Path(image.path or ""), places[index])
        on_upload(index + 1, len(images))


def _places(bucket: str, prefix: str, images: Sequence[TrainingImage]) -> list[S3Location]:
    """The images' addresses: names that every tool can spell, in the folder's order."""
    return [
        S3Location(bucket, f"{prefix}{index:04d}-{_UNSAFE.sub('_', each.source)[-_LONGEST_NAME:]}")
        for index, each in enumerate(images)
    ]


def _message(
    task_id: str,
    style_id: int,
    images: Sequence[TrainingImage],
    places: Sequence[S3Location],
    tags: Sequence[str],
    parameters: dict[str, Any],
) -> bytes:
    captions = [image.caption or None for image in images]
    data = {
        "style_id": style_id,
        "images": [place.uri() for place in places],
        "captions": captions if any(captions) else None,
        "tags": list(tags) or None,
        "parameters": parameters or None,
    }
    message = {
        "task_id": task_id,
        "type": StyleKind.message_type,
        "data": {name: value for name, value in data.items() if value is not None},
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }
    return json.dumps(message).encode()
