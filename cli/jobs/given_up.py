"""What can be sent back, and what became of it; and what a dead letter or a record is about."""

from __future__ import annotations

import dataclasses
import json

from cli.jobs.dead_queue import DeadLetter
from jobs.record import Delivery, EndingKind, JobRecord, State
from utils.errors import ErrorCode

JUDGED_AGAIN = ("", ErrorCode.INVALID_MESSAGE, ErrorCode.UNKNOWN_TYPE)
"""Codes of messages that have not become a job."""


@dataclasses.dataclass(frozen=True, slots=True)
class Waiting:
    """A job that can be sent back, or a message of the dead queue.

    Attributes:
        task_id: The task's id; empty where nobody could read one.
        style_id: Its style; None where it is not known.
        code: Why it is there, an `utils.errors.ErrorCode`; empty for a message that the broker
            itself has moved to the dead queue.
        reason: The same, in words.
        attempts: Attempts made, as far as they were counted.
        in_dead_queue: The dead queue has the message; else only the record has it.
        body: The message in the dead queue.
        trains: Sending it back trains the job again; else its ending is sent again.
        superseded: Which later order of the style would win over it; empty where none would.
        at_stake: A warning where the style has a published model.
    """

    task_id: str
    style_id: int | None
    code: str
    reason: str
    attempts: int
    in_dead_queue: bool
    body: str = ""
    trains: bool = True
    superseded: str = ""
    at_stake: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Redriven:
    """What became of one message or job.

    Attributes:
        task_id, code, reason, attempts: As in `Waiting`.
        outcome: What was done, or why it was left where it was.
        sent_back: Whether it was sent back.
        left_out: It was left where it is because a later order of the style wins over it.
    """

    task_id: str
    code: str
    reason: str
    attempts: int
    outcome: str
    sent_back: bool
    left_out: bool = False


def is_of_a_job(letter: DeadLetter) -> bool:
    """The message has become a job, which failed; it is not judged again."""
    return letter.code not in JUDGED_AGAIN and trains_again(letter)


def trains_again(letter: DeadLetter) -> bool:
    """Sending the letter back trains its job; else only its ending is looked at."""
    return letter.code != ErrorCode.WEBHOOK_REJECTED and of_the_endings(letter) is None


def of_the_endings(letter: DeadLetter) -> tuple[str, bytes] | None:
    """Task id and message of a letter that was on its way through the endings' queue."""
    try:
        values = json.loads(letter.body)
        int(values["tries"])
        return str(values["task_id"]), str(values["message"]).encode()
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def why_not(record: JobRecord) -> str:
    """Why a job cannot be sent back by its record; empty where it can."""
    ending = record.ending
    if record.state is State.LIVE or ending is None:
        return "it has not ended: workers go on with it by themselves"
    if record.delivery is Delivery.SET_ASIDE:
        return ""
    if ending.kind is EndingKind.COMPLETE:
        return "it has completed, and its model is in place"
    if not ending.body.get("retryable"):
        return f"another attempt cannot help ({ending.code}); order it again with another task id"
    if record.delivery is not Delivery.DELIVERED:
        return "the backend has not heard yet that it failed; wait until it has"
    return ""


def reason_of(record: JobRecord) -> str:
    """Why a job was given up, in words."""
    if record.delivery is Delivery.SET_ASIDE:
        return record.delivery_detail or ""
    return str(record.ending.body.get("error_message", "")) if record.ending else ""
