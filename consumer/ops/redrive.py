"""`python main.py redrive`: what lies in the dead queue, and sending it back.

What becomes of a message depends on why it is there:

- a job that failed though another attempt might have helped gets that attempt: its record is
  reopened, and the message goes to the training queue;
- an ending that the backend refused is told again, the same under the same id; nothing is trained;
- a message that could not become a job, or that the broker itself has moved, goes to the training
  queue as it was published, and is judged anew.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from config import Settings
from consumer import messages
from consumer.endings import parked
from consumer.ops.dead_queue import DeadLetter, go_through
from consumer.settlement import Publication, Queue
from services.job_reopening import CannotReopen, reopen, tell_again
from services.s3_service import S3Service
from utils.errors import ErrorCode, InvalidMessage, StorageError

_RECORD_NAME = re.compile(r"(invalid/)?[A-Za-z0-9_-]{1,128}")
MOST = 1000
"""Messages that one call looks at: all of them are in its hands meanwhile."""


@dataclasses.dataclass(frozen=True, slots=True)
class Redriven:
    """What became of one message.

    Attributes:
        task_id, code, reason, attempts: As in the dead queue.
        outcome: What was done, or why it lies where it was.
        sent_back: Whether it has left the dead queue.
    """

    task_id: str
    code: str
    reason: str
    attempts: int
    outcome: str
    sent_back: bool


def look(settings: Settings) -> tuple[list[DeadLetter], int]:
    """The messages of the dead queue, which stay there, and how many more there are.

    Raises:
        BrokerError: The broker failed.
    """
    letters: list[DeadLetter] = []
    more = go_through(settings, letters.append, limit=MOST)
    return letters, more


def send_back(
    settings: Settings, s3: S3Service, chosen: Collection[str] | None
) -> tuple[list[Redriven], int]:
    """Send back the messages of these tasks, or all of them.

    Args:
        settings: The broker, the queue and the state bucket.
        s3: The storage.
        chosen: Ids of tasks; None for all.

    Returns:
        What became of each message that was chosen, and how many were not looked at.

    Raises:
        BrokerError: The broker failed. What had not left the dead queue is still there, and can be
            sent back again.
    """
    done: list[Redriven] = []

    def judge(letter: DeadLetter) -> Publication | None:
        if chosen is not None and letter.task_id not in chosen:
            return None
        publication: Publication | None = None
        try:
            publication, outcome = _successor(letter, settings, s3)
        except CannotReopen as refusal:
            outcome = str(refusal)
        except InvalidMessage as error:
            outcome = f"it cannot become a job with these settings ({error})"
        except StorageError as error:
            outcome = f"its record could not be read or written ({error})"
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

    more = go_through(settings, judge, limit=MOST, into=(Queue.TRAINING, Queue.ENDINGS))
    return done, more


def _successor(letter: DeadLetter, settings: Settings, s3: S3Service) -> tuple[Publication, str]:
    """What is published in a letter's place, and a sentence about it."""
    bucket = settings.state_bucket_name
    if letter.code == ErrorCode.WEBHOOK_REJECTED:
        if not _RECORD_NAME.fullmatch(letter.task_id):
            raise CannotReopen("it names no record")
        record = tell_again(s3, bucket, letter.task_id)
        again = parked(record.task_id, letter.body, tries=0, delay=None)
        return again, "its ending is told again; nothing is trained"
    whole = Publication(
        Queue.TRAINING, letter.body, letter.task_id or None, headers=dict(letter.headers)
    )
    if letter.code in ("", ErrorCode.INVALID_MESSAGE, ErrorCode.UNKNOWN_TYPE):
        return whole, "published as it was, to be judged anew"
    job = messages.parse(letter.body, message_id=letter.task_id or None, settings=settings)
    reopened = reopen(s3, bucket, job.task_id, identity=job.identity)
    if reopened is None:
        return whole, "published as it was; it has no record any more"
    newest = reopened.checkpoint
    start = f"checkpoint {newest.name}" if newest else "the beginning"
    return whole, f"a fresh attempt, from {start}"
