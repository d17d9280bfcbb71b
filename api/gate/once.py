"""Requests that create something are done once, however often they are sent.

The answer is kept in the transaction that creates the thing, so a server that dies in between
leaves neither. A repetition is known by its `Idempotency-Key`; OpenAI's client sends none, but
counts its retries in `x-stainless-retry-count`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from fastapi import Request
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from api.gate.keys import Caller
from api.gate.problems import Problem
from api.store.database import Writing, now
from api.store.tables import AnswerRow

KEPT_SECONDS = 86_400.0
RETRY_SECONDS = 900.0


@dataclasses.dataclass(frozen=True, slots=True)
class Once:
    """The marks by which a repeated request is recognised.

    Attributes:
        caller: Its caller.
        key: Its idempotency key, if it has one.
        request_hash: Hash of its method, path and body.
        is_retry: The client marks it as sent before.
    """

    caller: Caller
    key: str | None
    request_hash: str
    is_retry: bool

    @classmethod
    def of(cls, request: Request, caller: Caller, body: bytes) -> Once:
        """The marks of a request."""
        digest = hashlib.sha256(f"{request.method} {request.url.path}\n".encode())
        digest.update(body)
        count = request.headers.get("x-stainless-retry-count", "0")
        return cls(
            caller=caller,
            key=request.headers.get("idempotency-key") or None,
            request_hash=digest.hexdigest(),
            is_retry=count.isascii() and count.isdigit() and int(count[:6]) > 0,
        )

    def answer(self, session: Session) -> dict[str, Any] | None:
        """The answer that the same request got before; None for a new request.

        Raises:
            Problem: The key belongs to another request.
        """
        query = select(AnswerRow).where(AnswerRow.org_id == self.caller.org_id)
        if self.key is not None:
            row = session.scalar(
                query.where(AnswerRow.key == self.key, AnswerRow.created_at > now() - KEPT_SECONDS)
            )
            if row and row.request_hash != self.request_hash:
                raise Problem(
                    "idempotency_key_reused",
                    "The header Idempotency-Key has a value that another request was sent with. "
                    "Use a new key for a new request.",
                    param="idempotency-key",
                )
            return row.body if row else None
        if not self.is_retry:
            return None
        row = session.scalar(
            query.where(
                AnswerRow.api_key_id == self.caller.key_id,
                AnswerRow.request_hash == self.request_hash,
                AnswerRow.created_at > now() - RETRY_SECONDS,
            )
            .order_by(AnswerRow.id.desc())
            .limit(1)
        )
        return row.body if row else None

    def keep(self, session: Writing, body: dict[str, Any]) -> None:
        """Keep the answer, in the transaction that creates the thing.

        A request that was sent twice at once fails here with a unique row; `Database.write` repeats
        it, and then `answer` finds the first one's answer.
        """
        if self.key is not None:
            session.execute(
                delete(AnswerRow).where(
                    AnswerRow.org_id == self.caller.org_id,
                    AnswerRow.key == self.key,
                    AnswerRow.created_at <= now() - KEPT_SECONDS,
                )
            )
        session.add(
            AnswerRow(
                org_id=self.caller.org_id,
                api_key_id=self.caller.key_id,
                key=self.key,
                request_hash=self.request_hash,
                body=body,
                created_at=now(),
            )
        )
        session.flush()


def forget_old(session: Writing) -> None:
    """Delete answers that are no longer kept."""
    session.execute(delete(AnswerRow).where(AnswerRow.created_at <= now() - KEPT_SECONDS))
