"""When a job was ordered: of two orders of a subject the later one's model stays."""

from __future__ import annotations

import datetime


def order_time(ordered_at: str, created_at: str) -> datetime.datetime:
    """The instant of an order. No order is later than its record.

    A publisher's clock that runs ahead must not keep every later model out of the folder.
    """
    created = instant(created_at) or datetime.datetime.now(datetime.UTC)
    ordered = instant(ordered_at)
    return min(ordered, created) if ordered else created


def instant(text: str | None) -> datetime.datetime | None:
    """An ISO time as an instant, in UTC unless it names a zone; None if it cannot be read."""
    try:
        time = datetime.datetime.fromisoformat(text or "")
        zoned = time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
        return zoned.astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        return None
