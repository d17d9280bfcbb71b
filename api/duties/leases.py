"""Duties that one process does at a time: its lease is a row in the database."""

from __future__ import annotations

from sqlalchemy import select

from api.services import Services
from api.store.database import Writing, now
from api.store.tables import LeaseRow

LEASE_SECONDS = 15.0


def hold_lease(services: Services, name: str, owner: str) -> bool:
    """Take or keep the lease of a duty. Returns whether it is ours."""
    at = now()

    def take(session: Writing) -> bool:
        row = session.scalar(select(LeaseRow).where(LeaseRow.name == name).with_for_update())
        if row is None:
            session.add(LeaseRow(name=name, owner=owner, until=at + LEASE_SECONDS))
            return True
        if row.owner != owner and row.until > at:
            return False
        if row.owner != owner or row.until < at + LEASE_SECONDS / 2:
            row.owner, row.until = owner, at + LEASE_SECONDS
        return True

    with services.database.reading() as session:
        row = session.get(LeaseRow, name)
        if row is not None:
            if row.owner == owner and row.until > at + LEASE_SECONDS / 2:
                return True
            if row.owner != owner and row.until > at:
                return False
    return services.database.write(take)
