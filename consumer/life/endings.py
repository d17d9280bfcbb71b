"""A job's ending: its text, its delivery, and its parking while the backend cannot accept it.

An ending is in its record before anything is sent, so nothing here can lose it. If the backend does
not accept an ending within a minute, the ending waits on `<queue>.endings`, and the GPU takes the
next job. A record with other work left, and a message whose job another worker holds, wait on the
same queue: a message is acknowledged without a successor only if its record is settled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from consumer.life.put_offs import PutOffs, Why, why_of
from consumer.pages.observer import Observer
from consumer.publishing.model_publisher import Published
from jobs.kinds import JobKind, Kinds
from jobs.message import Job
from jobs.record import (
    SEQUENCES_PER_CLAIM,
    DeliveryState,
    Ending,
    EndingKind,
    JobRecord,
    OwedCopy,
    State,
)
from services.broker.settlement import MIN_LEVEL, OWN_COPY, Delivery, Publication, Queue, Settlement
from services.records.job_lease import JobLease
from services.records.job_records import (
    Claim,
    Claimed,
    Ended,
    HeldElsewhere,
    JobRecords,
    Unclaimed,
)
from services.webhooks.webhook_service import (
    EndingAnswer,
    EndingOutcome,
    EndingWebhook,
    WebhookService,
)
from utils import logger
from utils.errors import (
    ErrorCode,
    InvalidMessage,
    LeaseLost,
    NewerRecord,
    StorageError,
    TrainingServerError,
    UnknownType,
    code_of,
    is_retryable,
)
from utils.events import Finished

log = logger.get_logger(__name__)

DELIVER_AT_ONCE_SECONDS = 60.0
# The longest wait for the broker's confirmation of a copy for the dead queue. The record owes the
# copy until the confirmation, so nothing is lost if it does not come.
_CONFIRM_SECONDS = 30.0
_CONFIRM_SECONDS_AT_A_STOP = 1.0
# The longest time until a message is checked again that may be the only one of its job.
_LONGEST_WATCH_SECONDS = 1800.0


def complete(
    kind: JobKind, job: Job, finished: Finished, published: Published, *, sequence: int
) -> Ending:
    """The ending of a job whose model is in place, or in the archive.

    It is in the archive if the folder keeps a later order's model.
    """
    model_url = published.model_url
    body: dict[str, Any] = {
        **kind.identity_fields(job.subject),
        "model_url": model_url,
        "model_path": model_url,
        **kind.complete(job.spec, finished, model_url),
        "task_id": job.task_id,
        "sequence": sequence,
        "report": finished.summary,
    }
    if published.superseded_by is not None:
        body |= {"superseded_by": published.superseded_by, "archived_url": published.archived_url}
    return Ending(EndingKind.COMPLETE, body)


def failed(
    identity_fields: dict[str, Any],
    task_id: str | None,
    error: TrainingServerError,
    *,
    attempts: int,
    sequence: int,
) -> Ending:
    """The ending of a job that failed, or of a message that never became one.

    Args:
        identity_fields: The fields that name the subject (`JobKind.identity_fields`).
        task_id: The job, if its id is known.
        error: Why it failed.
        attempts: Attempts made.
        sequence: Number of this report among the job's reports.
    """
    code = code_of(error)
    body: dict[str, Any] = {
        **identity_fields,
        "error_message": str(error),
        "error_code": str(code),
        "sequence": sequence,
        "attempts": attempts,
        "retryable": is_retryable(error),
    }
    if task_id is not None:
        body["task_id"] = task_id
    return Ending(EndingKind.FAILED, body, code=str(code))


class Endings:
    """Delivers endings, now or later, and sends the dead queue the copies that records owe it.

    Args:
        webhooks: Sends the endings.
        records: The job records, which hold the endings.
        publish: Publishes a message; its future is done once the broker has confirmed it.
        put_offs: Puts messages off.
        kinds: Name the subject of a refused message.
        retry_delays: Seconds before each further try of a parked ending; the last repeats.
        deduplication_seconds: An invalid message that comes again after this time is reported
            again.
        stop: Ends waiting when the worker shuts down.
        observer: Counts refused messages.
    """

    def __init__(
        self,
        webhooks: WebhookService,
        records: JobRecords,
        *,
        publish: Callable[[Publication], Future[None]],
        put_offs: PutOffs,
        kinds: Kinds,
        retry_delays: Sequence[float],
        deduplication_seconds: float,
        stop: threading.Event,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer or Observer()
        self._webhooks = webhooks
        self._records = records
        self._publish = publish
        self._put_offs = put_offs
        self._kinds = kinds
        self._retry_delays = tuple(retry_delays)
        self._deduplication_seconds = deduplication_seconds
        self._stop = stop

    def deliver(
        self, lease: JobLease, *, original: bytes, for_seconds: float, tries: int = 0
    ) -> tuple[Publication, ...]:
        """Send the ending of a record that has one, and settle the record if possible.

        Args:
            lease: The hold on the record.
            original: The message, for the dead queue.
            for_seconds: How long to try now.
            tries: How often the ending was parked before.

        Returns:
            The messages to publish before the acknowledgement: none once the record is settled,
            otherwise the parked ending.

        Raises:
            LeaseLost: Another worker delivers it now.
        """
        self._pay(lease, original)
        delay, tried = self._retry_delays[0], tries
        if lease.record.delivery is DeliveryState.PENDING:
            answer = self._send(lease, for_seconds)
            tried = tries + 1
            if answer.outcome is EndingOutcome.DELIVERED:
                lease.mark_delivered()
            elif self._is_refused_for_good(answer, tries) and lease.record.owed is None:
                self._set_aside(lease, answer)
                self._pay(lease, original)
            else:
                delay = parking_delay(self._retry_delays, tries, answer)
        record = lease.record
        if record.is_settled:
            return ()
        lease.release(count_attempt=False, quiet_seconds=delay)
        return (parked(record.task_id, original, tries=tried, delay=delay),)

    def watched(self, record: JobRecord, original: bytes, *, looks: int = 0) -> Publication:
        """The message of a job that another worker holds, as a message of the endings' queue.

        Every worker reads that queue, also while it trains, so no worker is started for the copy.
        The message returns until the job is settled. If the holder dies, the message is published
        to the training queue.

        Args:
            record: The job's record.
            original: The message.
            looks: How often it has returned.
        """
        delays = [one for one in self._retry_delays if one <= _LONGEST_WATCH_SECONDS]
        lease = record.hold.lease_seconds
        # The first check comes after the lease of a holder that was killed just now.
        delay = _at_least(lease, delays or self._retry_delays[:1], looks - 1) if looks else lease
        return parked(record.task_id, original, tries=0, delay=delay, looks=looks + 1)

    def handle(self, delivery: Delivery) -> Settlement:
        """Check a job whose ending or message is parked: the handler of `<queue>.endings`."""
        try:
            one = _unpark(delivery.body)
        except (ValueError, KeyError, TypeError) as error:
            return Settlement.dead(
                delivery.body,
                code=ErrorCode.INVALID_MESSAGE,
                message=f"not an ending that a worker has parked: {error!r}",
                task_id=delivery.message_id,
            )
        with logger.bound(task_id=one.task_id):
            try:
                return self._look_at(one)
            except LeaseLost as error:
                log.warning("ending_not_delivered", reason=str(error))
                return Settlement.ack(one.again(self._retry_delays[0]))
            except StorageError as error:
                return self._put_offs.put_off(
                    delivery, why_of(error), str(error), task_id=one.task_id
                )

    def deliver_what_is_left(self, task_id: str, original: bytes) -> Settlement:
        """Finish the work that is left for an ended job; a job that has ended is not trained again.

        Its message is acknowledged once nothing is left to do, or once the rest is parked.

        Raises:
            StorageError: S3 cannot be used.
        """
        try:
            return self._look_at(_Parked(task_id, original, tries=0, looks=0))
        except LeaseLost as error:
            log.warning("ending_not_delivered", reason=str(error))
            again = parked(task_id, original, tries=0, delay=self._retry_delays[0])
            return Settlement.ack(again)

    def _look_at(self, one: _Parked) -> Settlement:
        match self._records.adopt_ending(one.task_id):
            case None:
                return Settlement.ack()
            case HeldElsewhere(record=record, wait_seconds=seconds):
                if record.state is State.LIVE:
                    return Settlement.ack(self.watched(record, one.message, looks=one.looks))
                return Settlement.ack(one.again(_at_least(seconds, self._retry_delays)))
            case Unclaimed(record=record, seconds_silent=seconds):
                return self._of_unclaimed(one, record, seconds)
            case Claimed(lease=lease):
                # A single attempt: endings of other jobs wait behind this one.
                with lease, logger.bound(**self._identity(lease.record)):
                    left = self.deliver(lease, original=one.message, for_seconds=0, tries=one.tries)
                return Settlement.ack(*left)

    def _of_unclaimed(self, one: _Parked, record: JobRecord, seconds: float) -> Settlement:
        """The message of a live job that no worker holds."""
        if record.is_paused:  # it needs no message until it is resumed or cancelled
            if self._records.requests.keeps_paused(record.task_id):
                return Settlement.ack()
        elif record.hold.released and seconds < record.hold.quiet_seconds:
            # Given back in good order: its message is in a delay queue.
            return Settlement.ack(self.watched(record, one.message, looks=one.looks))
        else:
            log.warning("holder_vanished", claim=record.claim, holder=record.hold.owner)
        return Settlement.ack(training_copy(record, one.message))

    def _identity(self, record: JobRecord) -> dict[str, Any]:
        """The fields that name a record's subject in log lines."""
        try:
            return self._kinds.of(record.kind).identity_fields(record.subject)
        except NewerRecord:  # an ending of any kind can be delivered
            return {"kind": record.kind, "subject": record.subject}

    def _send(self, lease: JobLease, for_seconds: float) -> EndingAnswer:
        record = lease.record
        assert record.ending is not None
        answer = self._webhooks.deliver(
            self._webhooks.origin_for(record.webhook_url),
            EndingWebhook(str(record.ending.kind), record.ending.webhook_id, record.ending.body),
            for_seconds=for_seconds,
            stop=self._stop,
        )
        facts = {"ending": str(record.ending.kind), "status": answer.status}
        if answer.outcome is EndingOutcome.DELIVERED:
            log.info("ending_sent", **facts)
        else:
            log.info("ending_not_accepted", outcome=answer.outcome.value, **facts)
        return answer

    def _pay(self, lease: JobLease, original: bytes) -> None:
        """Send the dead queue the copy that the record owes.

        Once the broker confirms it, the record owes nothing.

        Without a confirmation in time the record still owes it, so the record stays unsettled.
        """
        owed = lease.record.owed
        if owed is None:
            return
        confirmed = self._publish(
            Publication.to_dead(
                original,
                code=owed.code,
                message=owed.message,
                task_id=lease.record.task_id,
                attempts=owed.attempts,
                min_level=lease.record.min_level,
            )
        )
        if self._is_confirmed(confirmed):
            lease.paid()
        else:
            log.warning("dead_letter_owed", reason="the broker has not confirmed the copy yet")

    def _is_confirmed(self, confirmed: Future[None]) -> bool:
        deadline = time.monotonic() + _CONFIRM_SECONDS
        while time.monotonic() < deadline:
            if self._stop.is_set():
                deadline = min(deadline, time.monotonic() + _CONFIRM_SECONDS_AT_A_STOP)
            try:
                with contextlib.suppress(TimeoutError):
                    confirmed.result(timeout=0.1)
                    return True
            except CancelledError:
                return False
        return False

    def refuse(self, delivery: Delivery, error: InvalidMessage) -> Settlement:
        """Send a message that can never become a job to the dead queue.

        If the message names its subject, the backend also gets a `failed` webhook.
        """
        code = code_of(error)
        log.warning("message_refused", code=str(code), field=error.field, reason=str(error))
        self._observer.refused(code)
        dead = Publication.to_dead(
            delivery.body,
            code=code,
            message=str(error),
            task_id=error.task_id,
            min_level=delivery.min_level,
        )
        if error.subject is None or isinstance(error, UnknownType):
            return Settlement.ack(dead)
        try:
            return Settlement.ack(dead, *self._tell_refused(delivery, error, error.subject))
        except (StorageError, LeaseLost) as trouble:
            # Its record could not be written. Nothing was sent yet; the message is retried later.
            why = why_of(trouble) if isinstance(trouble, StorageError) else Why.STORAGE
            return self._put_offs.put_off(delivery, why, str(trouble), task_id=error.task_id)

    def _tell_refused(
        self, delivery: Delivery, error: InvalidMessage, subject: str
    ) -> tuple[Publication, ...]:
        if error.task_id and self._records.read(error.task_id):
            log.info("refusal_not_told", reason="its task id belongs to another job")
            return ()
        claim: Claim = self._records.claim_invalid(
            hashlib.sha256(delivery.body).hexdigest(),
            failed(
                self._kinds.of(error.kind).identity_fields(subject),
                error.task_id,
                error,
                attempts=0,
                sequence=SEQUENCES_PER_CLAIM + 1,
            ),
            kind=error.kind,
            subject=subject,
            webhook_url=error.webhook_url,
            new_run_after=(
                None
                if delivery.redelivered or OWN_COPY in delivery.headers
                else self._deduplication_seconds
            ),
        )
        match claim:
            case Claimed():
                with claim.lease as lease:
                    return self.deliver(lease, original=delivery.body, for_seconds=0)
            case HeldElsewhere():
                delay = self._retry_delays[0]
                return (parked(claim.record.task_id, delivery.body, tries=0, delay=delay),)
            case Ended():
                return ()  # reported before
            case _:
                raise AssertionError(claim)

    def _is_refused_for_good(self, answer: EndingAnswer, tries: int) -> bool:
        """Whether the backend will never accept the ending, so that an operator has to act.

        A router may answer 404 while the backend is deployed, so a 404 counts only if the backend
        itself gives it after the last delay.
        """
        if answer.outcome is EndingOutcome.RETRY_A_FEW:
            return answer.by_json and tries >= len(self._retry_delays)
        return answer.outcome is EndingOutcome.REJECTED

    def _set_aside(self, lease: JobLease, answer: EndingAnswer) -> None:
        """Keep an ending that the backend refuses for good in the dead queue, for an operator."""
        detail = f"the backend answered {answer.status}: {answer.detail}"
        log.error("ending_set_aside", reason=detail)
        lease.set_aside(
            detail, OwedCopy(str(ErrorCode.WEBHOOK_REJECTED), detail, lease.record.attempts)
        )


def parking_delay(delays: Sequence[float], tries: int, answer: EndingAnswer) -> float:
    """Seconds until a parked ending is retried: one of the configured delays.

    A backend that refuses the token is retried more slowly, since keys may be rotating. If the
    backend names a time (`Retry-After`), the first delay that is not shorter is used.

    Args:
        delays: `ENDING_RETRY_DELAYS_SECONDS`.
        tries: How often the ending was parked before.
        answer: The backend's last answer.
    """
    slower = 1 if answer.outcome is EndingOutcome.RETRY_SLOWLY else 0
    return _at_least(answer.retry_after or 0.0, delays, tries + slower)


def _at_least(seconds: float, delays: Sequence[float], index: int = 0) -> float:
    """The delay of this index, or the first of the later ones that is no shorter; else the last."""
    later = delays[min(index, len(delays) - 1) :]
    return next((delay for delay in later if delay >= seconds), max(delays))


def parked(
    task_id: str, original: bytes, *, tries: int, delay: float | None, looks: int = 0
) -> Publication:
    """The message of `<queue>.endings` for an ending to deliver or a job to check.

    Args:
        task_id: The id of its record.
        original: The job's message.
        tries: How often the ending was parked, this time included.
        delay: Seconds until it is checked again; None for at once.
        looks: How often the job was checked while it was live.
    """
    body = {"task_id": task_id, "tries": tries, "message": original.decode(errors="replace")}
    if looks:
        body["looks"] = looks
    return Publication(
        Queue.ENDINGS, json.dumps(body).encode(), message_id=task_id, delay_seconds=delay
    )


def training_copy(record: JobRecord, message: bytes) -> Publication:
    """A live job's message, for any free worker."""
    headers: dict[str, str | int | bool] = {OWN_COPY: True}
    if record.min_level:
        headers[MIN_LEVEL] = record.min_level
    return Publication(Queue.of_kind(record.kind), message, record.task_id, headers)


@dataclasses.dataclass(frozen=True, slots=True)
class _Parked:
    """The values that `parked` wrote into a message."""

    task_id: str
    message: bytes
    tries: int
    looks: int

    def again(self, delay: float) -> Publication:
        """The same entry, for the next attempt."""
        return parked(self.task_id, self.message, tries=self.tries, delay=delay, looks=self.looks)


def _unpark(body: bytes) -> _Parked:
    values = json.loads(body)
    return _Parked(
        str(values["task_id"]),
        str(values["message"]).encode(),
        int(values["tries"]),
        int(values.get("looks", 0)),
    )
