"""A job record as operators see it: flat, and with its state in one word."""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.kinds import Kinds, Standing
from jobs.layout import INVALID_PREFIX
from jobs.record import DeliveryState, JobRecord, State
from services.records.listing import Found
from services.records.record_object import Version
from utils.errors import NewerRecord

_HELD = ("held", "pausing")


@dataclasses.dataclass(frozen=True, slots=True)
class JobView:
    """One job.

    Attributes:
        task_id: Its id.
        style_id: Its style; None for another kind of job, and if the record cannot be read.
        kind, subject: The kind of the job, and the thing that it makes.
        state: `waiting` (for its message to be taken again), `paused`, `held`, `pausing` (held, and
            about to be paused), `silent` (its holder's lease has run out), `ended`, `dead` (a
            message in the dead queue, without a record), or `unknown`.
        owner: The worker that holds it, or held it last.
        claim: The number of that hold.
        attempts: Attempts in a row without a new checkpoint.
        standing: How far it is, as its kind measures it.
        seconds_left: By the worker's last sign of life; None where it is not known, and once no
            worker holds the job.
        ending: `complete`, `failed` with its code, or empty.
        delivery: Whether the backend has heard: `none`, `pending`, `delivered` or `set_aside`.
        model_url: The address of the model, if the job has completed.
        message_task_id: The id that a refused message gave: its record has another name.
        detail: The error, or what the backend answered, or why the record cannot be read.
        seconds_since_written: By the store's own clock.
        created_at, ended_at: By the workers' clocks.
        ordered_at: When the job was ordered, according to its message; else as `created_at`.
    """

    task_id: str
    standing: Standing
    style_id: int | None = None
    kind: str = ""
    subject: str = ""
    state: str = "unknown"
    owner: str = ""
    claim: int = 0
    attempts: int = 0
    seconds_left: float | None = None
    ending: str = ""
    delivery: str = ""
    model_url: str = ""
    detail: str = ""
    seconds_since_written: float | None = None
    created_at: str = ""
    ended_at: str | None = None
    message_task_id: str = ""
    ordered_at: str = ""

    def values(self) -> dict[str, Any]:
        """The job as JSON values. The standing has the names that its kind gives."""
        own = dataclasses.asdict(self)
        del own["standing"]
        counted = {
            self.standing.unit: self.standing.done,
            f"{self.standing.unit}s": self.standing.total,
        }
        return own | counted | dict(self.standing.measured)


def view(found: Found, kinds: Kinds) -> JobView:
    """The view of the record under a job's id."""
    if found.version is None:
        return JobView(found.task_id, kinds.standing(None), detail=found.problem)
    record = found.version.record
    ending = record.ending
    state = _state(found.version, pause_requested=found.pause_requested)
    return JobView(
        task_id=record.task_id,
        standing=_standing(record, kinds, state),
        style_id=record.style_id,
        kind=record.kind,
        subject=record.subject,
        state=state,
        owner=record.hold.owner,
        claim=record.claim,
        attempts=record.attempts,
        seconds_left=(record.seconds_left or None) if state in _HELD else None,
        ending=f"{ending.kind} {ending.code or ''}".strip() if ending else "",
        delivery=str(record.delivery),
        model_url=str(ending.body.get("model_url", "")) if ending else "",
        detail=_detail(record),
        seconds_since_written=found.version.age_seconds,
        created_at=record.created_at,
        ended_at=record.ended_at,
        message_task_id=_message_task_id(record),
        ordered_at=record.ordered_at,
    )


def _message_task_id(record: JobRecord) -> str:
    if record.ending is None or not record.task_id.startswith(INVALID_PREFIX):
        return ""
    return str(record.ending.body.get("task_id", ""))


def _state(version: Version[JobRecord], *, pause_requested: bool) -> str:
    record = version.record
    if record.state is State.ENDED:
        return "ended"
    if record.hold.released:
        return "paused" if pause_requested else "waiting"
    if version.age_seconds > record.hold.lease_seconds:
        return "silent"
    return "pausing" if pause_requested else "held"


def _standing(record: JobRecord, kinds: Kinds, state: str) -> Standing:
    try:
        standing = kinds.standing(record)
    except NewerRecord:
        standing = kinds.standing(None)
    if record.ending or state in _HELD:
        return standing
    # The measurements of a worker that does not hold the job any more may be void.
    return dataclasses.replace(standing, measured=dict.fromkeys(standing.measured))


def _detail(record: JobRecord) -> str:
    if record.delivery is DeliveryState.SET_ASIDE:
        return record.delivery_detail or ""
    if record.ending:
        return str(record.ending.body.get("error_message", ""))
    return record.last_error.message if record.last_error else ""
