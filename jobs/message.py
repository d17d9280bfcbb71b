"""Bytes to `TrainingJob`, or `InvalidMessage` saying which field is wrong and why
(docs/protocol.md, section 2).

Two dialects, one meaning. A message with something in `data` is the envelope, and order fields
beside `data` are ignored; otherwise it is flat. A field that is null, and an empty list of
captions, count as absent. Whole numbers may be written `200` or `200.0`; no text and no boolean is
ever taken for a number.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections import Counter
from typing import Any

from pydantic import ValidationError

from config import Settings
from jobs.addresses import BrokenAddress, read_address, unused_parts
from jobs.lora_config import HyperParameters
from jobs.style_job import (
    MESSAGE_TYPE,
    ImageRef,
    TrainingJob,
    from_understood,
    to_message,
)
from jobs.style_order import MAX_STYLE_ID, PARAMETER_NAMES, Order, complaints, printable
from utils.errors import InvalidMessage, UnknownType
from utils.logger import get_logger
from utils.wording import counted

__all__ = ["ImageRef", "TrainingJob", "derive_task_id", "from_understood", "parse", "to_message"]

log = get_logger(__name__)

MAX_BODY = 2 * 1024**2  # bytes; 200 long addresses with 200 long captions take less
MAX_DIGITS = 400  # of a whole number; Python refuses to read more than 4300
MAX_WEBHOOK_URL = 2048
MAX_CREATED_AT = 64
MAX_NAMED = 20
MAX_COMPLAINTS = 5
_TASK_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_BODIES = uuid.UUID("8c1f4f3e-2b77-5d0a-9f0e-6a3d8c5b1e42")  # namespace of ids made from bodies
_ORDER_FIELDS = (
    *("style_id", "captions", "tags", "validation_images", "sample_prompts", "trigger_word"),
    "parameters",
)


class _Wrong(Exception):
    """A field, and what is wrong with it."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


def parse(body: bytes, *, message_id: str | None, settings: Settings) -> TrainingJob:
    """Read a message.

    Args:
        body: The message: any bytes at all.
        message_id: AMQP's `message_id`; one that could not be a task id counts as absent.
        settings: Default parameters, default bucket, endpoint, and the buckets that images may
            come from.

    Raises:
        UnknownType: The message is for another kind of worker. It carries no style id: that may be
            a finished style.
        InvalidMessage: It can never become a job. Names the field in the message's own spelling,
            and carries the ids and the webhook address as far as they can be read safely.
    """
    known: dict[str, Any] = {}
    try:
        message, repeated = _load(body)
        order, prefix = (message, "")
        if message.get("data") is not None:
            order, prefix = message["data"], "data."
        task_id = _readable_task_id(message, message_id)
        if message.get("type") not in (None, MESSAGE_TYPE):
            raise UnknownType(
                f"type: is not {MESSAGE_TYPE}, the only one that this worker does",
                field="type",
                task_id=task_id,
            )
        # Where `type` or `data` stands twice, nobody knows whose style this is.
        if not {"type", "data"} & set(repeated):
            known = {
                "task_id": task_id,
                "style_id": _readable_style_id(order),
                "webhook_url": _webhook_url(message),
            }
        if repeated:
            raise _Wrong(printable(repeated[0]), "stands twice in one object")
        if not isinstance(order, dict):
            raise _Wrong("data", "must be an object")
        if message.get("task_id") is not None and task_id is None:
            raise _Wrong("task_id", "must be 1 to 128 of A-Z, a-z, 0-9, _ and -")
        job = _job(message, order, prefix, body, task_id, settings)
    except _Wrong as wrong:
        raise InvalidMessage(str(wrong), field=wrong.field, **known) from None
    if job.ignored_fields:
        log.info("message_fields_ignored", task_id=job.task_id, fields=list(job.ignored_fields))
    return job


def derive_task_id(body: bytes) -> str:
    """The id of a message that has none: the UUIDv5 of its bytes."""
    digest = hashlib.sha1(_BODIES.bytes + body, usedforsecurity=False).digest()
    return str(uuid.UUID(bytes=digest[:16], version=5))


def _load(body: bytes) -> tuple[dict[str, Any], list[str]]:
    """The JSON object, less the names that stand twice in one of its objects, and those names."""
    if len(body) > MAX_BODY:
        raise _Wrong("body", f"has {len(body):,} bytes; at most {MAX_BODY:,} are read")
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            repeated.extend(name for name, count in counts.items() if count > 1)
            found = {name: value for name, value in pairs if counts[name] == 1}
        return found

    try:
        message = json.loads(
            body.decode("utf-8-sig"),
            object_pairs_hook=unique,
            parse_int=_integer,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError:
        raise _Wrong("body", "is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _Wrong("body", f"is not JSON: {reason}") from None
    if not isinstance(message, dict):
        raise _Wrong("body", "must be a JSON object")
    return message, repeated


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _job(
    message: dict[str, Any],
    order: dict[str, Any],
    prefix: str,
    body: bytes,
    task_id: str | None,
    settings: Settings,
) -> TrainingJob:
    own, other = ("images", "image_urls") if prefix else ("image_urls", "images")
    images_field = other if order.get(own) is None and order.get(other) is not None else own
    checked = _checked(order, images_field, prefix)
    images = _images_to_train_on(checked.images, f"{prefix}{images_field}", settings)
    validation_images = _images(
        checked.validation_images or [], f"{prefix}validation_images", settings
    )
    captions = checked.captions or [None] * len(images)
    if len(captions) != len(images):
        raise _Wrong(f"{prefix}captions", _mismatch(len(captions), len(images)))
    parameters = checked.given_parameters()
    return TrainingJob(
        task_id=task_id or derive_task_id(body),
        style_id=checked.style_id,
        images=images,
        captions=tuple(captions),
        tags=tuple(tag for tag in checked.tags or () if tag),
        parameters=parameters,
        hyper_parameters=_hyper_parameters(parameters, f"{prefix}parameters", settings),
        webhook_url=_webhook_url(message),
        created_at=_created_at(message),
        id_is_derived=task_id is None,
        ignored_fields=(
            *_ignored(message, order, prefix, images_field),
            *_unused(checked.images, images, f"{prefix}{images_field}"),
            *_unused(checked.validation_images, validation_images, f"{prefix}validation_images"),
        )[:MAX_NAMED],
        validation_images=validation_images,
        sample_prompts=tuple(prompt for prompt in checked.sample_prompts or () if prompt),
        trigger_word=checked.trigger_word or "",
        body=body,
    )


def _mismatch(captions: int, images: int) -> str:
    return f"has {counted(captions, 'entry', 'entries')} for {counted(images, 'image')}"


def _checked(order: dict[str, Any], images_field: str, prefix: str) -> Order:
    values = {name: order[name] for name in _ORDER_FIELDS if order.get(name) is not None}
    if order.get(images_field) is not None:
        values["images"] = order[images_field]
    try:
        return Order.model_validate(values)
    except ValidationError as error:
        found = []
        for path, reason in complaints(error)[:MAX_COMPLAINTS]:
            path[0] = images_field if path[0] == "images" else path[0]
            found.append((prefix + ".".join(path), reason))
        others = "".join(f"; {field}: {reason}" for field, reason in found[1:])
        raise _Wrong(found[0][0], found[0][1] + others) from None


def _images_to_train_on(
    addresses: list[str | None], field: str, settings: Settings
) -> tuple[ImageRef, ...]:
    images = _images(addresses, field, settings)
    if not any(image.location for image in images):
        problem = (images[0].problem or "").removeprefix("has an address that ")
        raise _Wrong(f"{field}.0", problem)
    return images


def _images(addresses: list[str | None], field: str, settings: Settings) -> tuple[ImageRef, ...]:
    """One an image asked for. A broken address is one image less; one that points where nobody
    may read makes the message invalid."""
    images = []
    for index, address in enumerate(addresses):
        try:
            source, location = read_address(
                address or "",
                default_bucket=settings.aws_storage_bucket_name,
                endpoint=settings.s3_endpoint,
                allowed=settings.image_buckets,
            )
        except BrokenAddress as broken:
            shown = printable((address or "").partition("?")[0])
            images.append(ImageRef(shown, None, f"has an address that {broken}"))
        except ValueError as error:
            raise _Wrong(f"{field}.{index}", str(error)) from None
        else:
            images.append(ImageRef(source, location))
    return tuple(images)


def _unused(
    addresses: list[str | None] | None, images: tuple[ImageRef, ...], field: str
) -> tuple[str, ...]:
    """Parts of addresses that change nothing here, such as `images.3?width`."""
    return tuple(
        printable(f"{field}.{index}{part}")
        for index, (address, image) in enumerate(zip(addresses or (), images))
        if address and image.location
        for part in unused_parts(address)
    )


def _hyper_parameters(
    parameters: dict[str, Any], field: str, settings: Settings
) -> HyperParameters:
    try:
        return settings.hyper_parameters(**parameters)
    except ValueError as error:  # a rule beyond a plain limit; its text begins with the name
        name = next((one for one in PARAMETER_NAMES if str(error).startswith(f"{one} ")), None)
        raise _Wrong(f"{field}.{name}" if name else field, str(error)) from None


def _ignored(
    message: dict[str, Any], order: dict[str, Any], prefix: str, images_field: str
) -> tuple[str, ...]:
    meant = {*_ORDER_FIELDS, images_field}
    given = {name for name in ("webhook_url", "callback_url") if _is_webhook_url(message.get(name))}
    if _is_plain_text(message.get("created_at"), MAX_CREATED_AT):
        given.add("created_at")
    top = {"task_id", "type", "data"} | given
    parts = [("", message, top), (prefix, order, meant)] if prefix else [("", message, top | meant)]
    names = [
        printable(f"{at}{name}")
        for at, part, known in parts
        for name, value in part.items()
        if name not in known and value is not None
    ]
    return tuple(names[:MAX_NAMED])


def _is_task_id(value: Any) -> bool:
    return isinstance(value, str) and _TASK_ID.fullmatch(value) is not None


def _is_plain_text(value: Any, longest: int) -> bool:
    return isinstance(value, str) and len(value) <= longest and not _UNPRINTABLE.search(value)


def _readable_task_id(message: dict[str, Any], message_id: str | None) -> str | None:
    given = message.get("task_id")
    candidate = message_id if given is None else given
    return candidate if _is_task_id(candidate) else None


def _readable_style_id(order: Any) -> int | None:
    value = order.get("style_id") if isinstance(order, dict) else None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 < value <= MAX_STYLE_ID else None


def _created_at(message: dict[str, Any]) -> str | None:
    value = message.get("created_at")
    return value if _is_plain_text(value, MAX_CREATED_AT) else None


def _is_webhook_url(value: Any) -> bool:
    return _is_plain_text(value, MAX_WEBHOOK_URL)


def _webhook_url(message: dict[str, Any]) -> str | None:
    candidates = (message.get("webhook_url"), message.get("callback_url"))
    return next((url for url in candidates if _is_webhook_url(url)), None)
