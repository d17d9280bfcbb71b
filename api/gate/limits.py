"""Rate limits and quotas.

Requests are counted per key in this process. Requests that create something are counted per
organisation in the database, so that the limit holds over all processes.
"""

from __future__ import annotations

import math
import threading
import time

from sqlalchemy import func, select

from api.gate.problems import Problem
from api.store.database import Writing, now
from api.store.tables import BucketRow, FileRow, OrganizationRow

_REMEMBERED = 10_000


class Rates:
    """Token buckets in memory, one per key: a minute's worth of tokens, refilled steadily.

    Args:
        per_minute: Requests per minute.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def request(self, key_id: str) -> None:
        """Take one token.

        Raises:
            Problem: There is none.
        """
        at = time.monotonic()
        with self._lock:
            tokens, filled = self._buckets.pop(key_id, (float(self._per_minute), at))
            tokens = min(self._per_minute, tokens + (at - filled) * self._per_minute / 60)
            taken = tokens >= 1
            self._buckets[key_id] = (tokens - 1 if taken else tokens, at)
            while len(self._buckets) > _REMEMBERED:
                self._buckets.pop(next(iter(self._buckets)))
        if not taken:
            raise too_fast(self._per_minute, (1 - tokens) * 60 / self._per_minute)


def too_fast(per_minute: int, seconds: float) -> Problem:
    """The problem of a limit that was reached; `seconds` until the next request is accepted."""
    wait = max(1, math.ceil(seconds))
    return Problem(
        "rate_limited",
        f"At most {per_minute} such requests are accepted per minute. Wait {wait} s.",
        headers={
            "Retry-After": str(wait),
            "RateLimit-Policy": f'"default";q={per_minute};w=60',
            "RateLimit": f'"default";r=0;t={wait}',
        },
    )


def take_create(session: Writing, org_id: str, per_minute: int) -> None:
    """Take a token of an organisation for creating something.

    Raises:
        Problem: There is none.
    """
    name, at = f"create:{org_id}", now()
    row = session.scalar(select(BucketRow).where(BucketRow.name == name).with_for_update())
    if row is None:
        row = BucketRow(name=name, tokens=float(per_minute), filled_at=at)
        session.add(row)
    tokens = min(per_minute, row.tokens + max(0.0, at - row.filled_at) * per_minute / 60)
    if tokens < 1:
        raise too_fast(per_minute, (1 - tokens) * 60 / per_minute)
    row.tokens, row.filled_at = tokens - 1, at
    session.flush()


def limit_of(session: Writing, org_id: str, name: str, default: int) -> int:
    """An organisation's own limit, or the server's."""
    row = session.get(OrganizationRow, org_id)
    value = row.limits.get(name) if row else None
    return value if isinstance(value, int) else default


def require_room(session: Writing, org_id: str, more: int, most: int) -> None:
    """Check that an organisation may store more bytes.

    Raises:
        Problem: Its quota does not have the room.
    """
    stored = session.scalar(
        select(func.coalesce(func.sum(FileRow.bytes), 0)).where(
            FileRow.org_id == org_id, FileRow.deleted_at.is_(None)
        )
    )
    if int(stored or 0) + more > most:
        raise Problem(
            "storage_full",
            f"The organisation's files have {int(stored or 0):,} of at most {most:,} bytes, and "
            f"this needs {more:,} more. Delete files that are no longer needed.",
        )
