"""What a check found, and what to do about it."""

from __future__ import annotations

import dataclasses
import enum
from datetime import UTC, datetime

# A signature of S3 or of a webhook is refused where the clocks differ by more than this.
LARGEST_SKEW_SECONDS = 300.0
_NOTABLE_SKEW_SECONDS = 30.0


class Verdict(enum.StrEnum):
    """How bad it is: a worker should not be started where something fails."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What, in a word or three.
        verdict: How it is.
        detail: What was seen.
        remedy: What to do; empty where nothing is to be done.
        command: A command line that does it, to be copied whole.
    """

    check: str
    verdict: Verdict
    detail: str
    remedy: str = ""
    command: str = ""


def ok(check: str, detail: str, remedy: str = "", command: str = "") -> Finding:
    """All is well; a remedy is advice then."""
    return Finding(check, Verdict.OK, detail, remedy, command)


def warn(check: str, detail: str, remedy: str = "", command: str = "") -> Finding:
    """A worker would work, but somebody should know."""
    return Finding(check, Verdict.WARN, detail, remedy, command)


def fail(check: str, detail: str, remedy: str = "", command: str = "") -> Finding:
    """A worker would not work, or not as promised."""
    return Finding(check, Verdict.FAIL, detail, remedy, command)


def clock(whose: str, theirs: datetime, asked: datetime, answered: datetime) -> Finding:
    """Compare this machine's clock with another's.

    Args:
        whose: The other one.
        theirs: Its `Date`, in whole seconds.
        asked: This machine's clock before the question.
        answered: And after the answer.
    """
    check = f"clock ({whose})"
    # The date may have been written at any moment in between.
    skew = max((asked - theirs).total_seconds() - 1, (theirs - answered).total_seconds(), 0.0)
    direction = "ahead of" if asked > theirs else "behind"
    remedy = "set this machine's clock by NTP (chrony, systemd-timesyncd; on a VM, the host's)"
    if skew > LARGEST_SKEW_SECONDS:
        return fail(
            check,
            f"{skew:.0f} s {direction} {whose}'s: signatures are refused, or soon will be",
            remedy,
        )
    if skew > _NOTABLE_SKEW_SECONDS:
        return warn(check, f"{skew:.0f} s {direction} {whose}'s", remedy)
    return ok(check, f"within {max(skew, 1):.0f} s of {whose}'s")


def now() -> datetime:
    """This machine's clock."""
    return datetime.now(UTC)
