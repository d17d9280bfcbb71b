"""Puts a message off until later; after a limited number of times it goes to the dead queue.

The delays between two attempts are those of `RETRY_DELAYS_SECONDS`; the last one repeats. The copy
carries the number of times that the message was put off (`x-put-offs`). At the limit of its reason
the message goes to the dead queue with that reason, where an operator finds it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from consumer.pages.observer import Observer
from services.broker.settlement import OWN_COPY, PUT_OFF_REASON, PUT_OFFS, Delivery, Settlement
from utils.errors import DamagedRecord, ErrorCode, NewerRecord, StorageError
from utils.logger import get_logger

log = get_logger(__name__)


class Why(enum.StrEnum):
    """Why a message was put off."""

    STORAGE = "storage"
    DAMAGED_RECORD = "damaged_record"
    NEWER_RECORD = "newer_record"
    NEWER_MESSAGE = "newer_message"


@dataclasses.dataclass(frozen=True, slots=True)
class _Rule:
    """How often a message may be put off for one reason, and its code in the dead queue."""

    limit: int | None
    code: ErrorCode


_LIMIT = 200  # for all reasons together, except those without a limit

# With the default delays, 200 times are a day and a half without S3. A damaged record does not
# recover, so its limit is lower. A record of a newer worker is intact: its message waits without a
# limit until this worker is updated, and an alert fires.
_RULES = {
    Why.STORAGE: _Rule(_LIMIT, ErrorCode.STORAGE_FAILED),
    Why.DAMAGED_RECORD: _Rule(5, ErrorCode.STORAGE_FAILED),
    Why.NEWER_RECORD: _Rule(None, ErrorCode.STORAGE_FAILED),
    Why.NEWER_MESSAGE: _Rule(_LIMIT, ErrorCode.UNKNOWN_TYPE),
}


def why_of(error: StorageError) -> Why:
    """The reason to put off a message whose record raised this error."""
    if isinstance(error, DamagedRecord):
        return Why.DAMAGED_RECORD
    return Why.NEWER_RECORD if isinstance(error, NewerRecord) else Why.STORAGE


class PutOffs:
    """Puts messages off, and gives them up at their reason's limit.

    Args:
        delays: Seconds before the first further attempt, the second, …; the last one repeats.
        observer: Counts the messages.
    """

    def __init__(self, delays: Sequence[float], observer: Observer) -> None:
        self._delays = tuple(delays)
        self._observer = observer

    def put_off(
        self, delivery: Delivery, why: Why, detail: str, *, task_id: str | None = None
    ) -> Settlement:
        """Settle a delivery by a delayed copy, or by a dead letter at the reason's limit.

        The copy keeps its `message_id`. It counts as a worker's own copy only if the delivery may
        have been claimed before, so an order that was never claimed stays a new order.

        Args:
            delivery: The message.
            why: The reason.
            detail: The reason as a sentence, for the log and the dead queue.
            task_id: The task's id, for the dead queue.
        """
        rule, count = _RULES[why], delivery.put_offs
        in_a_row = delivery.put_offs_for(why)
        task_id = task_id or delivery.message_id
        if rule.limit is not None and (in_a_row >= rule.limit or count >= _LIMIT):
            log.error("message_given_up", reason=detail, why=str(why), put_offs=count)
            self._observer.dead_lettered(rule.code)
            return Settlement.dead(
                delivery.body,
                code=rule.code,
                message=f"given up after it was put off {count} times: {detail}",
                task_id=task_id,
                min_level=delivery.min_level,
            )
        delay = self._delays[min(count, len(self._delays) - 1)]
        level = log.error if why is Why.DAMAGED_RECORD else log.warning
        level("message_put_off", reason=detail, why=str(why), put_offs=count + 1, seconds=delay)
        self._observer.put_off(why)
        headers = delivery.carried_headers | {
            PUT_OFFS: count + 1,
            PUT_OFF_REASON: f"{why}:{in_a_row + 1}",
        }
        if delivery.redelivered:
            headers[OWN_COPY] = True
        return Settlement.delayed(
            delivery.body,
            seconds=delay,
            message_id=delivery.message_id,
            headers=headers,
            queue=delivery.queue,
        )
