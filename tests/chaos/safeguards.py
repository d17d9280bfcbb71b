"""The product's safeguards, and a way to take each of them away in a worker under test.

A suite that passes proves something only if it fails without what it tests. Each of these, with the
faults that the safeguard is there for, must end with broken invariants, and did with seed 1:

    scripts/chaos --without conditional-writes --only "published twice" --faults 12
        jobs with two endings, epochs trained by two workers at once, sequences told twice
    scripts/chaos --without fence --only frozen --faults 8
        training long after the job was taken away, models of a stale claim visible
    scripts/chaos --without confirms --only "queue deleted" --faults 12
        messages that were to go to the dead queue are nowhere
    scripts/chaos --without record-before-ack --only "webhook complete" --faults 10
        jobs with two endings, trained again after the first
"""

# Taking something out means reaching inside.
# pylint: disable=protected-access

from __future__ import annotations

import enum
from typing import Any

from pika.adapters.blocking_connection import BlockingChannel

from services.job_lease import JobLease
from services.lease import Lease
from services.s3_service import S3Service


class Safeguard(enum.StrEnum):
    """What keeps a job from being lost or done twice."""

    CONDITIONAL_WRITES = "conditional-writes"
    FENCE = "fence"
    CONFIRMS = "confirms"
    RECORD_BEFORE_ACK = "record-before-ack"


def remove(which: Safeguard) -> None:
    """Take one away, in this process."""
    match which:
        case Safeguard.CONDITIONAL_WRITES:
            _write_whatever_is_there()
        case Safeguard.FENCE:
            _never_notice_a_lost_lease()
            _publish_over_any_version()
        case Safeguard.CONFIRMS:
            # Nor does the broker's word that it found no queue for a message reach anybody.
            setattr(BlockingChannel, "confirm_delivery", lambda self: None)
        case Safeguard.RECORD_BEFORE_ACK:
            setattr(JobLease, "end", _end_in_memory)


def _write_whatever_is_there() -> None:
    original = S3Service._put

    def put(self: Any, *arguments: Any, **how: Any) -> str:
        conditions = ("IfMatch", "IfNoneMatch")
        kept = {name: value for name, value in how.items() if name not in conditions}
        return original(self, *arguments, **kept)

    setattr(S3Service, "_put", put)


def _never_notice_a_lost_lease() -> None:
    """A claim goes on until one of its own writes of the record is refused."""
    setattr(Lease, "check", lambda self: None)
    setattr(Lease, "_lose", lambda self, reason: None)


def _publish_over_any_version() -> None:
    original = S3Service.upload_file

    def upload(self: Any, *arguments: Any, **how: Any) -> str:
        return original(self, *arguments, **how | {"only_over": None})

    setattr(S3Service, "upload_file", upload)


def _end_in_memory(lease: Any, ending: Any) -> Any:
    """The backend is told of an ending that only this process knows; the record follows later."""
    lease._record = lease._record.ended(ending)
    return lease._record.ending
