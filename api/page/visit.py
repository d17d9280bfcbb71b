"""One request of a visitor of the page."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from fastapi import Depends, Request

from api.gate.keys import Caller
from api.page import sessions
from api.page.catalogue import Texts
from api.services import Services


@dataclasses.dataclass(frozen=True, slots=True)
class Visit:
    """One request of a visitor.

    Attributes:
        services: The services of the application.
        caller: The organisation and the key; None for a visitor who has not signed in.
        session_id: The public id of the session; empty without one.
        cookie: The secret that the visitor's forms are tied to.
        texts: The texts in the visitor's language.
        fields: The fields of the form that was sent.
        here: Address of the page, to come back to in another language.
    """

    services: Services
    caller: Caller | None
    session_id: str
    cookie: str
    texts: Texts
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    here: str = "/jobs"

    @property
    def known(self) -> Caller:
        """The caller of a route that needs a scope."""
        assert self.caller is not None
        return self.caller

    @property
    def token(self) -> str:
        """The token of the visitor's forms."""
        return sessions.form_token(self.services, self.cookie)

    def may(self, scope: str) -> bool:
        """Whether the visitor has a scope."""
        return self.caller is not None and scope in self.caller.scopes


def visit_of(request: Request) -> Visit:
    """The visit of the request."""
    found: Visit = request.state.visit
    return found


Visited = Annotated[Visit, Depends(visit_of)]
