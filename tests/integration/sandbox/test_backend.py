"""The stand-in backend keeps the contract; otherwise tests with it would prove nothing."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import requests
from standardwebhooks import Webhook

from sandbox.backend import PROGRESS, SIGNING_SECRET, TOKEN, Backend
from tests.integration.services.webhook_setup import REPORT


def patch(
    backend: Backend, changes: dict[str, str | None], body: bytes = b"{}"
) -> requests.Response:
    """A well-formed request, but for some headers."""
    now = datetime.now(UTC)
    headers: dict[str, str | None] = {
        "Authorization": f"Bearer {TOKEN}",
        "X-Request-Source": "training-server",
        "Content-Type": "application/json",
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(SIGNING_SECRET).sign("msg_1", now, body.decode()),
    }
    given = {name: value for name, value in (headers | changes).items() if value is not None}
    return requests.patch(backend.url + PROGRESS, data=body, headers=given, timeout=5)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Authorization": None}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"X-Request-Source": "somebody"}, 400),
        ({"Content-Type": "text/plain"}, 400),
        ({"webhook-signature": None}, 400),
        ({"webhook-signature": "v1,AAAA"}, 400),
        ({"webhook-signature": "garbage"}, 400),
        ({"webhook-id": "msg_2"}, 400),
        ({"webhook-timestamp": "1"}, 400),
        ({"webhook-timestamp": "soon"}, 400),
    ],
)
def test_the_stand_in_refuses_and_keeps_requests_that_break_the_contract(
    backend: Backend, changes: dict[str, str | None], status: int
) -> None:
    assert patch(backend, changes).status_code == status
    assert [request.status for request in backend.rejected] == [status]
    assert not backend.requests


def test_the_stand_in_accepts_requests_that_keep_the_contract_and_reports_them(
    backend: Backend,
) -> None:
    heard: list[Any] = []
    with Backend(on_request=heard.append) as telling:
        assert patch(telling, {}, json.dumps(REPORT).encode()).status_code == 200
    assert [request.body for request in heard] == [REPORT]
    assert patch(backend, {}).status_code == 400  # a body of {} has no style
    with pytest.raises(TimeoutError, match="no ending of t"):
        backend.wait_for_ending("t", timeout=0.01)
