"""API keys for operators: the commands of `main.py api keys`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, update

from api.gate.keys import SCOPES, ensure_organization
from api.life.orders import ORG_ID
from api.services import Services
from api.store.database import Writing, now
from api.store.tables import ApiKeyRow, OrganizationRow
from utils.errors import ConfigurationError

DAY = 86_400.0


def create_key(
    services: Services, org_id: str, name: str, scopes: list[str], days: int | None
) -> str:
    """Create a key of an organisation, which is made if it does not exist. Returns the key.

    Raises:
        ConfigurationError: The organisation or a scope is wrong.
    """
    if not ORG_ID.fullmatch(org_id):
        raise ConfigurationError(f"--org {org_id}: must be 1 to 64 of A-Z, a-z, 0-9, _ and -.")
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise ConfigurationError(f"--scope {unknown[0]}: must be one of {', '.join(SCOPES)}.")

    def act(session: Writing) -> str:
        ensure_organization(session, org_id)
        if session.get_one(OrganizationRow, org_id).deleted_at is not None:
            raise ConfigurationError(f"--org {org_id}: was deleted. Use another id.")
        expires_at = now() + days * DAY if days else None
        return services.keys.create(
            session, org_id, name=name, scopes=scopes, created_by="operator", expires_at=expires_at
        )[1]

    return services.database.write(act)


def list_keys(services: Services, org_id: str | None) -> list[dict[str, Any]]:
    """All keys, or those of an organisation."""
    query = select(ApiKeyRow).order_by(ApiKeyRow.created_at)
    if org_id is not None:
        query = query.where(ApiKeyRow.org_id == org_id)
    with services.database.reading() as session:
        return [shown(row) for row in session.scalars(query)]


def shown(row: ApiKeyRow) -> dict[str, Any]:
    """A key as people see it."""
    times = ("created_at", "last_used_at", "expires_at", "revoked_at")
    return {
        "id": row.id,
        "object": "organization.api_key",
        "organization_id": row.org_id,
        "name": row.name,
        "prefix": row.prefix,
        "scopes": row.scopes,
        **{name: _whole(getattr(row, name)) for name in times},
    }


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def revoke_key(services: Services, key_id: str) -> bool:
    """Revoke a key. Returns whether there was one to revoke."""
    revoked = (
        update(ApiKeyRow)
        .where(ApiKeyRow.id == key_id, ApiKeyRow.revoked_at.is_(None))
        .values(revoked_at=now())
        .returning(ApiKeyRow.id)
    )
    found = services.database.write(lambda session: session.scalar(revoked))
    services.keys.forget()
    return found is not None
