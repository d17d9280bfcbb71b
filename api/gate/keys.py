"""API keys: made at random, stored as a hash, checked with each request."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import secrets
import threading
import time

from sqlalchemy import or_, select, update

from api.store.database import Database, Writing, now
from api.store.tables import ApiKeyRow, OrganizationRow

ADMIN, TRAIN, INFER, READ = "admin", "train", "infer", "read"
SCOPES = (ADMIN, TRAIN, INFER, READ)
IMPLIED = {ADMIN: set(SCOPES), TRAIN: {TRAIN, READ}, INFER: {INFER, READ}, READ: {READ}}
"""The scopes that each scope brings with it."""

DEFAULT_ORG = "org_default"
OPEN_KEY = "key_open"
_REMEMBER_SECONDS = 1.0
_REMEMBERED = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """The maker of a request.

    Attributes:
        org_id: The organisation that everything is filtered by.
        key_id: The API key; `OPEN_KEY` on a server without keys.
        scopes: The scopes of the key, implied ones included.
    """

    org_id: str
    key_id: str
    scopes: frozenset[str]


def new_id(prefix: str) -> str:
    """A random id of 96 bits."""
    return f"{prefix}{secrets.token_hex(12)}"


class Keyring:
    """Makes and checks API keys.

    A key that was found is remembered for a second, so a revocation reaches other processes after
    a second at most.

    Args:
        database: The database.
        pepper: The secret of the hashes.
    """

    def __init__(self, database: Database, pepper: bytes) -> None:
        self._database = database
        self._pepper = pepper
        self._known: dict[str, tuple[float, Caller]] = {}
        self._lock = threading.Lock()

    def hash_of(self, secret: str) -> str:
        """The hash of a key. The secret has 256 bits, so a fast hash suffices."""
        return hmac.new(self._pepper, secret.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def webhook_secret(self, endpoint_id: str, version: int) -> str:
        """The secret that signs the webhooks of an endpoint. It is derived, so no table has it."""
        text = f"webhook endpoint {endpoint_id} {version}"
        digest = hmac.new(self._pepper, text.encode(), hashlib.sha256).digest()
        return "whsec_" + base64.b64encode(digest).decode()

    def create(
        self,
        session: Writing,
        org_id: str,
        *,
        name: str,
        scopes: list[str],
        created_by: str | None = None,
        expires_at: float | None = None,
    ) -> tuple[ApiKeyRow, str]:
        """Add a key to a transaction.

        Returns:
            The row and the key itself, which nothing can show again.
        """
        secret = f"sk-{secrets.token_urlsafe(32)}"
        row = ApiKeyRow(
            id=new_id("key_"),
            org_id=org_id,
            prefix=secret[:8],
            hash=self.hash_of(secret),
            name=name,
            scopes=scopes,
            created_by=created_by,
            created_at=now(),
            expires_at=expires_at,
        )
        session.add(row)
        return row, secret

    def caller(self, secret: str) -> Caller | None:
        """Whose key this is; None for an unknown, expired or revoked key."""
        hashed = self.hash_of(secret)
        with self._lock:
            until, caller = self._known.get(hashed, (0.0, None))
        if caller and until > time.monotonic():
            return caller
        caller = self._look_up(hashed)
        with self._lock:
            self._known.pop(hashed, None)
            if caller:
                self._known[hashed] = (time.monotonic() + _REMEMBER_SECONDS, caller)
            while len(self._known) > _REMEMBERED:
                self._known.pop(next(iter(self._known)))
        return caller

    def forget(self) -> None:
        """Look up every key again, after one was revoked."""
        with self._lock:
            self._known.clear()

    def _look_up(self, hashed: str) -> Caller | None:
        at = now()
        with self._database.reading() as session:
            row = session.scalar(
                select(ApiKeyRow)
                .join(OrganizationRow, OrganizationRow.id == ApiKeyRow.org_id)
                .where(
                    ApiKeyRow.hash == hashed,
                    ApiKeyRow.revoked_at.is_(None),
                    or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > at),
                    OrganizationRow.deleted_at.is_(None),
                )
            )
        if row is None:
            return None
        if (row.last_used_at or 0.0) < at - 60:
            used = update(ApiKeyRow).where(ApiKeyRow.id == row.id).values(last_used_at=at)
            self._database.write(lambda session: session.execute(used))
        scopes = frozenset().union(*(IMPLIED.get(scope, set()) for scope in row.scopes))
        return Caller(row.org_id, row.id, scopes)


def ensure_organization(session: Writing, org_id: str, name: str = "") -> None:
    """Add an organisation unless it exists."""
    if session.get(OrganizationRow, org_id) is None:
        session.add(
            OrganizationRow(
                id=org_id,
                name=name or org_id,
                created_at=now(),
                limits={},
                last_turn_at=0.0,
            )
        )
        session.flush()
