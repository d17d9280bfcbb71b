"""A finding of the doctor: what was tested, the result and the remedy."""

from __future__ import annotations

import dataclasses
import enum
import functools
from datetime import UTC, datetime

# S3 and the backend refuse a signature if the clocks differ by more than this.
LARGEST_SKEW_SECONDS = 300.0
_NOTABLE_SKEW_SECONDS = 30.0
_SET_CLOCK = "Set this machine's clock by NTP (chrony, systemd-timesyncd; on a VM, the host's)."


class Verdict(enum.StrEnum):
    """`warn`: a worker would run, but a person should read this. `fail`: it would not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """The result of one test.

    Attributes:
        detail: What was seen, in a sentence.
        remedy: What to do. Advice if the verdict is `ok`.
        command: A command line that applies the remedy.
    """

    verdict: Verdict
    check: str
    detail: str
    remedy: str = ""
    command: str = ""


ok = functools.partial(Finding, Verdict.OK)
warn = functools.partial(Finding, Verdict.WARN)
fail = functools.partial(Finding, Verdict.FAIL)


def clock(other: str, theirs: datetime, asked: datetime, answered: datetime) -> Finding:
    """Compare this machine's clock with the `Date` header, in whole seconds, of an answer.

    Args:
        other: The machine that answered.
        theirs: Its `Date`.
        asked: This machine's clock before the request.
        answered: This machine's clock after the answer.
    """
    # The date may have been written at any moment between request and answer.
    skew = max((asked - theirs).total_seconds() - 1, (theirs - answered).total_seconds(), 0.0)
    check = f"clock ({other})"
    if skew <= _NOTABLE_SKEW_SECONDS:
        return ok(check, f"This machine's clock is within {max(skew, 1):.0f} s of {other}'s.")
    direction = "ahead of" if asked > theirs else "behind"
    detail = f"This machine's clock is {skew:.0f} s {direction} {other}'s."
    if skew <= LARGEST_SKEW_SECONDS:
        return warn(check, detail, _SET_CLOCK)
    return fail(check, f"{detail} Signatures are refused.", _SET_CLOCK)


def now() -> datetime:
    """This machine's clock."""
    return datetime.now(UTC)
