"""Messages: bytes to a `Job`, or `InvalidMessage` naming the field (docs/protocol.md, section 2).

A message has one of two forms with the same meaning. With content in `data` it is an envelope, and
order fields outside `data` are ignored. Every other message is flat. A field that is null, and an
empty list of captions, count as absent. Whole numbers may be written `200` or `200.0`. Text and
booleans are never taken for numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jobs.fields import Order, WrongField, printable
from jobs.kinds import JobKind, Kinds
from utils.errors import InvalidMessage, UnknownType
from utils.logger import get_logger

log = get_logger(__name__)

MAX_BODY = 2 * 1024**2  # bytes; 200 long addresses with 200 long captions need less
MAX_DIGITS = 400  # of a whole number; Python refuses to read more than 4300
MAX_WEBHOOK_URL = 2048
MAX_CREATED_AT = 64
MAX_NAMED = 20
_ORG_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TASK_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_BODIES = uuid.UUID("8c1f4f3e-2b77-5d0a-9f0e-6a3d8c5b1e42")  # namespace of ids made from bodies


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """The order of one message: the envelope, and the kind's own part as a spec.

    Attributes:
        kind: Name of the kind.
        task_id: The message's id, else AMQP's `message_id`, else an id made from the body.
        spec: The understood order (see `jobs.kinds.Spec`).
        webhook_url: As in the message. The webhook service decides whether its origin may be used.
        created_at: As in the message.
        id_is_derived: The id was made from the body: the publisher gave none.
        ignored_fields: Names of fields that have no effect here (the first few).
        org_id: The organisation of the API server that ordered it; None for any other order.
        body: The message itself.
        headers: The AMQP headers that its copies carry.
    """

    kind: str
    task_id: str
    spec: Any
    webhook_url: str | None = None
    created_at: str | None = None
    id_is_derived: bool = False
    ignored_fields: tuple[str, ...] = ()
    org_id: str | None = None
    body: bytes = dataclasses.field(default=b"", compare=False, repr=False)
    headers: dict[str, str | int | bool] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def subject(self) -> str:
        """The thing that the job makes, such as a style's id."""
        subject: str = self.spec.subject
        return subject

    @property
    def identity(self) -> str:
        """Hash of the order's meaning; two messages with one task id must agree in it."""
        identity: str = self.spec.identity
        return identity

    def understood(self) -> dict[str, Any]:
        """The job as JSON values, for the job record; `from_understood` reads them.

        The fields of the envelope and of the spec are on one level.
        """
        values = {
            "task_id": self.task_id,
            **dataclasses.asdict(self.spec),
            **{name: getattr(self, name) for name in _ENVELOPE},
            # Older workers refuse records with fields that they do not know.
            **({"org_id": self.org_id} if self.org_id else {}),
        }
        return dict(json.loads(json.dumps(values)))


_ENVELOPE = ("webhook_url", "created_at", "id_is_derived", "ignored_fields")


def parse(body: bytes, *, message_id: str | None, kinds: Kinds) -> Job:
    """Read a message.

    Args:
        body: The message: any bytes.
        message_id: AMQP's `message_id`; one that could not be a task id counts as absent.
        kinds: The kinds that are served, with their defaults.

    Raises:
        UnknownType: The message is for another kind of worker. The error carries no subject, which
            may be a finished style.
        InvalidMessage: The message can never become a job. Names the field in the message's own
            spelling, and carries the ids and the webhook address as far as they can be read safely.
    """
    known: dict[str, Any] = {}
    try:
        message, repeated = _load(body)
        order, prefix = (message, "")
        if message.get("data") is not None:
            order, prefix = message["data"], "data."
        task_id = _readable_task_id(message, message_id)
        kind = _kind(message, kinds, task_id)
        # If `type` or `data` occurs twice, the subject is uncertain.
        if not {"type", "data"} & set(repeated):
            known = {
                "task_id": task_id,
                "kind": kind.name,
                "subject": kind.subject_in(order) if isinstance(order, dict) else None,
                "webhook_url": _webhook_url(message),
            }
        if repeated:
            raise WrongField(printable(repeated[0]), "occurs more than once in one JSON object")
        if not isinstance(order, dict):
            raise WrongField("data", "must be an object")
        if message.get("task_id") is not None and task_id is None:
            raise WrongField("task_id", "must be 1 to 128 of A-Z, a-z, 0-9, _ and -")
        job = _job(message, Order(order, prefix), kind, body, task_id)
    except WrongField as wrong:
        raise InvalidMessage(str(wrong), field=wrong.field, **known) from None
    if job.ignored_fields:
        log.info("message_fields_ignored", task_id=job.task_id, fields=list(job.ignored_fields))
    return job


def from_understood(kind: JobKind, values: Mapping[str, Any]) -> Job:
    """The job that `Job.understood` stored, with the parameters of that time.

    Fields of a newer version are ignored: the record of a job that depends on them has a higher
    `min_level`.

    Args:
        kind: The record's kind.
        values: The message in the job record.

    Raises:
        ValueError: The values are not a job's.
    """
    names = {field.name for field in dataclasses.fields(kind.spec_type)}
    if not isinstance(values.get("task_id"), str):
        raise ValueError("task_id is missing or is not text")
    try:
        spec = kind.restored({name: value for name, value in values.items() if name in names})
        job = Job(
            kind=kind.name,
            task_id=values["task_id"],
            spec=spec,
            webhook_url=values.get("webhook_url"),
            created_at=values.get("created_at"),
            id_is_derived=bool(values.get("id_is_derived", False)),
            ignored_fields=tuple(values.get("ignored_fields", ())),
            org_id=_org_id(values.get("org_id")),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the order of a job: {error!r}") from error
    return dataclasses.replace(job, body=to_message(kind, job))


def to_message(kind: JobKind, job: Job) -> bytes:
    """A message body for the same job, with its id in it."""
    message = {
        "task_id": job.task_id,
        "type": kind.message_type,
        "data": kind.order(job.spec) | ({"org_id": job.org_id} if job.org_id else {}),
        "webhook_url": job.webhook_url,
        "created_at": job.created_at,
    }
    return json.dumps({k: v for k, v in message.items() if v is not None}).encode()


def kind_of(body: bytes, kinds: Kinds) -> str:
    """The kind that a message names; the first of the kinds if it names none of them."""
    try:
        kind = kinds.of_type(_load(body)[0].get("type"))
    except WrongField:
        kind = None
    return (kind or kinds.of(kinds.served[0])).name


def derive_task_id(body: bytes) -> str:
    """The id of a message that has none: the UUIDv5 of its bytes."""
    digest = hashlib.sha1(_BODIES.bytes + body, usedforsecurity=False).digest()
    return str(uuid.UUID(bytes=digest[:16], version=5))


def _load(body: bytes) -> tuple[dict[str, Any], list[str]]:
    """The JSON object without the names that occur twice in one object, and those names."""
    if len(body) > MAX_BODY:
        raise WrongField("body", f"has {len(body):,} bytes; at most {MAX_BODY:,} are read")
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
        raise WrongField("body", "is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise WrongField("body", f"is not JSON: {reason}") from None
    if not isinstance(message, dict):
        raise WrongField("body", "must be a JSON object")
    return message, repeated


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits; at most {MAX_DIGITS:,} are read")
    return int(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _kind(message: dict[str, Any], kinds: Kinds, task_id: str | None) -> JobKind:
    kind = kinds.of_type(message.get("type"))
    if kind is None:
        types = [one.message_type for one in kinds]
        only = f"{types[0]}, the only one that this worker does"
        raise UnknownType(
            "type: is not " + (only if len(types) == 1 else f"one of {', '.join(types)}"),
            field="type",
            task_id=task_id,
        )
    return kind


def _job(
    message: dict[str, Any], order: Order, kind: JobKind, body: bytes, task_id: str | None
) -> Job:
    spec = kind.read(order)
    org_id = _org_id(order.get("org_id"))
    return Job(
        kind=kind.name,
        task_id=task_id or derive_task_id(body),
        spec=spec,
        webhook_url=_webhook_url(message),
        created_at=_created_at(message),
        id_is_derived=task_id is None,
        ignored_fields=(*_ignored(message, order), *order.unused)[:MAX_NAMED],
        org_id=org_id,
        body=body,
    )


def _ignored(message: dict[str, Any], order: Order) -> tuple[str, ...]:
    top = {"task_id", "type", "data"}
    top |= {name for name in ("webhook_url", "callback_url") if _is_webhook_url(message.get(name))}
    if _is_plain_text(message.get("created_at"), MAX_CREATED_AT):
        top.add("created_at")
    if order.prefix:
        names = [*_others("", message, top), *_others("data.", message["data"], order.understood)]
    else:
        names = _others("", message, top | order.understood)
    return tuple(names[:MAX_NAMED])


def _others(prefix: str, part: dict[str, Any], known: set[str] | frozenset[str]) -> list[str]:
    return [
        printable(f"{prefix}{name}")
        for name, value in part.items()
        if name not in known and value is not None
    ]


def _is_plain_text(value: Any, longest: int) -> bool:
    return isinstance(value, str) and len(value) <= longest and not _UNPRINTABLE.search(value)


def _readable_task_id(message: dict[str, Any], message_id: str | None) -> str | None:
    given = message.get("task_id")
    candidate = message_id if given is None else given
    is_task_id = isinstance(candidate, str) and _TASK_ID.fullmatch(candidate) is not None
    return candidate if is_task_id else None


def _org_id(value: Any) -> str | None:
    return value if isinstance(value, str) and _ORG_ID.fullmatch(value) else None


def _created_at(message: dict[str, Any]) -> str | None:
    value = message.get("created_at")
    return value if _is_plain_text(value, MAX_CREATED_AT) else None


def _is_webhook_url(value: Any) -> bool:
    return _is_plain_text(value, MAX_WEBHOOK_URL)


def _webhook_url(message: dict[str, Any]) -> str | None:
    candidates = (message.get("webhook_url"), message.get("callback_url"))
    return next((url for url in candidates if _is_webhook_url(url)), None)
