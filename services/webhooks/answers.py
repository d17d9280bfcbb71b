"""What the backend's answers mean: docs/protocol.md, section 3, as functions without a network."""

from __future__ import annotations

import dataclasses
import enum
import json
import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

# A backend that asks for more patience than this gets another try all the same.
MAX_RETRY_AFTER_SECONDS = 3600.0


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """A job's last word.

    Attributes:
        kind: `complete` or `failed`.
        webhook_id: The same for every attempt to deliver it.
        body: JSON values.
    """

    kind: str
    webhook_id: str
    body: Mapping[str, Any]


class ProgressAnswer(enum.Enum):
    """What the backend said to a progress report."""

    DONE = "done"
    DROPPED = "dropped"
    CANCEL = "cancel"
    NOT_FOUND = "not_found"
    UNAUTHORIZED = "unauthorized"
    REJECTED = "rejected"


class EndingOutcome(enum.Enum):
    """What the backend said to an ending, and so what to do next."""

    DELIVERED = "delivered"
    RETRY = "retry"
    RETRY_SLOWLY = "retry_slowly"  # keys may be rotating
    RETRY_A_FEW = "retry_a_few"  # perhaps not the backend's own answer; see `EndingAnswer.by_json`
    REJECTED = "rejected"


@dataclasses.dataclass(frozen=True, slots=True)
class EndingAnswer:
    """The outcome of an attempt to deliver an ending.

    Attributes:
        retry_after: Seconds that the backend asks to be left alone, at most an hour, if it asks.
        status: The answer's HTTP status; None where there was no answer.
        detail: The answer's text or what went wrong, short, for a person; without secrets.
        by_json: The answer's body is a JSON object, as an application writes it. Routers, proxies
            and error pages between us and the backend answer with text, HTML or nothing.
    """

    outcome: EndingOutcome
    retry_after: float | None = None
    status: int | None = None
    detail: str = ""
    by_json: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """What came back from one request.

    Attributes:
        status: HTTP status; None where no answer began.
        headers: Its headers, names in lower case.
        body: Its body as far as it was read.
        problem: What went wrong, if anything did; may stand beside a status, when the body broke.
        hopeless: The request cannot be made at all, so that trying again is no use.
    """

    status: int | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    problem: str = ""
    hopeless: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class RetrySchedule:
    """How long to wait between two attempts to deliver an ending before it is parked.

    An ending is parked after a minute, and its further delays are settings
    (`ENDING_RETRY_DELAYS_SECONDS`).

    Attributes:
        delays: Seconds after the first attempt, after the second, …; the last one repeats.
        slow_delays: The same where the backend refuses the token.
        jitter: Each delay is longer or shorter by up to this part of it, so that a fleet of
            workers does not knock in step.
    """

    delays: tuple[float, ...] = (5.0, 30.0)
    slow_delays: tuple[float, ...] = (60.0,)
    jitter: float = 0.2

    def seconds(self, attempts: int, answer: EndingAnswer) -> float:
        """How long to wait after `attempts` attempts, the last of which got `answer`."""
        slow = answer.outcome is EndingOutcome.RETRY_SLOWLY
        delays = self.slow_delays if slow else self.delays
        delay = delays[min(attempts, len(delays)) - 1]
        delay *= 1 + random.uniform(-self.jitter, self.jitter)
        return max(delay, answer.retry_after or 0.0)


class _Kind(enum.Enum):
    """A row of the protocol's table of answers: what it means for progress and for an ending."""

    TAKEN = (ProgressAnswer.DONE, EndingOutcome.DELIVERED)
    PASSING = (ProgressAnswer.DROPPED, EndingOutcome.RETRY)
    UNAUTHORIZED = (ProgressAnswer.UNAUTHORIZED, EndingOutcome.RETRY_SLOWLY)
    NOT_FOUND = (ProgressAnswer.NOT_FOUND, EndingOutcome.RETRY_A_FEW)
    GONE = (ProgressAnswer.CANCEL, EndingOutcome.DELIVERED)  # nobody wants it any more
    REFUSED = (ProgressAnswer.REJECTED, EndingOutcome.REJECTED)
    # A web page where an application's answer belongs: a login page, a proxy's error page.
    TAKEN_BY_A_PAGE = (ProgressAnswer.DROPPED, EndingOutcome.RETRY)
    REFUSED_BY_A_PAGE = (ProgressAnswer.REJECTED, EndingOutcome.RETRY_A_FEW)


_STATUSES = {
    401: _Kind.UNAUTHORIZED,
    403: _Kind.UNAUTHORIZED,
    404: _Kind.NOT_FOUND,
    408: _Kind.PASSING,
    410: _Kind.GONE,
    425: _Kind.PASSING,
    429: _Kind.PASSING,
}
_HUNDREDS = {2: _Kind.TAKEN, 5: _Kind.PASSING}
_OF_PAGES = {_Kind.TAKEN: _Kind.TAKEN_BY_A_PAGE, _Kind.REFUSED: _Kind.REFUSED_BY_A_PAGE}


def judge_progress(reply: Reply) -> ProgressAnswer:
    """The answer to a progress report, by the protocol's table."""
    kind = _kind_of(reply)
    if kind is _Kind.TAKEN and _wants_cancel(reply.body):
        return ProgressAnswer.CANCEL
    return kind.value[0]


def judge_ending(reply: Reply, detail: str) -> EndingAnswer:
    """The answer to an ending, by the protocol's table.

    The answer's head is the backend's word, even where its body then broke off.

    Args:
        reply: What came back.
        detail: The same in words.
    """
    outcome = _kind_of(reply).value[1]
    by_json = _json_object(reply.body) is not None
    return EndingAnswer(outcome, retry_after_of(reply.headers), reply.status, detail, by_json)


def _kind_of(reply: Reply) -> _Kind:
    if reply.status is None:
        return _Kind.REFUSED if reply.hopeless else _Kind.PASSING
    by_hundred = _HUNDREDS.get(reply.status // 100, _Kind.REFUSED)
    kind = _STATUSES.get(reply.status, by_hundred)
    return _OF_PAGES.get(kind, kind) if _is_page(reply) else kind


def _is_page(reply: Reply) -> bool:
    kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml")


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, in either of its forms; None without one that makes sense.

    A date is compared with the answer's own Date, so that neither clock need be right.
    """
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:10])
    else:
        try:
            then = parsedate_to_datetime(text)
            now = parsedate_to_datetime(headers["date"]) if "date" in headers else None
            seconds = (then - (now or datetime.now(UTC))).total_seconds()
        except (ValueError, TypeError):  # TypeError: one date has a time zone, the other has none
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


def _wants_cancel(body: bytes) -> bool:
    answer = _json_object(body)
    return answer is not None and answer.get("cancel") is True


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
