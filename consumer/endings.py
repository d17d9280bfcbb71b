"""A job's last word: how it is phrased, sent, and parked while the backend cannot take it.

An ending is in its record before anything is sent, so nothing here can lose it. What the backend
does not take within a minute rides on `<queue>.endings`, while the GPU takes the next job.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from typing import Any

from consumer.observer import Observer
from consumer.training_job import TrainingJob
from consumer.settlement import Delivery, Publication, Queue, Settlement
from services import webhook_service
from services.job_lease import JobLease
from services.job_record import SEQUENCES_PER_CLAIM, Ending, EndingKind
from services.job_records import Claim, Claimed, Ended, HeldElsewhere, JobRecords
from services.webhook_service import EndingAnswer, EndingOutcome, WebhookService
from utils import logger
from utils.errors import (
    ErrorCode,
    InvalidMessage,
    LeaseLost,
    StorageError,
    TrainingServerError,
    UnknownType,
    code_of,
    is_retryable,
)
from utils.events import Finished

log = logger.get_logger(__name__)

DELIVER_AT_ONCE_SECONDS = 60.0
# A 404 may be a backend that is just being deployed; a deleted style stays 404.
_NOT_FOUND_TRIES = 4


def complete(job: TrainingJob, finished: Finished, model_url: str, *, sequence: int) -> Ending:
    """The ending of a job whose model is in place."""
    parameters = finished.summary.get("hyperparameters", {})
    body: dict[str, Any] = {
        "style_id": job.style_id,
        "model_url": model_url,
        "model_path": model_url,
        "metadata": {
            "training_epochs": finished.epoch,
            "lora_rank": parameters.get("rank", job.hyper_parameters.rank),
            "lora_alpha": parameters.get("alpha", job.hyper_parameters.alpha),
        },
        "training_metric": {"loss": finished.loss, "epochs": finished.epoch},
        "task_id": job.task_id,
        "sequence": sequence,
        "report": finished.summary,
    }
    return Ending(EndingKind.COMPLETE, body)


def failed(
    style_id: int,
    task_id: str | None,
    error: TrainingServerError,
    *,
    attempts: int,
    sequence: int,
) -> Ending:
    """The ending of a job that failed, or of a message that never became one."""
    code = code_of(error)
    body: dict[str, Any] = {
        "style_id": style_id,
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
    """Delivers endings, now or later.

    Args:
        webhooks: Who sends.
        records: Where endings are kept.
        retry_delays: Seconds before each further try of a parked ending; the last repeats.
        deduplication_seconds: An invalid message told longer ago than this is told again.
        stop: Ends waiting when the worker shuts down.
        observer: Is told of refused messages.
    """

    def __init__(
        self,
        webhooks: WebhookService,
        records: JobRecords,
        *,
        retry_delays: Sequence[float],
        deduplication_seconds: float,
        stop: threading.Event,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer or Observer()
        self._webhooks = webhooks
        self._records = records
        self._retry_delays = tuple(retry_delays)
        self._deduplication_seconds = deduplication_seconds
        self._stop = stop

    def deliver(
        self, lease: JobLease, *, original: bytes, for_seconds: float, tries: int = 0
    ) -> tuple[Publication, ...]:
        """Send the ending of a record that has one, and settle the record where that can be done.

        Args:
            lease: The hold on the record.
            original: The message, for the dead queue, should the backend refuse the ending.
            for_seconds: How long to try now.
            tries: How often the ending was parked before.

        Returns:
            What must be published: nothing, or the parked or refused ending.

        Raises:
            LeaseLost: Somebody else delivers it now.
        """
        record = lease.record
        assert record.ending is not None
        answer = self._webhooks.deliver(
            self._webhooks.origin_for(record.webhook_url),
            webhook_service.Ending(
                str(record.ending.kind), record.ending.webhook_id, record.ending.body
            ),
            for_seconds=for_seconds,
            stop=self._stop,
        )
        log.info(
            "ending_sent",
            ending=str(record.ending.kind),
            outcome=answer.outcome.name,
            status=answer.status,
        )
        not_found_for_good = (
            answer.outcome is EndingOutcome.RETRY_A_FEW and tries >= _NOT_FOUND_TRIES
        )
        if answer.outcome is EndingOutcome.DELIVERED:
            lease.mark_delivered()
            return ()
        if answer.outcome is EndingOutcome.REJECTED or not_found_for_good:
            return self._set_aside(lease, answer, original)
        delay = self._retry_delays[min(tries, len(self._retry_delays) - 1)]
        lease.release(count_attempt=False, quiet_seconds=delay)
        return (parked(record.task_id, original, tries=tries + 1, delay=delay),)

    def handle(self, delivery: Delivery) -> Settlement:
        """Try again to deliver a parked ending; the handler of `<queue>.endings`."""
        try:
            task_id, original, tries = _unpark(delivery.body)
        except (ValueError, KeyError, TypeError) as error:
            return Settlement.dead(
                delivery.body,
                code=ErrorCode.INVALID_MESSAGE,
                message=f"not an ending that a worker has parked: {error!r}",
                task_id=delivery.message_id,
            )
        again = parked(task_id, original, tries=tries, delay=self._retry_delays[0])
        with logger.bound(task_id=task_id):
            try:
                claim = self._records.adopt_ending(task_id)
                if claim is None:
                    return Settlement.ack()
                if isinstance(claim, HeldElsewhere):
                    return Settlement.ack(again)
                with claim.lease as lease:
                    # One attempt: endings of other jobs wait behind this one.
                    return Settlement.ack(
                        *self.deliver(lease, original=original, for_seconds=0, tries=tries)
                    )
            except (LeaseLost, StorageError) as error:
                log.warning("ending_not_delivered", reason=str(error))
                return Settlement.ack(again)

    def refuse(self, delivery: Delivery, error: InvalidMessage) -> Settlement:
        """A message that can never become a job: to the dead queue, and `failed` where a style can
        be named."""
        code = code_of(error)
        log.warning("message_refused", code=str(code), field=error.field, reason=str(error))
        self._observer.refused(code)
        dead = Publication.to_dead(
            delivery.body, code=code, message=str(error), task_id=error.task_id
        )
        if error.style_id is None or isinstance(error, UnknownType):
            return Settlement.ack(dead)
        try:
            return Settlement.ack(dead, *self._tell_refused(delivery, error, error.style_id))
        except (StorageError, LeaseLost) as trouble:
            # Its record could not be written: the message comes back, and nothing was said yet.
            log.warning("refusal_not_recorded", reason=str(trouble))
            return Settlement.delayed(
                delivery.body,
                seconds=self._retry_delays[0],
                message_id=delivery.message_id,
                headers=delivery.carried_headers,
            )

    def _tell_refused(
        self, delivery: Delivery, error: InvalidMessage, style_id: int
    ) -> tuple[Publication, ...]:
        if error.task_id and self._records.read(error.task_id):
            log.info("refusal_not_told", reason="its task id belongs to another job")
            return ()
        claim: Claim = self._records.claim_invalid(
            hashlib.sha256(delivery.body).hexdigest(),
            failed(style_id, error.task_id, error, attempts=0, sequence=SEQUENCES_PER_CLAIM + 1),
            style_id=style_id,
            webhook_url=error.webhook_url,
            new_run_after=None if delivery.redelivered else self._deduplication_seconds,
        )
        match claim:
            case Claimed():
                with claim.lease as lease:
                    return self.deliver(lease, original=delivery.body, for_seconds=0)
            case HeldElsewhere():
                delay = self._retry_delays[0]
                return (parked(claim.record.task_id, delivery.body, tries=0, delay=delay),)
            case Ended():
                return ()  # told before
            case _:
                raise AssertionError(claim)

    def _set_aside(
        self, lease: JobLease, answer: EndingAnswer, original: bytes
    ) -> tuple[Publication, ...]:
        """The backend refuses the ending for good: the dead queue keeps it, for a person."""
        detail = f"the backend answered {answer.status}: {answer.detail}"
        task_id = lease.record.task_id
        log.error("ending_set_aside", reason=detail)
        lease.set_aside(detail)
        return (
            Publication.to_dead(
                original,
                code=ErrorCode.WEBHOOK_REJECTED,
                message=detail,
                task_id=task_id,
                attempts=lease.record.attempts,
            ),
        )


def parked(task_id: str, original: bytes, *, tries: int, delay: float | None) -> Publication:
    """An ending on its way through `<queue>.endings`.

    Args:
        task_id: Its record.
        original: The job's message.
        tries: How often it was parked, this time included.
        delay: Seconds until it is looked at again; None for at once.
    """
    body = {"task_id": task_id, "tries": tries, "message": original.decode(errors="replace")}
    return Publication(
        Queue.ENDINGS, json.dumps(body).encode(), message_id=task_id, delay_seconds=delay
    )


def _unpark(body: bytes) -> tuple[str, bytes, int]:
    values = json.loads(body)
    return str(values["task_id"]), str(values["message"]).encode(), int(values["tries"])
