"""The reference model: the places of a job's data when nothing is left to do.

It is pure: it uses no broker, no storage and no product code. The verdict compares the world with
it, job by job. docs/protocol.md is its source; docs/chaos.md has it as a table.

A job's standing changes only by these events. All other events (a claim, a retry, a put-off, a lost
lease, a killed worker, a duplicate delivery) do not change it: that is the promise.

    ORDERED ──▶ live ──TRAINED──────▶ ended: complete, pending ──ACCEPTED────────▶ delivered
                 │  ──FAILED────────▶ ended: failed,   pending ──ENDING_REFUSED──▶ set aside
                 │  ──GAVE_UP───────▶ ended: failed,   pending                      and dead letter
                 │                     and dead letter
                 │  ──CANCELLED─────▶ ended: failed (CANCELLED), pending
                 ▲
                 └── REDRIVEN: a failed job with a dead letter is live again; an ending that was set
                     aside is pending again; the dead letter is gone

    ORDERED ──MESSAGE_REFUSED──▶ ended: failed (INVALID_MESSAGE), pending, and dead letter
            ──RECORD_DAMAGED───▶ damaged, and dead letter (STORAGE_FAILED): needs an operator
"""

from __future__ import annotations

import dataclasses
import enum

MAX_ATTEMPTS = 3
"""As shipped (docs/protocol.md, section 5)."""
GIVE_UP_CODES = ("WORKER_CRASHED", "STORAGE_FAILED", "BASE_MODEL_UNAVAILABLE")
"""The codes of errors that another attempt can help: a job that is given up has one of them."""


class Destiny(enum.StrEnum):
    """The outcome that a job is ordered for."""

    PLAIN = "completes"
    NO_ID = "has no id"
    ORDERED_TWICE = "has no id and is ordered again after the window"
    INVALID = "message refused"
    LOW_QUALITY = "fails before its first epoch"
    DIVERGES = "fails midway"
    GIVEN_UP = "given up"
    GIVEN_UP_REDRIVEN = "given up and redriven"
    CANCEL_FILE = "cancelled by file"
    CANCEL_ANSWER = "cancelled by an answer"
    CANCEL_GONE = "cancelled by 410"
    CANCEL_PUBLISHING = "cancelled while it publishes"
    REFUSED = "ending answered 400"
    REFUSED_REDRIVEN = "ending answered 400 and redriven"
    NOT_FOUND = "ending answered 404"
    TOO_LARGE = "exceeds the disk"
    RECORD_DAMAGED = "record damaged while it trains"
    API_CANCELLED = "cancelled over the API"
    API_PAUSED = "paused and resumed over the API"
    API_PAUSED_CANCELLED = "cancelled over the API while it is paused"


OVER_API = (Destiny.API_CANCELLED, Destiny.API_PAUSED, Destiny.API_PAUSED_CANCELLED)
"""Destinies that need an API."""


class Event(enum.StrEnum):
    """An event that changes a job's standing."""

    ORDERED = "ordered"
    TRAINED = "trained"
    FAILED = "failed"
    GAVE_UP = "gave up"
    CANCELLED = "cancelled"
    MESSAGE_REFUSED = "message refused"
    ACCEPTED = "accepted"
    ENDING_REFUSED = "ending refused"
    REDRIVEN = "redriven"
    RECORD_DAMAGED = "record damaged"


class Kept(enum.StrEnum):
    """The objects under a job's checkpoint prefix."""

    NOTHING = "nothing"
    WEIGHTS = "the LoRA weights of each checkpoint"
    NEWEST = "the newest checkpoint in full"
    OTHER = "something else"


Step = tuple[Event, str]
"""An event, and the error code where it has one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """The places of a job's data.

    Attributes:
        record: `none`, `live` or `ended`, the state in `jobs/{task_id}.json`; `damaged` for an
            object that is no record.
        delivery: `none`, `pending`, `delivered` or `set_aside`.
        ending: `complete`, or `failed` and its code; empty without one.
        endings: Endings that the backend has got, by `webhook-id`.
        taken: Endings that it has accepted (2xx or 410).
        dead_letters: Codes of the job's messages in the dead queue. A code counts once: copies are
            published at least once.
        model: Its files are in the style's folder, or in the archive if a later run replaced
            it.
        checkpoints: The objects that may be under its prefix.
        staged: Files under `staging/` are left.
    """

    record: str = "none"
    delivery: str = "none"
    ending: str = ""
    endings: int = 0
    taken: int = 0
    dead_letters: frozenset[str] = frozenset()
    model: bool = False
    checkpoints: frozenset[Kept] = frozenset({Kept.NOTHING})
    staged: bool = False

    def differences(self, found: Places) -> list[str]:
        """One sentence for each place in which `found` differs from this."""
        told = []
        for field in dataclasses.fields(self):
            wanted, there = getattr(self, field.name), getattr(found, field.name)
            fits = there <= wanted if field.name == "checkpoints" else there == wanted
            if not fits:
                told.append(f"{field.name}: expected {_shown(wanted)}, found {_shown(there)}")
        return told


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """The known events of a job, for the reference model.

    Attributes:
        lost_attempts: The most attempts in a row that ended without a new checkpoint.
        no_room: Workers that rejected the job for lack of disk space.
        last_release: A worker of the last release has claimed it, which has no largest size.
        message_deleted: The job's message may have been in a queue that the suite deleted.
    """

    lost_attempts: int = 0
    no_room: int = 0
    last_release: bool = False
    message_deleted: bool = False


# One row per event.
# pylint: disable-next=too-many-return-statements
def after(before: Places, event: Event, code: str = "") -> Places:
    """The standing after an event.

    Raises:
        ValueError: The event is impossible there.
    """
    live, ended = before.record == "live", before.record == "ended"
    change = dataclasses.replace
    match event:
        case Event.ORDERED if before.record == "none":
            return change(before, record="live")
        case Event.TRAINED if live:
            ending = _ended(before, "complete")
            return change(ending, model=True, checkpoints=frozenset({Kept.WEIGHTS}))
        case Event.FAILED if live:
            return _failed(before, code)
        case Event.GAVE_UP if live:
            return _dead(_failed(before, code), code)
        case Event.CANCELLED if live:
            return _ended(before, "failed CANCELLED")
        case Event.MESSAGE_REFUSED if live:
            return _dead(_ended(before, f"failed {code}"), code)
        case Event.RECORD_DAMAGED if live:
            # The record is unreadable, so the message and all data of the job are kept.
            damaged = change(before, record="damaged", checkpoints=frozenset(Kept))
            return _dead(damaged, code)
        case Event.ACCEPTED if ended and before.delivery == "pending":
            return change(before, delivery="delivered", taken=before.taken + 1)
        case Event.ENDING_REFUSED if ended and before.delivery == "pending":
            return _dead(change(before, delivery="set_aside"), "WEBHOOK_REJECTED")
        case Event.REDRIVEN if before.delivery == "set_aside":
            return change(before, delivery="pending", dead_letters=frozenset())
        case Event.REDRIVEN if before.delivery == "delivered" and before.dead_letters:
            return change(
                before, record="live", delivery="none", ending="", dead_letters=frozenset()
            )
    raise ValueError(f"{event} is impossible for a job that is {before.record}, {before.delivery}")


def places(path: tuple[Step, ...]) -> Places:
    """The places of a job's data after these events."""
    standing = Places()
    for event, code in path:
        standing = after(standing, event, code)
    return standing


def _ended(before: Places, ending: str) -> Places:
    return dataclasses.replace(
        before, record="ended", delivery="pending", ending=ending, endings=before.endings + 1
    )


def _failed(before: Places, code: str) -> Places:
    kept = frozenset({Kept.NOTHING, Kept.NEWEST})  # nothing if it never made one
    return dataclasses.replace(_ended(before, f"failed {code}"), checkpoints=kept)


def _dead(before: Places, code: str) -> Places:
    return dataclasses.replace(before, dead_letters=before.dead_letters | {code})


def _shown(value: object) -> str:
    if isinstance(value, frozenset):
        return " or ".join(sorted(map(str, value))) or "none"
    return str(value) or "none"


_ORDERED: Step = (Event.ORDERED, "")
_ACCEPTED: Step = (Event.ACCEPTED, "")
_TRAINED: Step = (Event.TRAINED, "")
_CANCELLED: Step = (Event.CANCELLED, "")
_NOT_TAKEN: Step = (Event.ENDING_REFUSED, "")
_AGAIN: Step = (Event.REDRIVEN, "")
_GIVEN_UP: Step = (Event.GAVE_UP, "BASE_MODEL_UNAVAILABLE")
_COMPLETES = (_ORDERED, _TRAINED, _ACCEPTED)
_IS_CANCELLED = (_ORDERED, _CANCELLED, _ACCEPTED)

PATHS: dict[Destiny, tuple[tuple[Step, ...], ...]] = {
    Destiny.PLAIN: (_COMPLETES,),
    Destiny.NO_ID: (_COMPLETES,),
    Destiny.ORDERED_TWICE: (_COMPLETES,),
    Destiny.INVALID: ((_ORDERED, (Event.MESSAGE_REFUSED, "INVALID_MESSAGE"), _ACCEPTED),),
    Destiny.LOW_QUALITY: ((_ORDERED, (Event.FAILED, "LOW_QUALITY_DATA"), _ACCEPTED),),
    Destiny.DIVERGES: ((_ORDERED, (Event.FAILED, "TRAINING_DIVERGED"), _ACCEPTED),),
    Destiny.GIVEN_UP: ((_ORDERED, _GIVEN_UP, _ACCEPTED),),
    Destiny.GIVEN_UP_REDRIVEN: ((_ORDERED, _GIVEN_UP, _ACCEPTED, _AGAIN, _TRAINED, _ACCEPTED),),
    Destiny.CANCEL_FILE: (_IS_CANCELLED,),
    Destiny.CANCEL_ANSWER: (_IS_CANCELLED,),
    Destiny.CANCEL_GONE: (_IS_CANCELLED,),
    # The cancel comes between two files: either ending is right if the folder agrees with it.
    Destiny.CANCEL_PUBLISHING: (_IS_CANCELLED, _COMPLETES),
    Destiny.REFUSED: ((_ORDERED, _TRAINED, _NOT_TAKEN),),
    Destiny.REFUSED_REDRIVEN: ((_ORDERED, _TRAINED, _NOT_TAKEN, _AGAIN, _ACCEPTED),),
    Destiny.NOT_FOUND: ((_ORDERED, _TRAINED, _NOT_TAKEN),),
    Destiny.RECORD_DAMAGED: ((_ORDERED, (Event.RECORD_DAMAGED, "STORAGE_FAILED")),),
    # A job that is cancelled before a worker has claimed it has no record. One that completes first
    # keeps its model.
    Destiny.API_CANCELLED: (_IS_CANCELLED, _COMPLETES, ()),
    Destiny.API_PAUSED: (_COMPLETES,),
    Destiny.API_PAUSED_CANCELLED: (_IS_CANCELLED, _COMPLETES, ()),
    Destiny.TOO_LARGE: ((_ORDERED, (Event.FAILED, "JOB_TOO_LARGE"), _ACCEPTED),),
}
"""What happens to a job of each destiny. More than one path: either is right."""


def expected(destiny: Destiny, facts: Facts = Facts()) -> tuple[Places, ...]:
    """The possible places of a job's data in the end, the intended one first.

    A valid job that lost `MAX_ATTEMPTS` attempts in a row may have been given up instead.
    """
    paths = list(PATHS[destiny])
    never = (Destiny.INVALID, Destiny.RECORD_DAMAGED)
    if facts.lost_attempts >= MAX_ATTEMPTS and destiny not in never:
        last = _NOT_TAKEN if destiny in (Destiny.REFUSED, Destiny.NOT_FOUND) else _ACCEPTED
        paths += [(_ORDERED, (Event.GAVE_UP, code), last) for code in GIVE_UP_CODES]
    if facts.last_release and destiny is Destiny.TOO_LARGE:
        paths.append(_COMPLETES)
    if facts.no_room >= MAX_ATTEMPTS:
        paths.append((_ORDERED, (Event.FAILED, "JOB_TOO_LARGE"), _ACCEPTED))
    allowed = tuple(places(path) for path in paths)
    if facts.message_deleted and destiny is Destiny.RECORD_DAMAGED:
        # The sweep publishes a lost message from its record, and this record cannot be read.
        allowed += (dataclasses.replace(allowed[0], dead_letters=frozenset()),)
    return allowed
