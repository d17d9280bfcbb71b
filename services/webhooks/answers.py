"""Judges the backend's answers by docs/protocol.md, section 3, without a network."""

from __future__ import annotations

import dataclasses
import enum
import json
import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

# The longest Retry-After that is honoured.
MAX_RETRY_AFTER_SECONDS = 3600.0


@dataclasses.dataclass(frozen=True, slots=True)
class EndingWebhook:
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
    """The meaning of an answer to a progress report."""

    DONE = "done"
    DROPPED = "dropped"
    CANCEL = "cancel"
    PAUSE = "pause"
    NOT_FOUND = "not_found"
    UNAUTHORIZED = "unauthorized"
    REJECTED = "rejected"


class EndingOutcome(enum.Enum):
    """The meaning of an answer to an ending, which decides the next step."""

    DELIVERED = "delivered"
    RETRY = "retry"
    RETRY_SLOWLY = "retry_slowly"  # keys may be rotating
    RETRY_A_FEW = "retry_a_few"  # perhaps not the backend's own answer; see `EndingAnswer.by_json`
    REJECTED = "rejected"


@dataclasses.dataclass(frozen=True, slots=True)
class EndingAnswer:
    """The outcome of an attempt to deliver an ending.

    Attributes:
        retry_after: Seconds until the backend accepts a retry, at most an hour; None if it names
            none.
        status: The answer's HTTP status; None without an answer.
        detail: The answer's text or the error, short, for a person; without secrets.
        by_json: The answer's body is a JSON object, as an application writes it. Routers, proxies
            and error pages in between answer with text, HTML or nothing.
    """

    outcome: EndingOutcome
    retry_after: float | None = None
    status: int | None = None
    detail: str = ""
    by_json: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request, as far as it arrived.

    Attributes:
        status: HTTP status; None where no answer began.
        headers: Its headers, names in lower case.
        body: Its body as far as it was read.
        problem: A sentence about an error; together with a status if the body broke off.
        hopeless: The request cannot be made at all, so a retry is useless.
    """

    status: int | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    problem: str = ""
    hopeless: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class RetrySchedule:
    """The waits between attempts to deliver an ending, before it is parked.

    An ending is parked after a minute, and its further delays are settings
    (`ENDING_RETRY_DELAYS_SECONDS`).

    Attributes:
        delays: Seconds after the first attempt, after the second, …; the last one repeats.
        slow_delays: The same if the backend refuses the token.
        jitter: Each delay is longer or shorter by up to this part of it, so the workers of a fleet
            do not send at the same time.
    """

    delays: tuple[float, ...] = (5.0, 30.0)
    slow_delays: tuple[float, ...] = (60.0,)
    jitter: float = 0.2

    def seconds(self, attempts: int, answer: EndingAnswer) -> float:
        """Seconds to wait after `attempts` attempts, the last of which got `answer`."""
        slow = answer.outcome is EndingOutcome.RETRY_SLOWLY
        delays = self.slow_delays if slow else self.delays
        delay = delays[min(attempts, len(delays)) - 1]
        delay *= 1 + random.uniform(-self.jitter, self.jitter)
        return max(delay, answer.retry_after or 0.0)


class _Kind(enum.Enum):
    """A row of the protocol's table of answers: its meaning for progress and for an ending."""

    TAKEN = (ProgressAnswer.DONE, EndingOutcome.DELIVERED)
    PASSING = (ProgressAnswer.DROPPED, EndingOutcome.RETRY)
    UNAUTHORIZED = (ProgressAnswer.UNAUTHORIZED, EndingOutcome.RETRY_SLOWLY)
    NOT_FOUND = (ProgressAnswer.NOT_FOUND, EndingOutcome.RETRY_A_FEW)
    GONE = (ProgressAnswer.CANCEL, EndingOutcome.DELIVERED)  # the job is no longer wanted
    REFUSED = (ProgressAnswer.REJECTED, EndingOutcome.REJECTED)
    # A web page instead of an application's answer: a login page, a proxy's error page.
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
    if kind is _Kind.TAKEN and _wants("cancel", reply.body):
        return ProgressAnswer.CANCEL
    if kind is _Kind.TAKEN and _wants("pause", reply.body):
        return ProgressAnswer.PAUSE
    return kind.value[0]


def judge_ending(reply: Reply, detail: str) -> EndingAnswer:
    """The answer to an ending, by the protocol's table.

    The answer's status counts even if its body broke off.

    Args:
        reply: The answer.
        detail: The answer in words.
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
    """Seconds of a Retry-After header, in either of its forms; None without a valid one.

    A date is compared with the answer's Date header, so neither clock has to be right.
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


def _wants(what: str, body: bytes) -> bool:
    answer = _json_object(body)
    return answer is not None and answer.get(what) is True


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
