"""What one message asks for, as a fact: it goes into the job record and comes back from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from config import Settings
from jobs.addresses import S3Location, version_of
from jobs.lora_config import HyperParameters
from utils.events import from_dict

MESSAGE_TYPE = "model_training"


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRef:
    """One image that the message asks for.

    Attributes:
        source: Its address as the message spelt it, less a query (which may be a signature) but for
            the version that it names.
        location: Bucket and key; None where no object can have this address.
        problem: Why there is none, in words an artist understands; None where there is one.
    """

    source: str
    location: S3Location | None
    problem: str | None = None

    @property
    def version_id(self) -> str | None:
        """The object's version that is meant; None for the present one.

        Part of the source, and no field: earlier releases refuse a record with unknown fields.
        """
        return version_of(self.source) if self.location else None


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingJob:
    """What one message asks for.

    Attributes:
        task_id: The job's id: the message's, else AMQP's `message_id`, else made from the body.
        style_id: The style to train.
        images: In the message's order.
        captions: One an image; None where the message gives none.
        tags: In the message's order.
        parameters: The hyper-parameters that the message sets.
        hyper_parameters: All of them: the worker's defaults with the message's over them.
        webhook_url: As given; whether its origin may be used is for the webhook service to judge.
        created_at: As given.
        id_is_derived: The id was made from the body: the publisher gave none.
        validation_images: Images that are looked at and not trained on.
        sample_prompts: What samples are painted of; none: the captions.
        trigger_word: In front of every prompt, or the empty string.
        ignored_fields: Fields that mean nothing to this worker, by name (the first few).
        body: The message itself.
        headers: Its AMQP headers, as far as its copies take them along.
    """

    task_id: str
    style_id: int
    images: tuple[ImageRef, ...]
    captions: tuple[str | None, ...]
    tags: tuple[str, ...]
    parameters: dict[str, Any]
    hyper_parameters: HyperParameters
    webhook_url: str | None = None
    created_at: str | None = None
    id_is_derived: bool = False
    ignored_fields: tuple[str, ...] = ()
    validation_images: tuple[ImageRef, ...] = ()
    sample_prompts: tuple[str, ...] = ()
    trigger_word: str = ""
    body: bytes = dataclasses.field(default=b"", compare=False, repr=False)
    headers: dict[str, str | int | bool] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of what is to be trained; two messages with one task id must agree in it.

        Spelling, dialect, date, the address that is told and this worker's defaults are not in it.
        """
        meaning: dict[str, Any] = {
            "style_id": self.style_id,
            "images": _places(self.images),
            "captions": self.captions,
            "tags": self.tags,
            "parameters": self.parameters,
        }
        # Only where they are given: the identity of a message without them is in older records.
        if self.validation_images:
            meaning["validation_images"] = _places(self.validation_images)
        if self.sample_prompts:
            meaning["sample_prompts"] = self.sample_prompts
        if self.trigger_word:
            meaning["trigger_word"] = self.trigger_word
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def understood(self) -> dict[str, Any]:
        """The job as JSON values, for the job record; `from_understood` reads them."""
        values = dataclasses.asdict(self)
        del values["body"], values["headers"]
        return dict(json.loads(json.dumps(values)))


def from_understood(values: dict[str, Any], settings: Settings) -> TrainingJob:
    """The job that `TrainingJob.understood` wrote down; it keeps the hyper-parameters that it was
    understood with. What a newer worker wrote beside them means nothing to this one: a job that
    cannot do without says so by its record's `min_level`.

    Args:
        values: From the job record.
        settings: Give the hyper-parameters where the record has none.

    Raises:
        ValueError: The values are not a job's.
    """
    if "hyper_parameters" not in values:
        defaults = settings.hyper_parameters(**values.get("parameters", {}))
        values = values | {"hyper_parameters": dataclasses.asdict(defaults)}
    job = from_dict(TrainingJob, values, tolerant=True)
    return dataclasses.replace(job, body=to_message(job))


def to_message(job: TrainingJob) -> bytes:
    """A body that parses to the same job, its id now written in it."""
    order = {
        "style_id": job.style_id,
        "images": [image.source for image in job.images],
        "captions": list(job.captions) if any(c is not None for c in job.captions) else None,
        "tags": list(job.tags) or None,
        "validation_images": [image.source for image in job.validation_images] or None,
        "sample_prompts": list(job.sample_prompts) or None,
        "trigger_word": job.trigger_word or None,
        "parameters": job.parameters or None,
    }
    message = {
        "task_id": job.task_id,
        "type": MESSAGE_TYPE,
        "data": {name: value for name, value in order.items() if value is not None},
        "webhook_url": job.webhook_url,
        "created_at": job.created_at,
    }
    return json.dumps({k: v for k, v in message.items() if v is not None}).encode()


def _places(images: tuple[ImageRef, ...]) -> list[Any]:
    """Where images lie, however their addresses are spelt."""
    return [
        (
            [image.location.bucket, image.location.key, *filter(None, [image.version_id])]
            if image.location
            else image.source
        )
        for image in images
    ]
