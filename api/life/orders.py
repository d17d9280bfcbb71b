"""From a request to a job: files, parameters, the kind's order, and the message for a worker.

The message is read by the same code that a worker reads it with, so an order that a worker would
refuse is refused here, with the field of the request.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.gate.keys import Caller
from api.gate.problems import Problem
from api.services import Services
from api.store.database import Writing
from api.store.tables import CounterRow, FileRow
from jobs import message as messages
from jobs.addresses import S3Location
from jobs.fields import WrongField
from jobs.kinds import ApiOrder, JobKind, OrderedFile, OrderedOverApi, order_of
from jobs.layout import place_of
from utils.errors import InvalidMessage
from utils.logger import get_logger

log = get_logger(__name__)

MAX_FILES = 1000
ORG_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FILE_ID = re.compile(r"file-[0-9a-f]{24}")
_NAME = re.compile(r"[^a-z0-9]+")
_DATA = "data."

ShortText = Annotated[str, Field(max_length=200)]
FileIds = Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=MAX_FILES)]


class OpenAiHyperParameters(BaseModel):
    """OpenAI's hyper-parameters; `auto` means the kind's default."""

    model_config = ConfigDict(extra="forbid")

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Literal["auto"] | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] | None = None
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | Literal["auto"] | None = None

    def given(self) -> dict[str, Any]:
        """The values that are not left to the kind."""
        values = self.model_dump(exclude_none=True)
        return {name: value for name, value in values.items() if value != "auto"}


class Supervised(BaseModel):
    """The options of the method `supervised`."""

    model_config = ConfigDict(extra="forbid")

    hyperparameters: OpenAiHyperParameters = Field(default_factory=OpenAiHyperParameters)


class Method(BaseModel):
    """The method of training; `supervised` is the only one that is done."""

    type: str = "supervised"
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class JobOrder(BaseModel):
    """An order of a job: OpenAI's parameters, and this server's own."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "kind": "style",
                    "model": "sd15",
                    "training_files": ["file-0123456789abcdef01234567"],
                    "parameters": {"epochs": 20},
                    "options": {"trigger_word": "harbourstyle"},
                    "name": "harbour images",
                    "tags": ["test"],
                }
            ]
        },
    )

    model: Annotated[str, Field(max_length=200, description="The base model.")] = ""
    kind: Annotated[
        str | None,
        Field(max_length=64, description="The kind of job; the first registered one by default."),
    ] = None
    training_file: Annotated[
        str | None, Field(max_length=64, description="The id of an uploaded file.")
    ] = None
    training_files: Annotated[
        FileIds, Field(description="The ids of several uploaded files, such as images.")
    ] = Field(default_factory=list)
    validation_file: Annotated[str | None, Field(max_length=64)] = None
    validation_files: FileIds = Field(default_factory=list)
    method: Method | None = None
    hyperparameters: OpenAiHyperParameters | None = None
    parameters: Annotated[
        dict[str, Any], Field(description="Parameters of the kind (docs/parameters.md).")
    ] = Field(default_factory=dict)
    options: Annotated[
        dict[str, Any],
        Field(
            description="Further fields of the kind's order, such as `captions` and "
            "`trigger_word` of a style. A value that is the id of a file stands for the file."
        ),
    ] = Field(default_factory=dict)
    suffix: Annotated[str | None, Field(max_length=64)] = None
    seed: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None,
        Field(max_length=16),
    ] = None
    name: ShortText | None = None
    tags: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=20)] = Field(
        default_factory=list
    )
    priority: Annotated[
        int, Field(ge=-10, le=10, description="Higher ones of an organisation go first.")
    ] = 0
    validate_only: Annotated[bool, Field(description="Check the order, and create nothing.")] = (
        False
    )
    integrations: None = None

    def all_training_files(self) -> list[str]:
        """The files to train on, each once."""
        first = [self.training_file] if self.training_file else []
        return list(dict.fromkeys([*first, *self.training_files]))

    def all_validation_files(self) -> list[str]:
        """The files to validate with, each once."""
        first = [self.validation_file] if self.validation_file else []
        return list(dict.fromkeys([*first, *self.validation_files]))

    def all_hyperparameters(self) -> dict[str, Any]:
        """OpenAI's hyper-parameters, from either place."""
        found = self.hyperparameters.given() if self.hyperparameters else {}
        if self.method and self.method.supervised:
            found |= self.method.supervised.hyperparameters.given()
        return found


_FIELDS = frozenset(JobOrder.model_fields)


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """An order that a worker would accept.

    Attributes:
        kind: Its kind.
        subject: The thing that the job makes.
        subject_number: The same as a number, for a kind that counts its subjects.
        body: The message for the worker.
        job: The message as a worker understands it.
    """

    kind: str
    subject: str
    subject_number: int | None
    body: bytes
    job: messages.Job


def new_job_id() -> str:
    """A random id of a job, which is its task id everywhere."""
    return f"ftjob-{secrets.token_hex(12)}"


def kind_for(services: Services, order: JobOrder) -> JobKind:
    """The kind that an order is of.

    Raises:
        Problem: There is no such kind, or its method is not offered.
    """
    method = order.method
    if method and (method.type != "supervised" or method.dpo or method.reinforcement):
        raise Problem(
            "method_not_supported",
            f"method.type: {method.type} is not done here. Use supervised.",
            param="method",
        )
    name = order.kind or services.kinds.served[0]
    if name not in services.kinds.served:
        raise Problem(
            "kind_not_offered",
            f"kind: this server does no jobs of the kind {name}. It does: "
            f"{', '.join(services.kinds.served)}.",
            param="kind",
        )
    return services.kinds.of(name)


def number_for(services: Services, kind: JobKind) -> int | None:
    """A fresh subject for a kind that counts them; None for any other kind.

    A number whose place on S3 holds a model already is left out: it belongs to a job that this
    database does not know.

    Raises:
        StorageError: The place cannot be looked at.
    """
    if not (isinstance(kind, OrderedOverApi) and kind.subject_is_number):
        return None
    first = services.settings.api_style_id_start
    while True:
        number = services.database.write(lambda session: _next_number(session, kind.name, first))
        prefix = place_of(kind.name, str(number), "").models
        if next(services.s3.list_objects(services.buckets.models, prefix), None) is None:
            return number
        log.warning("subject_in_use", kind=kind.name, subject=number)


def prepare(
    session: Session,
    services: Services,
    caller: Caller,
    order: JobOrder,
    job_id: str,
    number: int | None,
) -> Prepared:
    """Make the message of an order, and check it as a worker would.

    Args:
        number: The subject of a kind that counts them; see `number_for`.

    Raises:
        Problem: The order names unknown files, or a worker would refuse it.
    """
    kind = kind_for(services, order)
    named = _named_files(session, caller, order)
    subject = str(number) if number is not None else _subject(order, job_id)
    asked = ApiOrder(
        subject=subject,
        org_id=caller.org_id,
        model=order.model,
        training_files=_ordered(order.all_training_files(), named),
        validation_files=_ordered(order.all_validation_files(), named),
        parameters=order.parameters,
        hyperparameters=order.all_hyperparameters(),
        seed=order.seed,
        fields=_resolved(order.options, named),
    )
    try:
        data = order_of(kind, asked)
        body = _message(services, kind, job_id, data, caller.org_id)
        job = messages.parse(body, message_id=None, kinds=services.kinds)
    except WrongField as error:
        raise _refused(error.field, str(error)) from None
    except InvalidMessage as error:
        raise _refused(error.field, str(error)) from None
    _require_own_inputs(kind, job, named)
    _require_known_options(job)
    return Prepared(kind.name, job.subject, number, body, job)


def _message(
    services: Services, kind: JobKind, job_id: str, data: dict[str, Any], org_id: str
) -> bytes:
    created_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return json.dumps(
        {
            "task_id": job_id,
            "type": kind.message_type,
            "data": {name: value for name, value in data.items() if value is not None}
            | {"org_id": org_id},
            "webhook_url": services.backend_url,
            "created_at": created_at,
        }
    ).encode()


def level_needed(prepared: Prepared, services: Services) -> int:
    """The protocol level that a message asks for."""
    return services.kinds.of(prepared.kind).min_level(prepared.job.spec)


def _named_files(session: Session, caller: Caller, order: JobOrder) -> dict[str, FileRow]:
    """The files that an order names, by their ids.

    Raises:
        Problem: One of them is not the caller's.
    """
    asked = {
        **dict.fromkeys(order.all_training_files(), "training_file"),
        **dict.fromkeys(order.all_validation_files(), "validation_file"),
        **dict.fromkeys(_file_ids(order.options), "options"),
    }
    for file_id, param in asked.items():
        if not _FILE_ID.fullmatch(file_id):
            raise not_a_file(file_id, param)
    rows = session.scalars(
        select(FileRow).where(
            FileRow.id.in_(asked), FileRow.org_id == caller.org_id, FileRow.deleted_at.is_(None)
        )
    )
    found = {row.id: row for row in rows}
    for file_id, param in asked.items():
        if file_id not in found:
            raise Problem(
                "file_not_found",
                f"{param}: there is no file {file_id}. Upload it with POST /v1/files.",
                param=param,
            )
    return found


def not_a_file(value: str, param: str) -> Problem:
    """The problem of a value that cannot be the id of a file."""
    if "/" in value or "\\" in value:
        return Problem(
            "path_not_accepted",
            f"{param}: a path is not accepted. Upload the file with POST /v1/files, and give its "
            "id.",
            param=param,
        )
    return Problem(
        "invalid_parameter",
        f"{param}: must be the id of a file, such as file-0123456789abcdef01234567.",
        param=param,
    )


def _file_ids(options: Any) -> Iterator[str]:
    if isinstance(options, str) and _FILE_ID.fullmatch(options):
        yield options
    elif isinstance(options, dict):
        for value in options.values():
            yield from _file_ids(value)
    elif isinstance(options, list):
        for value in options:
            yield from _file_ids(value)


def _resolved(options: Any, named: dict[str, FileRow]) -> Any:
    """The options, with addresses in place of the ids of files."""
    if isinstance(options, str) and options in named:
        return _address(named[options])
    if isinstance(options, dict):
        return {name: _resolved(value, named) for name, value in options.items()}
    if isinstance(options, list):
        return [_resolved(value, named) for value in options]
    return options


def _ordered(ids: Sequence[str], named: dict[str, FileRow]) -> tuple[OrderedFile, ...]:
    return tuple(OrderedFile(_address(named[each]), named[each].filename) for each in ids)


def _address(row: FileRow) -> str:
    return S3Location(row.bucket, row.key).uri()


def _require_own_inputs(kind: JobKind, job: messages.Job, named: dict[str, FileRow]) -> None:
    """Every object that the job reads is a file that the order names and the caller owns."""
    own = {(row.bucket, row.key) for row in named.values()}
    for each in kind.inputs(job.spec):
        location = each.location
        if location is None or (location.bucket, location.key) not in own:
            raise Problem(
                "invalid_parameter",
                "options: an address of an object is not accepted. Upload the file with POST "
                "/v1/files, and give its id.",
                param="options",
            )


def _require_known_options(job: messages.Job) -> None:
    """A misspelt option has no effect, so it is refused."""
    if job.ignored_fields:
        name = job.ignored_fields[0].removeprefix(_DATA)
        raise Problem(
            "invalid_parameter",
            f"options.{name}: jobs of the kind {job.kind} have no such field.",
            param=f"options.{name}",
        )


def _refused(field: str, sentence: str) -> Problem:
    """The problem of an order that a worker would refuse, with the field of the request."""
    name = field.removeprefix(_DATA)
    first = name.partition(".")[0]
    if first in ("images", "image_urls"):
        param = "training_files"
    elif first == "validation_images":
        param = "validation_files"
    elif first in _FIELDS or first == "org_id":
        param = name
    else:
        param = f"options.{name}"
    detail = sentence.removeprefix(f"{field}: ")
    return Problem("invalid_parameter", f"{param}: {detail}.", param=param)


def _next_number(session: Writing, kind: str, first: int) -> int:
    """The next subject of a kind that counts them."""
    name = f"subject:{kind}"
    row = session.scalar(select(CounterRow).where(CounterRow.name == name).with_for_update())
    if row is None:
        row = CounterRow(name=name, value=first - 1)
        session.add(row)
    row.value = max(row.value + 1, first)
    session.flush()
    return row.value


def _subject(order: JobOrder, job_id: str) -> str:
    """A name that is never used twice: what the client calls the job, and a part of its id."""
    said = _NAME.sub("-", (order.suffix or order.name or "").lower()).strip("-")[:40]
    return f"{said or 'job'}-{job_id[-8:]}"


def short_model(base_model: str) -> str:
    """The base model's name as a part of an id: its last part, without special characters."""
    last = base_model.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-.")[:60] or "model"


def model_id_of(base_model: str, org_id: str | None, suffix: str | None, job_id: str) -> str:
    """The id of the model that a job makes. It has no `/`, `%`, `#`, `?` and no blank."""
    said = _NAME.sub("-", (suffix or "").lower()).strip("-")[:40]
    return f"ft:{short_model(base_model)}:{org_id or 'operator'}:{said}:{job_id[-8:]}"
