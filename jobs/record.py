"""The record of a job: its facts and their transitions.

The record is the source of truth, and a queue message only a hint to look at it (docs/protocol.md,
section 4). A record has these states; each arrow is one conditional write:

    new ──▶ held ──▶ checkpoint … ──▶ ended, delivery pending ──▶ delivered or set aside
             │ ▲                              │ ▲
             ▼ │ claim                        ▼ │ claim (the ending stays as it is)
           released, paused                 released

An operator may send a job back. A job whose failure the backend knows is released again without its
ending. An ending that was set aside becomes pending again.

If a copy of the message belongs in the dead queue, the record owes it (`owed`) from the write that
decides on it until the broker has confirmed it. A record that owes a copy is not settled, so
another worker sends the copy if this one dies.

A paused job is live and released, with a silence that does not end (`PAUSED_SECONDS`): no message
points to it, and the sweep leaves it alone. Its message is published again when it is resumed.

**How attempts are counted.** `attempts` is the number of attempts in a row that are over and made
no new checkpoint. An attempt is judged when it is over, not when it begins:

- a release after an error counts it, a release for a shutdown or a pause does not: being preempted
  is not a failure;
- if a holder stopped writing (it was killed, or its machine failed), the worker that takes the
  record over counts it, unless that is the same worker: then S3 did not answer;
- a checkpoint beyond the furthest step of all attempts sets the count to 0, and its attempt is not
  counted, however it ends. A repeated checkpoint (the last one was damaged, so training went back
  to the one before) is no progress.
"""

from __future__ import annotations

import dataclasses
import enum
import uuid
from typing import Any

from jobs.hold import HeldRecord, Hold, beside, later, unknown_fields, utc_now
from jobs.layout import INVALID_PREFIX, STYLE

CHECKPOINTS_KEPT = 3
SEQUENCES_PER_CLAIM = 1_000_000
PROTOCOL_LEVEL = 1
"""The level of the newest features of messages and records that this worker understands. A message
that needs a higher level has it in the header `x-min-level`, and its record in `min_level`."""
PAUSED_SECONDS = 10 * 365 * 86_400.0
"""The silence of a paused job. Releases that know no pause leave such a record as it is, too."""
_RUNS = uuid.UUID("6f1d3a52-3a0e-5a6c-9d27-5b0f6b6f3f4e")
_SWEEP_GROWTH = 8
_LONGEST_SILENCE_SECONDS = 86_400.0


class State(enum.StrEnum):
    """Whether the job still has work to do."""

    LIVE = "live"
    ENDED = "ended"


class DeliveryState(enum.StrEnum):
    """Whether the backend has accepted the ending."""

    NONE = "none"
    PENDING = "pending"
    DELIVERED = "delivered"
    SET_ASIDE = "set_aside"


_FINAL = (DeliveryState.DELIVERED, DeliveryState.SET_ASIDE)


class EndingKind(enum.StrEnum):
    """The kind of a job's ending; also the last part of its webhook's address."""

    COMPLETE = "complete"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint that is complete on S3.

    Attributes:
        name: `epoch-0010`, `epoch-0012-step-0123` inside an epoch, with
            `-retake-1` after training had to start over.
        epoch: Completed epochs.
        step: Completed optimizer steps of the job.
        prefix: Key prefix of its files in the state bucket.
        claim: The claim that wrote it.
    """

    name: str
    epoch: int
    step: int
    prefix: str
    claim: int
    unknown: dict[str, Any] = unknown_fields()


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """The job's ending, exactly as it is sent to the backend.

    Attributes:
        webhook_id: The webhook's id, the same for every attempt to deliver it, on any worker.
        body: The webhook's body (JSON values only).
        code: The error code of a `failed` ending.
        at: The time of the decision by the worker's clock, for people.
    """

    kind: EndingKind
    body: dict[str, Any]
    code: str | None = None
    webhook_id: str = dataclasses.field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    at: str = dataclasses.field(default_factory=utc_now)
    unknown: dict[str, Any] = unknown_fields()


@dataclasses.dataclass(frozen=True, slots=True)
class LastError:
    """The error of the last attempt, which did not end the job."""

    code: str
    message: str
    claim: int
    at: str = dataclasses.field(default_factory=utc_now)
    unknown: dict[str, Any] = unknown_fields()


@dataclasses.dataclass(frozen=True, slots=True)
class OwedCopy:
    """A copy of the message for the dead queue that the broker has not confirmed yet.

    Attributes:
        code: One of `utils.errors.ErrorCode`.
        message: The reason, for operators.
        attempts: Attempts made.
    """

    code: str
    message: str
    attempts: int
    unknown: dict[str, Any] = unknown_fields()


@dataclasses.dataclass(frozen=True, slots=True)
class JobRequest:
    """The order of one message.

    Attributes:
        task_id: The job's id, and its record's name.
        kind: The kind of the job.
        subject: The thing that the job makes, such as a style's id.
        identity: Hash of the understood message. The same id with another identity is another
            order.
        message: The understood message itself (JSON values only), enough to publish it again.
        webhook_url: The message's webhook address, not checked.
        id_is_derived: The id was derived from the body, so the same body later may be a new job.
        ending: The ending of a message that can never become a job.
        min_level: The lowest protocol level of a worker that understands the message.
    """

    task_id: str
    kind: str
    subject: str
    identity: str
    message: dict[str, Any]
    webhook_url: str | None = None
    id_is_derived: bool = False
    ending: Ending | None = None
    min_level: int = 0

    def run(self, count: int) -> JobRequest:
        """The same request as the `count`-th repetition of its body; 0 is the first."""
        return dataclasses.replace(self, task_id=derived_task_id(self.task_id, count))


def derived_task_id(first_id: str, count: int) -> str:
    """The id of the `count`-th further job of one body whose id was derived from it.

    Args:
        first_id: The first job's id: the UUIDv5 of the body, or an invalid message's
            `invalid/{sha256}`.
        count: 0 for the first job itself.
    """
    if count == 0:
        return first_id
    if first_id.startswith(INVALID_PREFIX):
        return f"{first_id}-{count}"
    return str(uuid.uuid5(_RUNS, f"{first_id} {count}"))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord(HeldRecord):
    """Everything that a worker needs to take a job over.

    Attributes:
        kind: The kind of the job.
        subject: The thing that the job makes, such as a style's id.
        message: The understood order (see `jobs.message.Job.understood`).
        attempts: Attempts in a row that are over and made no new checkpoint; the present one is not
            counted.
        fruitful: The present attempt made a new checkpoint.
        furthest_step: The furthest step of any registered checkpoint.
        checkpoints: The last few to resume from, newest last.
        sweeps: How often the record was found abandoned since its last claim.
        ended_at: The time of the ending, for people. Decisions use S3's dates.
        owed: The copy that the dead queue has not got yet.
        min_level: The lowest protocol level of a worker that may claim the job.
        seconds_run: Seconds that workers have held the live job in all, up to the last write.
        rejections: How often in a row a machine could not do the job and left it to another.
        rejected_by: The workers that rejected it, separated by commas, each once.
        epoch_seen, loss_seen, seconds_left: Progress of the live job at the last write, for people:
            completed epochs, the loss, and the remaining time. 0 if unknown.
    """

    task_id: str
    kind: str = STYLE
    subject: str
    identity: str
    message: dict[str, Any]
    webhook_url: str | None = None
    id_is_derived: bool = False
    state: State = State.LIVE
    attempts: int = 0
    fruitful: bool = False
    furthest_step: int = 0
    checkpoints: tuple[StoredCheckpoint, ...] = ()
    ending: Ending | None = None
    delivery: DeliveryState = DeliveryState.NONE
    delivery_detail: str | None = None
    last_error: LastError | None = None
    sweeps: int = 0
    created_at: str = ""
    ended_at: str | None = None
    owed: OwedCopy | None = later(None)
    min_level: int = later(0)
    seconds_run: float = beside(0.0)
    rejections: int = beside(0)
    rejected_by: str = beside("")
    epoch_seen: int = beside(0)
    loss_seen: float = beside(0.0)
    seconds_left: float = beside(0.0)

    @classmethod
    def new(cls, request: JobRequest, owner: str, lease_seconds: float) -> JobRecord:
        """The record of a new job, held under claim 1."""
        record = cls(
            hold=Hold(owner=owner, claim=1, lease_seconds=lease_seconds),
            task_id=request.task_id,
            kind=request.kind,
            subject=request.subject,
            identity=request.identity,
            message=request.message,
            webhook_url=request.webhook_url,
            id_is_derived=request.id_is_derived,
            min_level=request.min_level,
            created_at=utc_now(),
        )
        return record.ended(request.ending) if request.ending else record

    @classmethod
    def to_stored(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The first release has only styles: its records have `style_id` and no kind."""
        if values["kind"] != STYLE:
            return values
        names = {"subject": "style_id"}
        return {
            names.get(name, name): int(value) if name == "subject" else value
            for name, value in values.items()
            if name != "kind"
        }

    @classmethod
    def from_stored(cls, values: dict[str, Any]) -> dict[str, Any]:
        """See `to_stored`."""
        if values.get("kind", STYLE) != STYLE or "style_id" not in values:
            return values
        style_id = values["style_id"]
        if not isinstance(style_id, int) or isinstance(style_id, bool):
            raise ValueError(f"style_id is {style_id!r}, not a whole number")
        rest = {name: value for name, value in values.items() if name != "style_id"}
        return rest | {"kind": STYLE, "subject": str(style_id)}

    @property
    def style_id(self) -> int | None:
        """The style of a style's job; None for any other kind."""
        return int(self.subject) if self.kind == STYLE else None

    @property
    def claim(self) -> int:
        """Number of the present or last claim."""
        return self.hold.claim

    @property
    def checkpoint(self) -> StoredCheckpoint | None:
        """The newest checkpoint."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def attempts_with_this(self) -> int:
        """The value of `attempts` if the present attempt fails now."""
        return self.attempts + (0 if self.fruitful else 1)

    @property
    def ordered_at(self) -> str:
        """The time of the order: from the message, or else that of the first claim."""
        said = self.message.get("created_at")
        return said if isinstance(said, str) and said else self.created_at

    @property
    def is_settled(self) -> bool:
        """Whether the record is final: it changes only if an operator sends the job back."""
        return self.delivery in _FINAL and self.owed is None

    @property
    def is_paused(self) -> bool:
        """No worker holds the job, and it waits for `resume`."""
        hold = self.hold
        return self.state is State.LIVE and hold.released and hold.quiet_seconds >= PAUSED_SECONDS

    @property
    def rejecters_with_this(self) -> tuple[str, ...]:
        """The workers that have rejected the job, including its present holder, each once."""
        before = tuple(filter(None, self.rejected_by.split(",")))
        return tuple(dict.fromkeys((*before, self.hold.owner)))

    def claimed(self, owner: str, lease_seconds: float) -> JobRecord:
        """The record claimed by `owner`, after a release or after its lease expired.

        If the same holder claims it again, the holder was not dead but could not reach S3, and the
        attempt is not counted.
        """
        free = self
        if not self.hold.released:
            free = self.released(count_attempt=self.hold.owner != owner)
        hold = free.hold.taken(owner, lease_seconds)
        return dataclasses.replace(
            free,
            hold=hold,
            fruitful=False,
            sweeps=0,
            epoch_seen=0,
            loss_seen=0.0,
            seconds_left=0.0,
        )

    def with_checkpoint(self, checkpoint: StoredCheckpoint) -> JobRecord:
        """The record with a further checkpoint, which is complete on S3.

        Checkpoints at or beyond its step are removed: training went back before them because the
        newest was damaged.
        """
        older = tuple(known for known in self.checkpoints if known.step < checkpoint.step)
        further = checkpoint.step > self.furthest_step
        return dataclasses.replace(
            self,
            checkpoints=(*older, checkpoint)[-CHECKPOINTS_KEPT:],
            furthest_step=max(self.furthest_step, checkpoint.step),
            fruitful=self.fruitful or further,
            attempts=0 if further else self.attempts,
            rejections=0,
            rejected_by="",
        )

    def ended(self, ending: Ending, owed: OwedCopy | None = None) -> JobRecord:
        """The record with an ending. A job has one ending, so that of an ended job stays.

        Args:
            ending: The ending.
            owed: The copy of the message that the dead queue will get.
        """
        if self.state is State.ENDED:
            return self
        return dataclasses.replace(
            self,
            state=State.ENDED,
            ending=ending,
            delivery=DeliveryState.PENDING,
            ended_at=ending.at,
            owed=owed,
        )

    def settled(
        self, delivery: DeliveryState, detail: str | None = None, owed: OwedCopy | None = None
    ) -> JobRecord:
        """The record after its ending was delivered, or set aside because the backend refuses it.

        The record is final and released, unless it owes the dead queue a copy.

        Args:
            delivery: The result.
            detail: The backend's answer.
            owed: The copy that the dead queue will get of an ending that is set aside.

        Raises:
            ValueError: The job has not ended, or `delivery` settles nothing.
        """
        if self.state is not State.ENDED or delivery not in _FINAL:
            raise ValueError(f"a job that is {self.state} cannot be settled as {delivery}")
        if self.delivery in _FINAL:
            return self
        return _free_if_settled(
            dataclasses.replace(
                self, delivery=delivery, delivery_detail=detail, owed=owed or self.owed
            )
        )

    def paid(self) -> JobRecord:
        """The record after the broker confirmed the copy for the dead queue."""
        if self.owed is None:
            return self
        return _free_if_settled(dataclasses.replace(self, owed=None))

    def reopened(self) -> JobRecord:
        """The record of a failed job that is sent back: it resumes from its newest checkpoint.

        The new attempt has a separate ending with a separate id, and the number of the next claim
        makes its `sequence` a later one.

        A copy that the record still owed is no longer owed.

        Raises:
            ValueError: The job has not failed, or the backend does not know yet that it did.
        """
        ending = self.ending
        told = self.delivery in _FINAL
        if ending is None or ending.kind is not EndingKind.FAILED or not told:
            raise ValueError(f"a job that is {self.state} ({self.delivery}) cannot be reopened")
        reason = str(ending.body.get("error_message", ""))
        return dataclasses.replace(
            self,
            hold=self.hold.dropped(),
            state=State.LIVE,
            attempts=0,
            fruitful=False,
            ending=None,
            delivery=DeliveryState.NONE,
            delivery_detail=None,
            last_error=LastError(ending.code or "", reason, claim=self.claim, at=ending.at),
            sweeps=0,
            ended_at=None,
            owed=None,
            seconds_run=0.0,
            rejections=0,
            rejected_by="",
            epoch_seen=0,
            loss_seen=0.0,
            seconds_left=0.0,
        )

    def to_be_told_again(self) -> JobRecord:
        """The record with the delivery of its refused ending pending again.

        Raises:
            ValueError: It was not set aside.
        """
        if self.delivery is not DeliveryState.SET_ASIDE:
            raise ValueError(f"an ending that is {self.delivery} cannot be sent again")
        return dataclasses.replace(
            self,
            hold=self.hold.dropped(),
            delivery=DeliveryState.PENDING,
            delivery_detail=None,
            owed=None,
            sweeps=0,
        )

    def released(
        self,
        *,
        count_attempt: bool,
        error: LastError | None = None,
        quiet_seconds: float = 0.0,
        rejected: bool = False,
    ) -> JobRecord:
        """The record released by its holder; the module's docstring defines how attempts count.

        Args:
            count_attempt: The attempt failed.
            error: The reason, as (code, message).
            quiet_seconds: The expected time until a worker claims the record.
            rejected: The machine could not do the job and leaves it to another.
        """
        if self.hold.released:
            return self
        counts = count_attempt and self.state is State.LIVE
        return dataclasses.replace(
            self,
            hold=self.hold.dropped(quiet_seconds),
            attempts=self.attempts_with_this if counts else self.attempts,
            last_error=error or self.last_error,
            rejections=self.rejections + 1 if rejected else self.rejections,
            rejected_by=",".join(self.rejecters_with_this) if rejected else self.rejected_by,
        )

    def swept(self) -> JobRecord:
        """The record after a sweep found it abandoned; its message is published again next.

        The expected silence afterwards grows eightfold each time, up to a day: the message may wait
        behind hours of other jobs, and each copy of it may start a worker.
        """
        free = self.released(count_attempt=True)
        quiet = free.hold.lease_seconds * _SWEEP_GROWTH ** min(free.sweeps, 10)
        hold = free.hold.dropped(min(quiet, _LONGEST_SILENCE_SECONDS))
        return dataclasses.replace(free, hold=hold, sweeps=free.sweeps + 1)


def _free_if_settled(record: JobRecord) -> JobRecord:
    if not record.is_settled:
        return record
    return dataclasses.replace(record, hold=record.hold.dropped())
