"""The kinds of job of other services: our kind for each, or the answer while there is none."""

from __future__ import annotations

import dataclasses
from typing import Any

from sqlalchemy import select

from api.gate.keys import OPEN_KEY, Caller, ensure_organization
from api.gate.problems import Problem
from api.life.orders import ORG_ID
from api.services import Services
from api.store.tables import JobRow

CHAT, VISION, DATA, EXPORT, EVALUATION = "llm", "vlm", "dataset", "export", "evaluation"


def require(services: Services, kind: str, what: str) -> None:
    """Refuse a request whose kind of job this server does not do.

    Raises:
        Problem: The kind is not registered.
    """
    if kind not in services.kinds.served:
        raise not_offered(kind, what)


def not_offered(kind: str, what: str) -> Problem:
    """The problem of a kind that is not registered."""
    return Problem(
        "kind_not_offered", f"{what} needs jobs of the kind {kind}, which this server does not do."
    )


def parameters_of(services: Services, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The given parameters that the kind knows."""
    known = services.kinds.of(kind).parameters_type
    names = {field.name for field in dataclasses.fields(known)} if known else set()
    return {name: value for name, value in given.items() if name in names and value is not None}


def of_organization(services: Services, caller: Caller, org_id: str) -> Caller:
    """The caller, if the organisation is theirs; on an open server, any organisation.

    Raises:
        Problem: The organisation is another one.
    """
    if org_id == caller.org_id:
        return caller
    if caller.key_id != OPEN_KEY:
        raise Problem(
            "organization_mismatch",
            f"org_id: the API key belongs to the organisation {caller.org_id}.",
            param="org_id",
        )
    if not ORG_ID.fullmatch(org_id):
        raise Problem(
            "invalid_parameter",
            "org_id: must be 1 to 64 of A-Z, a-z, 0-9, _ and -.",
            param="org_id",
        )
    services.database.write(lambda session: ensure_organization(session, org_id))
    return dataclasses.replace(caller, org_id=org_id)


def of_job(services: Services, caller: Caller, job_id: str) -> Caller:
    """The caller; on an open server, the organisation of the job.

    The dialect's requests about one job do not name its organisation.
    """
    if caller.key_id != OPEN_KEY:
        return caller
    with services.database.reading() as session:
        org_id = session.scalar(select(JobRow.org_id).where(JobRow.id == job_id))
    return dataclasses.replace(caller, org_id=org_id or caller.org_id)
