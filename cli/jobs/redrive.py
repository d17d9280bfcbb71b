"""`python main.py redrive`: jobs that were given up and endings that were refused, sent back.

They are found in the dead queue, or by their record where the dead queue has no copy of the
message: a person has removed it, or a worker died before the broker had confirmed it. The action
depends on the reason:

- a job that failed though another attempt might have helped gets that attempt: its record is
  reopened, and the message goes to the training queue;
- an ending that the backend refused is sent again, the same under the same id; nothing is trained;
- a message that could not become a job, or that the broker itself has moved, goes to the training
  queue as it was published, and is judged again. It has no record to send it back from.

A job of which the style has a later order is superseded: its model would go into the archive only.
`--all` leaves such jobs where they are.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable

from cli import broker
from cli.jobs.dead_queue import DeadLetter, go_through
from cli.jobs.styles import Later, LaterOrders, at_stake
from consumer.life.endings import parked, training_copy
from jobs import message as messages
from jobs.kinds import Kinds
from jobs.layout import STYLE
from jobs.record import DeliveryState, EndingKind, JobRecord, State
from services.broker.settlement import Publication, Queue
from services.records.listing import RecordListing, look_up
from services.records.reopening import CannotReopen, reopen, tell_again
from services.s3.s3_service import S3Service
from utils.errors import ErrorCode, InvalidMessage, NewerRecord, StorageError
from utils.settings.groups import BrokerSettings
from utils.settings.storage import StorageSettings

JUDGED_AGAIN = ("", ErrorCode.INVALID_MESSAGE, ErrorCode.UNKNOWN_TYPE)
"""Codes of messages that have not become a job."""


@dataclasses.dataclass(frozen=True, slots=True)
class Waiting:
    """A job that can be sent back, or a message of the dead queue.

    Attributes:
        task_id: The task's id; empty if the message has none.
        kind, subject: The kind of the job, and the thing that it makes; empty if unknown.
        style_id: Its style; None for another kind of job, and if it is not known.
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
    kind: str
    subject: str
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
    """The result for one message or job.

    Attributes:
        task_id, code, reason, attempts: As in `Waiting`.
        outcome: The action, or the reason why it was left in its place.
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
        paused = record.is_paused
        return f"it {'is paused: resume it' if paused else 'has not ended: workers continue it'}"
    if record.delivery is DeliveryState.SET_ASIDE:
        return ""
    if ending.kind is EndingKind.COMPLETE:
        return "it has completed, and its model is in place"
    if not ending.body.get("retryable"):
        return f"another attempt cannot help ({ending.code}); order it again with another task id"
    if record.delivery is not DeliveryState.DELIVERED:
        return "the backend does not know of the failure yet; retry after its webhook"
    return ""


def reason_of(record: JobRecord) -> str:
    """Why a job was given up, in words."""
    if record.delivery is DeliveryState.SET_ASIDE:
        return record.delivery_detail or ""
    return str(record.ending.body.get("error_message", "")) if record.ending else ""


_RECORD_NAME = re.compile(r"(invalid/)?[A-Za-z0-9_-]{1,128}")
MOST = 1000
"""Messages that one call looks at: all of them are in its hands meanwhile."""
_CUT = (
    "the dead queue has only the beginning of its message, which was too large for the broker, and "
    "no record has it: publish it again"
)
_LOOKED_AT = "the rest of its ending is done; nothing is trained"
_TOLD = "its ending is sent again; nothing is trained"


class Redrive:
    """Sends back what was given up.

    Args:
        settings: The broker and the queue.
        storage: The buckets.
        kinds: Read and write the messages of jobs.
        s3: The storage of the state bucket.
        models: The storage of the models; the same by default.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        storage: StorageSettings,
        kinds: Kinds,
        s3: S3Service,
        *,
        models: S3Service | None = None,
    ) -> None:
        self._settings = settings
        self._s3 = s3
        self._models = models or s3
        self._bucket = storage.state_bucket_name
        self._model_bucket = storage.model_bucket_name
        self._kinds = kinds
        self._listing = RecordListing(s3, self._bucket)
        self._later = LaterOrders(storage, self._models, s3, self._listing)
        self._stakes: dict[tuple[int, str], str] = {}

    @property
    def known_ids(self) -> tuple[str, ...]:
        """The ids of all records."""
        return self._listing.ids

    def look(self, *, records: bool = True) -> tuple[list[Waiting], int]:
        """Everything that can be sent back; it stays where it is.

        Args:
            records: Look also for jobs of which the dead queue has no copy, among the unsettled
                records and the newest of the settled ones.

        Returns:
            The messages of the dead queue, then the jobs without a copy there; and how many
            messages of the dead queue were not looked at.

        Raises:
            BrokerError: The broker failed.
            StorageError: The records cannot be listed.
        """
        letters: list[DeadLetter] = []
        more = go_through(self._settings, letters.append, limit=MOST)
        ids = dict.fromkeys(each.task_id for each in letters if _names_a_record(each.task_id))
        of_letters = {each.task_id: each.record for each in look_up(self._s3, self._bucket, ids)}
        found = [self._of_letter(each, of_letters.get(each.task_id)) for each in letters]
        if records:
            found += self._of_records(
                each.record
                for each in (*self._listing.unsettled, *self._listing.settled())
                if each.task_id not in of_letters
            )
        return found, more

    def by_record(self, task_ids: Iterable[str]) -> list[Waiting]:
        """Those of these jobs that can be sent back by their records."""
        return self._of_records(each.record for each in look_up(self._s3, self._bucket, task_ids))

    def send_back(
        self, chosen: Collection[str] | None, *, include_superseded: bool = False
    ) -> tuple[list[Redriven], int]:
        """Send back the messages of these tasks, or all messages of the dead queue.

        A task of which the dead queue has no message is sent back by its record.

        Args:
            chosen: Ids of tasks; None for everything in the dead queue.
            include_superseded: Send back also jobs of which the style has a later order; those in
                `chosen` always are.

        Returns:
            The result for each, and how many messages of the dead queue were not looked at.

        Raises:
            BrokerError: The broker failed. Messages that had not left the dead queue are still
                there and can be sent back again, as can jobs without a message there.
        """
        done: list[Redriven] = []

        def judge(letter: DeadLetter) -> Publication | None:
            if chosen is not None and letter.task_id not in chosen:
                return None
            if chosen is None and not include_superseded and (later := self._winner(letter)):
                done.append(_left_out(letter, later))
                return None
            publication, outcome = self._tried(lambda: self._successor(letter))
            done.append(
                Redriven(
                    task_id=letter.task_id,
                    code=letter.code,
                    reason=letter.reason,
                    attempts=letter.attempts,
                    outcome=outcome,
                    sent_back=publication is not None,
                )
            )
            return publication

        more = go_through(self._settings, judge, limit=MOST)
        seen = {each.task_id for each in done}
        if not more:  # else the message may be among those that were not looked at
            for found in look_up(self._s3, self._bucket, dict.fromkeys(chosen or ())):
                if found.record and found.task_id not in seen:
                    done.append(self._send_back_by_record(found.record))
        return done, more

    def _send_back_by_record(self, record: JobRecord) -> Redriven:
        publication, outcome = self._tried(lambda: self._successor_of(record))
        if publication:
            # The record is live or pending by now: if this fails, a worker's sweep publishes it.
            broker.publish(self._settings, publication)
        ending = record.ending
        return Redriven(
            task_id=record.task_id,
            code=(ending.code or "") if ending else "",
            reason=reason_of(record),
            attempts=record.attempts,
            outcome=outcome,
            sent_back=publication is not None,
        )

    def _tried(self, act: Callable[[], tuple[Publication, str]]) -> tuple[Publication | None, str]:
        """The message to publish and a sentence about it; or None and the reason."""
        try:
            return act()
        except CannotReopen as refusal:
            return None, str(refusal)
        except InvalidMessage as error:
            return None, f"it cannot become a job with these settings ({error})"
        except StorageError as error:
            return None, f"its record could not be read or written ({error})"

    def _successor(self, letter: DeadLetter) -> tuple[Publication, str]:
        """The message that replaces a letter, and a sentence about it."""
        if parked_body := of_the_endings(letter):
            task_id, message = parked_body
            return parked(task_id, message, tries=0, delay=None), _LOOKED_AT
        if letter.code == ErrorCode.WEBHOOK_REJECTED:
            if not _names_a_record(letter.task_id):
                raise CannotReopen("it names no record")
            record = tell_again(self._s3, self._bucket, letter.task_id)
            again = parked(record.task_id, letter.body, tries=0, delay=None)
            return again, _TOLD
        if letter.is_cut:
            (found,) = look_up(self._s3, self._bucket, [letter.task_id])
            if found.record is None:
                raise CannotReopen(_CUT)
            return self._successor_of(found.record)
        queue = Queue.of_kind(messages.kind_of(letter.body, self._kinds))
        whole = Publication(
            queue, letter.body, letter.task_id or None, headers=dict(letter.headers)
        )
        if not is_of_a_job(letter):
            return whole, "published as it was, to be judged again"
        job = messages.parse(
            letter.body,
            message_id=letter.task_id or None,
            kinds=self._kinds,
        )
        reopened = reopen(self._s3, self._bucket, job.task_id, identity=job.identity)
        if reopened is None:
            return whole, "published as it was; it has no record any more"
        return whole, _fresh_attempt(reopened)

    def _successor_of(self, record: JobRecord) -> tuple[Publication, str]:
        """The message to publish for a job without a message in the dead queue."""
        if reason := why_not(record):
            raise CannotReopen(reason)
        if record.delivery is DeliveryState.SET_ASIDE:
            body = self._message_of(record) if record.message else b""  # it never became a job
            tell_again(self._s3, self._bucket, record.task_id)
            return parked(record.task_id, body, tries=0, delay=None), _TOLD
        body = self._message_of(record)
        reopened = reopen(self._s3, self._bucket, record.task_id, identity=record.identity)
        if reopened is None:
            raise CannotReopen("its record has been removed meanwhile")
        return training_copy(reopened, body), _fresh_attempt(reopened)

    def _message_of(self, record: JobRecord) -> bytes:
        try:
            kind = self._kinds.of(record.kind)
            return messages.from_understood(kind, record.message).body
        except (ValueError, NewerRecord) as error:
            raise CannotReopen(
                f"this version cannot read its record's message ({error})"
            ) from error

    def _winner(self, letter: DeadLetter) -> Later | None:
        """The later order that would win over the letter's job."""
        if not is_of_a_job(letter) or not _names_a_record(letter.task_id):
            return None
        (found,) = look_up(self._s3, self._bucket, [letter.task_id])
        return self._later.after(found.record) if found.record else None

    def _of_letter(self, letter: DeadLetter, record: JobRecord | None) -> Waiting:
        kind, subject = (record.kind, record.subject) if record else _ordered(letter, self._kinds)
        waiting = Waiting(
            task_id=letter.task_id,
            kind=kind,
            subject=subject,
            style_id=int(subject) if kind == STYLE and subject else None,
            code=letter.code,
            reason=letter.reason,
            attempts=letter.attempts,
            in_dead_queue=True,
            body=letter.body.decode(errors="replace"),
            trains=trains_again(letter),
        )
        return self._with_style(waiting, record if is_of_a_job(letter) else None)

    def _of_records(self, records: Iterable[JobRecord | None]) -> list[Waiting]:
        return [
            self._with_style(
                Waiting(
                    task_id=record.task_id,
                    kind=record.kind,
                    subject=record.subject,
                    style_id=record.style_id,
                    code=(record.ending.code or "") if record.ending else "",
                    reason=reason_of(record),
                    attempts=record.attempts,
                    in_dead_queue=False,
                    trains=record.delivery is not DeliveryState.SET_ASIDE,
                ),
                record if record.delivery is not DeliveryState.SET_ASIDE else None,
            )
            for record in records
            if record and not why_not(record)
        ]

    def _with_style(self, waiting: Waiting, to_train: JobRecord | None) -> Waiting:
        """The same with what is to be known of its style."""
        later = self._later.after(to_train) if to_train else None
        stake = ""
        if waiting.style_id is not None:
            what = "If the new attempt fails" if waiting.trains else "If its ending is `failed`"
            stake = self._at_stake(waiting.style_id, what)
        return dataclasses.replace(waiting, superseded=str(later) if later else "", at_stake=stake)

    def _at_stake(self, style_id: int, what: str) -> str:
        key = (style_id, what)
        if key not in self._stakes:
            self._stakes[key] = at_stake(self._model_bucket, self._models, style_id, what)
        return self._stakes[key]


def _left_out(letter: DeadLetter, later: Later) -> Redriven:
    return Redriven(
        task_id=letter.task_id,
        code=letter.code,
        reason=letter.reason,
        attempts=letter.attempts,
        outcome=str(later),
        sent_back=False,
        left_out=True,
    )


def _names_a_record(task_id: str) -> bool:
    return _RECORD_NAME.fullmatch(task_id) is not None


def _ordered(letter: DeadLetter, kinds: Kinds) -> tuple[str, str]:
    """Kind and subject of the message; empty if they cannot be read."""
    try:
        job = messages.parse(letter.body, message_id=letter.task_id or None, kinds=kinds)
    except InvalidMessage as error:
        return error.kind, error.subject or ""
    return job.kind, job.subject


def _fresh_attempt(reopened: JobRecord) -> str:
    newest = reopened.checkpoint
    return f"a fresh attempt, from {f'checkpoint {newest.name}' if newest else 'the beginning'}"
