"""What a handler is given, and what it answers: facts that say what becomes of a delivery.

A handler never touches the connection. It returns a `Settlement`; the connection's owner makes its
publications first (persistent, mandatory, confirmed) and acknowledges the delivery only then.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Mapping
from typing import Any

from utils.errors import ErrorCode

MAX_ERROR_MESSAGE = 2000  # characters; headers must fit in one frame
MAX_MESSAGE_ID = 255  # bytes of AMQP's short string

OWN_COPY = "x-worker-copy"
"""Header of a worker's copy of a message that may have been claimed: it is no new order."""
PUT_OFFS = "x-put-offs"
"""Header of a worker's copy: how often the message was put off so far."""
PUT_OFF_REASON = "x-put-off-reason"
"""Header of a worker's copy: why it was put off last, and how often in a row for that reason."""
CRASHES = "x-crashes"
"""Header of a worker's copy: how often the message's handler has broken so far."""
MIN_LEVEL = "x-min-level"
"""Header: the lowest protocol level of a worker that understands the message."""

CARRIED_HEADERS = frozenset(
    {OWN_COPY, PUT_OFFS, PUT_OFF_REASON, CRASHES, MIN_LEVEL, "traceparent", "tracestate"}
)
"""The headers that a copy takes along. All others stay behind: a publisher's headers may fill a
frame, and the broker's own history would make it drop the copy as one that goes in circles."""
MAX_HEADER = 1024  # characters of a header's text; a longer one stays behind

BODY_BYTES = "x-body-bytes"
"""Header of a dead letter whose body was cut: the size of the whole body."""
BODY_SHA256 = "x-body-sha256"
"""Header of a dead letter whose body was cut: the SHA-256 of the whole body."""
CUT_BODY_BYTES = 4096
"""Bytes of the body that a shortened dead letter keeps, for a person to recognise it."""
_REASONS = frozenset({"x-error-code", "x-error-message", "x-task-id", "x-attempts"})


class Queue(enum.StrEnum):
    """The queues that the worker knows, whatever their names on the broker (see
    `services.broker.topology`).
    """

    TRAINING = "training"
    ENDINGS = "endings"
    DEAD = "dead"


class Action(enum.StrEnum):
    """What is told to the broker about the delivery itself."""

    ACK = "ack"
    REQUEUE = "requeue"


@dataclasses.dataclass(frozen=True, slots=True)
class Delivery:
    """One message as the broker handed it over.

    Attributes:
        body: The message, untouched.
        message_id: AMQP's `message_id` property, if the publisher set one.
        redelivered: The broker has handed this message over before, to this worker or another.
        headers: AMQP headers.
        queue: Where it came from.
    """

    body: bytes
    message_id: str | None = None
    redelivered: bool = False
    headers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    queue: Queue = Queue.TRAINING

    @property
    def carried_headers(self) -> dict[str, str | int | bool]:
        """The headers that a copy of the message takes along, those of `CARRIED_HEADERS`."""
        return {
            name: value
            for name, value in self.headers.items()
            if name in CARRIED_HEADERS
            and isinstance(value, (str, int, bool))
            and not (isinstance(value, str) and len(value) > MAX_HEADER)
        }

    @property
    def put_offs(self) -> int:
        """How often a worker has put this message off."""
        return self._count(PUT_OFFS)

    def put_offs_for(self, reason: str) -> int:
        """How often in a row a worker has put this message off for this reason."""
        said, _, count = str(self.headers.get(PUT_OFF_REASON, "")).rpartition(":")
        return int(count) if said == reason and count.isdecimal() else 0

    @property
    def crashes(self) -> int:
        """How often a worker has put this message off because its handler broke."""
        return self._count(CRASHES)

    @property
    def min_level(self) -> int:
        """The lowest protocol level of a worker that understands the message; 0: any."""
        return level_of(self.headers)

    def _count(self, header: str) -> int:
        return _whole(self.headers.get(header))


@dataclasses.dataclass(frozen=True, slots=True)
class Publication:
    """One message to be published, persistent, mandatory and confirmed.

    Attributes:
        queue: Where it goes.
        body: The message.
        message_id: The task's id; None only where nobody knows it.
        headers: Texts, whole numbers and booleans.
        delay_seconds: It reaches `queue` after so long, by way of a delay queue. Each distinct
            delay makes a queue that stays, so use few: those of the settings.

    Raises:
        ValueError: AMQP cannot carry the message id or a header.
    """

    queue: Queue
    body: bytes
    message_id: str | None = None
    headers: Mapping[str, str | int | bool] = dataclasses.field(default_factory=dict)
    delay_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.message_id is not None and len(self.message_id.encode()) > MAX_MESSAGE_ID:
            raise ValueError(f"a message id has at most {MAX_MESSAGE_ID} bytes")
        for name, value in self.headers.items():
            if not isinstance(value, (str, int, bool)):
                raise ValueError(f"header {name} is a {type(value).__name__}")

    @classmethod
    def to_dead(
        cls,
        body: bytes,
        *,
        code: str,
        message: str,
        task_id: str | None,
        attempts: int = 0,
        min_level: int = 0,
    ) -> Publication:
        """A message that can go no further, with the reason (docs/protocol.md, section 1).

        Args:
            body: The original body.
            code: One of `utils.errors.ErrorCode`.
            message: A sentence for a person; cut to `MAX_ERROR_MESSAGE`.
            task_id: The task's id, where one could be read.
            attempts: Attempts made.
            min_level: The protocol level that the message needs, kept for whoever sends it back.
        """
        headers: dict[str, str | int | bool] = {
            "x-error-code": str(code),
            "x-error-message": _encodable(message)[:MAX_ERROR_MESSAGE],
            "x-task-id": task_id or "",
            "x-attempts": attempts,
        }
        if min_level:
            headers[MIN_LEVEL] = min_level
        return cls(Queue.DEAD, body, task_id, headers)

    def given_up(self, why: str) -> Publication:
        """The same body as a dead letter with no other headers than the reasons.

        A publication that is a dead letter already keeps its own reasons.

        Args:
            why: Why it could not be published as it is; a sentence for a person.
        """
        if self.queue is not Queue.DEAD:
            return Publication.to_dead(
                self.body,
                code=ErrorCode.PUBLICATION_REFUSED,
                message=f"a message for the queue {self.queue.value} was refused: {why}",
                task_id=self.message_id,
                min_level=level_of(self.headers),
            )
        kept = _REASONS | {MIN_LEVEL}
        headers = {name: value for name, value in self.headers.items() if name in kept}
        return dataclasses.replace(self, headers=headers, delay_seconds=None)

    def cut(self) -> Publication:
        """The same message with only the first bytes of its body; headers hold the whole body's
        size and SHA-256.
        """
        headers: dict[str, str | int | bool] = {
            **self.headers,
            BODY_BYTES: len(self.body),
            BODY_SHA256: hashlib.sha256(self.body).hexdigest(),
        }
        return dataclasses.replace(self, body=self.body[:CUT_BODY_BYTES], headers=headers)


@dataclasses.dataclass(frozen=True, slots=True)
class Settlement:
    """What becomes of a delivery: first every publication, in order, each confirmed; then the
    action.

    Where the delivery's channel is gone meanwhile, the publications are made all the same and the
    action is dropped: the broker hands the message out again, and the job record makes that
    harmless.

    Attributes:
        action: `ACK`: done with. `REQUEUE`: back to the queue, for any worker.
        publish: What to publish before.
    """

    action: Action
    publish: tuple[Publication, ...] = ()

    @classmethod
    def ack(cls, *publish: Publication) -> Settlement:
        """The message is done with, once these publications are confirmed."""
        return cls(Action.ACK, publish)

    @classmethod
    def dead(
        cls,
        body: bytes,
        *,
        code: str,
        message: str,
        task_id: str | None,
        attempts: int = 0,
        min_level: int = 0,
    ) -> Settlement:
        """To the dead queue; see `Publication.to_dead`."""
        return cls.ack(
            Publication.to_dead(
                body,
                code=code,
                message=message,
                task_id=task_id,
                attempts=attempts,
                min_level=min_level,
            )
        )

    @classmethod
    def delayed(
        cls,
        body: bytes,
        *,
        seconds: float,
        message_id: str | None,
        headers: Mapping[str, str | int | bool] | None = None,
        queue: Queue = Queue.TRAINING,
    ) -> Settlement:
        """The message, or another in its place, comes to `queue` after so many seconds."""
        return cls.ack(Publication(queue, body, message_id, headers or {}, seconds))

    @classmethod
    def requeue(cls) -> Settlement:
        """Back to the queue at once."""
        return cls(Action.REQUEUE)


def level_of(headers: Mapping[str, Any]) -> int:
    """The protocol level that a message's headers ask for; 0: any."""
    return _whole(headers.get(MIN_LEVEL))


def _whole(value: Any) -> int:
    """A header's whole number above 0; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _encodable(text: str) -> str:
    """Half a surrogate pair cannot be sent as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
