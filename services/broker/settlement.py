"""Queues, deliveries, publications, and the settlement of a delivery. Plain facts, no connection.

A handler gets a `Delivery` and returns a `Settlement`. The connection's owner first makes the
settlement's publications (persistent, mandatory, confirmed), then acknowledges the delivery.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from jobs.layout import queue_suffix_of
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
"""The headers that a copy keeps. No others: a publisher's headers may fill a frame, and with the
broker's own history the broker would drop the copy as one that goes in circles."""
MAX_HEADER = 1024  # characters of a header's text; copies do not keep a longer one

BODY_BYTES = "x-body-bytes"
"""Header of a dead letter whose body was cut: the size of the whole body."""
BODY_SHA256 = "x-body-sha256"
"""Header of a dead letter whose body was cut: the SHA-256 of the whole body."""
CUT_BODY_BYTES = 4096
"""Bytes of the body that a shortened dead letter keeps, for a person to recognise it."""
_REASONS = frozenset({"x-error-code", "x-error-message", "x-task-id", "x-attempts"})


_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_RESERVED = frozenset({"training", "endings", "dead", "delay", "base", "nowhere"})


@dataclasses.dataclass(frozen=True, slots=True)
class Queue:
    """One queue. Its name on the broker is the setting `TRAINING_QUEUE` followed by the suffix.

    `str` gives the name for logs and metrics: `training`, `endings`, `dead`, or a kind of job.
    """

    suffix: str

    TRAINING: ClassVar[Queue]
    ENDINGS: ClassVar[Queue]
    DEAD: ClassVar[Queue]

    def __str__(self) -> str:
        return self.suffix[1:] or "training"

    @classmethod
    def of_kind(cls, kind: str) -> Queue:
        """The training queue of a kind of job.

        Raises:
            ValueError: The kind cannot name a queue, or another queue has this name.
        """
        if kind in _RESERVED or not _NAME.fullmatch(kind):
            raise ValueError(
                f"a kind named {kind!r} cannot have a queue: use another name of a-z, 0-9, _ and -"
            )
        suffix = queue_suffix_of(kind)
        return cls(suffix) if suffix else cls.TRAINING

    @property
    def is_training(self) -> bool:
        """Whether its messages are jobs to be trained."""
        return self not in (Queue.ENDINGS, Queue.DEAD)


Queue.TRAINING, Queue.ENDINGS, Queue.DEAD = Queue(""), Queue(".endings"), Queue(".dead")


class Action(enum.StrEnum):
    """The answer to the broker about the delivery itself."""

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
        queue: The queue that it came from.
    """

    body: bytes
    message_id: str | None = None
    redelivered: bool = False
    headers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    queue: Queue = Queue.TRAINING

    @property
    def carried_headers(self) -> dict[str, str | int | bool]:
        """The headers of `CARRIED_HEADERS` that the message has. A copy keeps them."""
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
        queue: The queue to publish to.
        body: The message.
        message_id: The task's id; None if it is not known.
        headers: Texts, whole numbers and booleans.
        delay_seconds: The message reaches `queue` after this time, through a delay queue. Each
            distinct delay makes a queue that stays, so only the delays of the settings are used.

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
                raise ValueError(f"header {name} is a {type(value).__name__}; use str, int or bool")

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
        """A dead letter: the message and the reason (docs/protocol.md, section 1).

        Args:
            body: The original body.
            code: A code of `utils.errors.ErrorCode`.
            message: A sentence for a person; cut to `MAX_ERROR_MESSAGE`.
            task_id: The task's id, if one could be read.
            attempts: Attempts made.
            min_level: The protocol level that the message needs; kept for `redrive`.
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
        """The same body as a dead letter, with no headers but the reasons.

        A publication that is a dead letter already keeps its own reasons.

        Args:
            why: Why it could not be published as it is; a sentence for a person.
        """
        if self.queue != Queue.DEAD:
            return Publication.to_dead(
                self.body,
                code=ErrorCode.PUBLICATION_REFUSED,
                message=f"a message for the queue {self.queue} was refused: {why}",
                task_id=self.message_id,
                min_level=level_of(self.headers),
            )
        kept = _REASONS | {MIN_LEVEL}
        headers = {name: value for name, value in self.headers.items() if name in kept}
        return dataclasses.replace(self, headers=headers, delay_seconds=None)

    def cut(self) -> Publication:
        """The same message with only the first bytes of its body.

        Headers hold the whole body's size and SHA-256.
        """
        headers: dict[str, str | int | bool] = {
            **self.headers,
            BODY_BYTES: len(self.body),
            BODY_SHA256: hashlib.sha256(self.body).hexdigest(),
        }
        return dataclasses.replace(self, body=self.body[:CUT_BODY_BYTES], headers=headers)


@dataclasses.dataclass(frozen=True, slots=True)
class Settlement:
    """The decision about a delivery.

    First each publication is made, in order and confirmed, then the action.

    If the delivery's channel has closed by then, the publications are still made and the action is
    dropped: the broker delivers the message again, and the job record makes that harmless.

    Attributes:
        action: `ACK`: the message is done with. `REQUEUE`: back to its queue, for any worker.
        publish: The publications that come first.
    """

    action: Action
    publish: tuple[Publication, ...] = ()

    @classmethod
    def ack(cls, *publish: Publication) -> Settlement:
        """The message is done with as soon as these publications are confirmed."""
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
        """The message, or another in its place, reaches `queue` after this many seconds."""
        return cls.ack(Publication(queue, body, message_id, headers or {}, seconds))

    @classmethod
    def moved(cls, delivery: Delivery, queue: Queue) -> Settlement:
        """The same message goes to another queue at once. This does not count as putting it off."""
        own = {OWN_COPY: True} if delivery.redelivered else {}
        headers = delivery.carried_headers | own
        return cls.ack(Publication(queue, delivery.body, delivery.message_id, headers))

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
    """The text without half surrogate pairs, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
