"""Who holds a record on S3, under which claim; and how a record becomes JSON.

A record is one JSON object on S3 that at most one worker may change at a time. Everything here is
pure: reading and writing is `services.record_object`, keeping a hold alive is `services.lease`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import uuid
from typing import TypeVar

from utils.errors import StorageError
from utils.events import from_dict


def utc_now() -> str:
    """The time, for people to read. No decision rests on it: clocks differ between workers."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """One worker's numbered hold on a record.

    Attributes:
        owner: Name of the worker that holds the record, or held it last.
        claim: Raised each time the record is taken; everything that is written under a claim
            carries it.
        lease_seconds: What the holder promises: it writes the record at least this often, and stops
            when it cannot.
        released: Nobody holds the record; it may be taken at once.
        quiet_seconds: After a release: how long it is normal that nobody takes the record (a
            retry's delay).
        revision: Raised by each write.
        nonce: Fresh for each write. It changes the ETag, and it tells a worker its own write when
            the answer was lost and the retry is refused.
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
        """The same claim, given up."""
        return dataclasses.replace(self, released=True, quiet_seconds=quiet_seconds)

    def stamped(self) -> Hold:
        """As it is about to be written: with a nonce of its own."""
        return dataclasses.replace(
            self, revision=self.revision + 1, nonce=uuid.uuid4().hex, written_at=utc_now()
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeldRecord:
    """What every record has: its hold, and the version of its form.

    A later version may add fields with defaults and reads older records; an older worker refuses a
    newer record instead of dropping what it does not know.
    """

    hold: Hold
    version: int = 1


R = TypeVar("R", bound=HeldRecord)


def stamped(record: R) -> R:
    """The record as it is about to be written, with a nonce of its own."""
    return dataclasses.replace(record, hold=record.hold.stamped())


def encode(record: HeldRecord) -> bytes:
    """The record as JSON that a person can read too."""
    return json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False).encode()


def decode(kind: type[R], body: bytes, key: str) -> R:
    """The record that `encode` wrote.

    Args:
        kind: The record's class.
        body: The object's bytes.
        key: Its key, for the message.

    Raises:
        StorageError: The object is not such a record, or one of a newer worker's.
    """
    try:
        return from_dict(kind, json.loads(body))
    except (ValueError, AttributeError, TypeError) as error:
        raise StorageError(
            f"The record {key} cannot be read: it is damaged, or a newer worker wrote it and this "
            f"one needs an update ({error})."
        ) from error
