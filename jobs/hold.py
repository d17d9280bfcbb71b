"""The hold of a worker on a record on S3, and the record's form as JSON.

A record is one JSON object on S3 that at most one worker may change at a time. This module is pure:
`services.records.record_object` reads and writes records, and `services.records.lease` renews a
hold.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import uuid
from collections.abc import Mapping
from typing import Any, TypeVar

from utils.errors import DamagedRecord, NewerRecord
from utils.events import UNKNOWN, from_dict

VERSION = 1
"""The version of the record format that this worker writes, and the highest that it reads."""


def later(default: Any) -> Any:
    """A field that the first release of the records does not have and refuses to read.

    It is written only if it differs from its default, so that an older worker can take over every
    record that does not need it.
    """
    # pylint: disable-next=invalid-field-call  # called where a field is declared
    return dataclasses.field(default=default, metadata={"later": True})


def beside(default: float | str) -> Any:
    """A number or a short text that is stored in the object's metadata, not in the record's body.

    Older workers read the record without it, and drop it when they write.
    """
    # pylint: disable-next=invalid-field-call
    return dataclasses.field(default=default, metadata={"beside": True})


def unknown_fields() -> Any:
    """The field that keeps values of a newer version that this version does not know."""
    # pylint: disable-next=invalid-field-call
    return dataclasses.field(default_factory=dict, metadata={"later": True}, repr=False)


def utc_now() -> str:
    """The present time, for people. No decision depends on it: the workers' clocks differ."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """One worker's numbered hold on a record.

    Attributes:
        owner: Name of the worker that holds the record, or held it last.
        claim: Number that rises each time the record is claimed; every write under a claim carries
            it.
        lease_seconds: The holder writes the record at least this often, and stops its work when it
            cannot.
        released: No worker holds the record; it may be claimed at once.
        quiet_seconds: After a release: the expected time until a worker claims the record (a
            retry's delay).
        revision: Number that rises with each write.
        nonce: New for each write. It changes the ETag. If an answer was lost and the retry is
            refused, a worker recognises its own write by it.
        written_at: The writer's clock, for people.
    """

    owner: str
    claim: int
    lease_seconds: float
    released: bool = False
    quiet_seconds: float = 0.0
    revision: int = 0
    nonce: str = ""
    written_at: str = ""
    unknown: dict[str, Any] = unknown_fields()

    @property
    def silence(self) -> float:
        """Seconds after the last write during which no further write is expected."""
        return self.quiet_seconds if self.released else self.lease_seconds

    def taken(self, owner: str, lease_seconds: float) -> Hold:
        """The next claim."""
        return dataclasses.replace(
            self,
            owner=owner,
            claim=self.claim + 1,
            lease_seconds=lease_seconds,
            released=False,
            quiet_seconds=0.0,
        )

    def dropped(self, quiet_seconds: float = 0.0) -> Hold:
        """The same claim, released."""
        return dataclasses.replace(self, released=True, quiet_seconds=quiet_seconds)

    def stamped(self) -> Hold:
        """The hold for the next write, with a new nonce."""
        return dataclasses.replace(
            self, revision=self.revision + 1, nonce=uuid.uuid4().hex, written_at=utc_now()
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeldRecord:
    """The part that every record has: its hold, and the version of its format.

    A later version may add fields with defaults (`later`). A reader keeps the fields that it does
    not know and writes them back. A change that an older worker must not touch raises `version`.
    """

    hold: Hold
    version: int = VERSION
    unknown: dict[str, Any] = unknown_fields()

    @classmethod
    def to_stored(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The record's JSON values in the stored form, which `from_stored` reads."""
        return values

    @classmethod
    def from_stored(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The JSON values of a stored record."""
        return values


R = TypeVar("R", bound=HeldRecord)


def stamped(record: R) -> R:
    """The record for the next write, with a new nonce."""
    return dataclasses.replace(record, hold=record.hold.stamped())


def encode(record: HeldRecord) -> bytes:
    """The record as JSON in a readable layout, without the fields of the object's metadata."""
    return json.dumps(record.to_stored(_plain(record)), indent=1, ensure_ascii=False).encode()


def values_beside(record: HeldRecord) -> dict[str, str]:
    """The record's values that are stored in the object's metadata, by their names there."""
    return {
        _metadata_name(field): value if isinstance(value, str) else repr(value)
        for field in dataclasses.fields(record)
        if field.metadata.get("beside") and (value := getattr(record, field.name)) != field.default
    }


def decode(kind: type[R], body: bytes, key: str, metadata: Mapping[str, str] | None = None) -> R:
    """The record that `encode` wrote.

    Args:
        kind: The record's class.
        body: The object's bytes.
        key: Its key, for the message.
        metadata: The object's metadata, which holds some of the record's values.

    Raises:
        NewerRecord: A newer worker wrote it in a form that this one must not touch.
        DamagedRecord: The object is not such a record.
    """
    try:
        values = json.loads(body)
        version = values.get("version", VERSION)
        if isinstance(version, int) and version > VERSION:
            raise NewerRecord(
                f"The record {key} has version {version} and this worker reads up to {VERSION}. "
                "Update the worker."
            )
        return from_dict(kind, kind.from_stored(values) | _values_beside(kind, metadata or {}))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedRecord(f"The record {key} cannot be read: it is damaged ({error}).") from error


def _plain(value: Any) -> Any:
    """JSON values of a record: without defaults of later fields, with the unknown values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            if field.name == UNKNOWN or field.metadata.get("beside"):
                continue
            if field.metadata.get("later") and part == field.default:
                continue
            plain[field.name] = _plain(part)
        return plain | getattr(value, UNKNOWN, {})
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, enum.Enum) else value


def _values_beside(kind: type[HeldRecord], metadata: Mapping[str, str]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for field in dataclasses.fields(kind):
        text = metadata.get(_metadata_name(field)) if field.metadata.get("beside") else None
        if text is not None:
            try:
                found[field.name] = _read(field.default, text)
            except ValueError:
                continue  # the value is only a count; the record itself is complete
    return found


def _read(default: Any, text: str) -> float | str:
    """A text as a value of the same type as the default."""
    value: float | str = type(default)(text)
    return value


def _metadata_name(field: dataclasses.Field[Any]) -> str:
    return field.name.replace("_", "-")
