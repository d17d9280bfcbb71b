"""Sessions of the web page: a random cookie, whose hash is in the database.

A session lives as long as the API key that began it: it ends if the key is revoked or expires, if
the person signs out, or after `LIFETIME_SECONDS`. Signing in always makes a new cookie, so a cookie
that someone else has planted is worth nothing.
"""

from __future__ import annotations

import dataclasses
import hmac
import re
import secrets
from typing import Any

from sqlalchemy import or_, select, update

from api.gate.keys import IMPLIED, Caller, new_id
from api.services import Services
from api.store.database import Writing, now
from api.store.tables import ApiKeyRow, OrganizationRow, PageSessionRow

LIFETIME_SECONDS = 14 * 86_400.0
_NOTED_EVERY_SECONDS = 60.0
_COOKIE = re.compile(r"[A-Za-z0-9_-]{43}")
_MAX_BROWSER = 200


@dataclasses.dataclass(frozen=True, slots=True)
class PageSession:
    """A session that is valid now.

    Attributes:
        caller: The organisation and the key that it acts for.
        public_id: Its id in the list of sessions.
    """

    caller: Caller
    public_id: str


def begin(services: Services, caller: Caller, browser: str) -> str:
    """Begin a session. Returns the cookie, which nothing can show again."""
    cookie = new_cookie()

    def act(session: Writing) -> None:
        session.add(
            PageSessionRow(
                id=_hash(services, cookie),
                public_id=new_id("sess_"),
                org_id=caller.org_id,
                api_key_id=caller.key_id,
                browser=browser[:_MAX_BROWSER],
                created_at=now(),
                used_at=now(),
                expires_at=now() + LIFETIME_SECONDS,
            )
        )

    services.database.write(act)
    return cookie


def new_cookie() -> str:
    """A random cookie of 256 bits."""
    return secrets.token_urlsafe(32)


def find(services: Services, cookie: str) -> PageSession | None:
    """The session of a cookie; None if there is none that is valid."""
    if not _COOKIE.fullmatch(cookie):
        return None
    hashed, at = _hash(services, cookie), now()
    query = (
        select(PageSessionRow, ApiKeyRow.scopes)
        .join(ApiKeyRow, ApiKeyRow.id == PageSessionRow.api_key_id)
        .join(OrganizationRow, OrganizationRow.id == PageSessionRow.org_id)
        .where(
            PageSessionRow.id == hashed,
            PageSessionRow.revoked_at.is_(None),
            PageSessionRow.expires_at > at,
            ApiKeyRow.revoked_at.is_(None),
            or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > at),
            OrganizationRow.deleted_at.is_(None),
        )
    )
    with services.database.reading() as session:
        found = session.execute(query).first()
    if found is None:
        return None
    row, names = found
    if row.used_at < at - _NOTED_EVERY_SECONDS:
        used = update(PageSessionRow).where(PageSessionRow.id == hashed).values(used_at=at)
        services.database.write(lambda session: session.execute(used))
    scopes: frozenset[str] = frozenset().union(*(IMPLIED.get(name, set()) for name in names))
    return PageSession(Caller(row.org_id, row.api_key_id, scopes), row.public_id)


def end(services: Services, cookie: str) -> None:
    """End the session of a cookie, if there is one."""
    _revoke(services, PageSessionRow.id == _hash(services, cookie))


def revoke(services: Services, org_id: str, public_id: str) -> None:
    """End a session of an organisation."""
    _revoke(services, PageSessionRow.public_id == public_id, PageSessionRow.org_id == org_id)


def listed(services: Services, org_id: str) -> list[PageSessionRow]:
    """The valid sessions of an organisation, the newest first."""
    query = (
        select(PageSessionRow)
        .where(
            PageSessionRow.org_id == org_id,
            PageSessionRow.revoked_at.is_(None),
            PageSessionRow.expires_at > now(),
        )
        .order_by(PageSessionRow.created_at.desc())
        .limit(100)
    )
    with services.database.reading() as session:
        return list(session.scalars(query))


def form_token(services: Services, cookie: str) -> str:
    """The token that every form of a visitor carries. Another site cannot know it."""
    return services.keys.hash_of(f"form of {cookie}")


def is_form_token(services: Services, cookie: str, given: str) -> bool:
    """Whether a form came from a page of this visitor."""
    expected = form_token(services, cookie)
    return hmac.compare_digest(expected.encode(), given.encode("utf-8", "replace"))


def _revoke(services: Services, *conditions: Any) -> None:
    query = (
        update(PageSessionRow)
        .where(PageSessionRow.revoked_at.is_(None), *conditions)
        .values(revoked_at=now())
    )
    services.database.write(lambda session: session.execute(query))


def _hash(services: Services, cookie: str) -> str:
    return services.keys.hash_of(f"session {cookie}")
