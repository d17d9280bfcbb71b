"""The doctor and a backend: the meaning of each answer to an empty progress report."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from cli.doctor import backend as examination
from cli.doctor.findings import Finding, Verdict
from sandbox.backend import SIGNING_SECRET, TOKEN, Answer, Backend
from utils.settings.groups import WebhookSettings

OTHER_SECRET = "whsec_YW5vdGhlci1zaWduaW5nLXNlY3JldC0wMTIzNDU2Nzg5"


def _examine(url: str, **values: Any) -> dict[str, Finding]:
    """The doctor's findings, by check."""
    settings = WebhookSettings(
        **{
            "backend_api_url": url,
            "internal_api_token": TOKEN,
            "webhook_signing_secret": SIGNING_SECRET,
        }
        | values,
    )
    return {each.check: each for each in examination.examine(settings)}


def test_a_correct_backend_refuses_the_empty_report_and_the_check_succeeds(
    backend: Backend,
) -> None:
    finding = _examine(backend.url)[f"backend {backend.url}"]
    assert (finding.verdict, finding.remedy) == (Verdict.OK, "")
    assert "answered 400" in finding.detail and "accepts the token" in finding.detail
    assert [(each.method, each.body) for each in backend.requests] == [("PATCH", {})]


def test_a_wrong_token_names_its_setting(backend: Backend) -> None:
    finding = _examine(backend.url, internal_api_token="w" * 40)[f"backend {backend.url}"]
    assert finding.verdict is Verdict.FAIL
    assert "answered 401" in finding.detail
    assert "INTERNAL_API_TOKEN" in finding.remedy
    assert "w" * 40 not in finding.detail


def test_a_wrong_signature_names_its_setting(backend: Backend) -> None:
    finding = _examine(backend.url, webhook_signing_secret=OTHER_SECRET)[f"backend {backend.url}"]
    assert finding.verdict is Verdict.FAIL
    assert "WEBHOOK_SIGNING_SECRET" in finding.remedy


def test_a_backend_that_is_down_names_its_setting() -> None:
    finding = _examine("http://127.0.0.1:1")["backend http://127.0.0.1:1"]
    assert finding.verdict is Verdict.FAIL
    assert "refused" in finding.detail
    assert "BACKEND_API_URL" in finding.remedy


def test_a_backend_without_tls_behind_an_https_address_is_distinguished_from_one_that_is_down(
    backend: Backend,
) -> None:
    url = backend.url.replace("http://", "https://")
    finding = _examine(url)[f"backend {url}"]
    assert finding.verdict is Verdict.FAIL
    assert "does not speak TLS" in finding.remedy


@pytest.mark.parametrize(
    ("status", "verdict", "says"),
    [
        (200, Verdict.WARN, "the token was not tested"),
        (302, Verdict.FAIL, "redirects"),
        (403, Verdict.FAIL, "does not accept the token"),
        (404, Verdict.FAIL, "not the route"),
        (410, Verdict.FAIL, "not the route"),
        (422, Verdict.OK, "accepts the token"),
        (429, Verdict.WARN, "busy"),
        (503, Verdict.FAIL, "broken"),
    ],
)
def test_every_answer_has_a_meaning(
    backend: Backend, status: int, verdict: Verdict, says: str
) -> None:
    backend.answer = lambda _: Answer(status, body=b"")
    finding = _examine(backend.url)[f"backend {backend.url}"]
    assert finding.verdict is verdict
    assert f"answered {status}" in finding.detail and says in finding.detail
    assert bool(finding.remedy) is (verdict is not Verdict.OK)


def test_a_redirect_is_reported_with_its_target_but_without_its_secrets(backend: Backend) -> None:
    location = "https://user:password@api.example/path?token=hidden"
    backend.answer = lambda _: Answer(308, headers={"Location": location})
    finding = _examine(backend.url)[f"backend {backend.url}"]
    assert "https://api.example" in finding.detail
    assert "password" not in finding.detail and "hidden" not in finding.detail
    assert "BACKEND_API_URL" in finding.remedy


def test_the_clock_is_compared_with_that_of_the_backend(backend: Backend) -> None:
    late = format_datetime(datetime.now(UTC) - timedelta(minutes=20), usegmt=True)
    backend.answer = lambda _: Answer(400, headers={"Date": late})
    finding = _examine(backend.url)["clock (the backend)"]
    assert finding.verdict is Verdict.FAIL
    assert "ahead of" in finding.detail and "NTP" in finding.remedy


def test_each_origin_that_webhooks_may_go_to_is_visited(backend: Backend) -> None:
    with Backend() as other:
        found = _examine(backend.url, webhook_allowed_origins=other.url)
    assert {f"backend {backend.url}", f"backend {other.url}"} < set(found)


def test_the_key_that_signs_webhooks_is_reported(backend: Backend) -> None:
    two = f"{SIGNING_SECRET},{OTHER_SECRET}"
    for secret, says in ((SIGNING_SECRET, "one key"), (two, "2 keys"), (None, "derived")):
        signature = _examine(backend.url, webhook_signing_secret=secret)["webhook signature"]
        assert says in signature.detail
