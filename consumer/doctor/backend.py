"""The backend: is it there, is it the right one, does it take our token and signature?"""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import urlsplit

from config import LOCAL_HOSTS, Settings
from consumer.desk import open_webhooks
from consumer.doctor.findings import Finding, clock, fail, now, ok, warn
from services.webhook_answers import Reply
from services.webhook_service import WebhookService
from utils.errors import ConfigurationError
from utils.urls import shown

_REFUSED = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)
_BUSY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


def examine(settings: Settings) -> list[Finding]:
    """Every origin that webhooks may go to, and the key that signs them."""
    try:
        webhooks = open_webhooks(settings)
    except ConfigurationError as error:
        return [fail("backend", str(error))]
    findings: list[Finding] = []
    origins = dict.fromkeys((settings.backend_api_url, *settings.webhook_allowed_origins))
    for origin in origins:
        findings += _visit(webhooks, origin)
    return [*findings, _signing(settings)]


def _visit(webhooks: WebhookService, origin: str) -> list[Finding]:
    asked = now()
    reply, words = webhooks.knock(origin)
    answered = now()
    findings = [_judge(origin, reply, words)]
    try:
        theirs = parsedate_to_datetime(reply.headers.get("date", ""))
        findings.append(clock("the backend", theirs, asked, answered))
    except (ValueError, TypeError):  # no date, or one that cannot be read or has no time zone
        pass
    return findings


def _judge(origin: str, reply: Reply, words: str) -> Finding:
    check = f"backend {origin}"
    status = reply.status
    answer = f"answered {status} to an empty progress report"
    if status is None:
        return fail(check, f"cannot be reached: {words}", _unreachable(words))
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return fail(
            check,
            f"{answer}: it does not accept the token ({words})",
            "INTERNAL_API_TOKEN must be the backend's",
        )
    if status in _REFUSED:
        if "signature" in words.lower():
            return fail(
                check,
                f"{answer}: {words}",
                "WEBHOOK_SIGNING_SECRET must be the backend's; unset, both derive it from the token"
                " (docs/protocol.md, section 3)",
            )
        return _accepted(check, origin, f"{answer}, as it should: the token is accepted")
    if 200 <= status < 300:
        return warn(
            check,
            f"{answer}: it takes anything, so nothing is known of the token",
            "see that this is the backend, and that it checks the token",
        )
    if 300 <= status < 400:
        where = reply.headers.get("location", "")
        return fail(
            check,
            f"{answer}: it redirects to {shown(where) if '://' in where else 'another path'}, and "
            "webhooks follow no redirect (the token would go along)",
            "set BACKEND_API_URL to the address that it redirects to",
        )
    if status in _BUSY:
        return warn(check, f"{answer}: it is busy; nothing is known of the token", "try again")
    if status >= 500:
        return fail(check, f"{answer}: {words}", "the backend, or a proxy before it, is broken")
    return fail(
        check,
        f"{answer}: {words}",
        "BACKEND_API_URL must be the origin under which /api/webhooks/training/progress lies",
    )


def _accepted(check: str, origin: str, detail: str) -> Finding:
    parts = urlsplit(origin)
    if parts.scheme == "http" and parts.hostname not in LOCAL_HOSTS:
        return warn(
            check,
            f"{detail}; but over plain http the network sees it",
            "use https; ALLOW_INSECURE_WEBHOOKS=true is for private networks",
        )
    return ok(check, detail)


def _unreachable(words: str) -> str:
    if "certificate" in words.lower():
        return (
            "its certificate must be valid, for this name, and of a known authority; this machine's"
            " clock must be right"
        )
    if "SSL" in words:
        return "the port does not speak TLS: check https or http in BACKEND_API_URL"
    return "check BACKEND_API_URL, the network and the firewall; a proxy is not used"


def _signing(settings: Settings) -> Finding:
    check = "webhook signature"
    count = len(settings.signing_secrets())
    if settings.webhook_signing_secret:
        keys = "one key" if count == 1 else f"{count} keys, each of which signs"
        return ok(check, f"WEBHOOK_SIGNING_SECRET is set: {keys}")
    return ok(check, "the key is derived from the token (WEBHOOK_SIGNING_SECRET is not set)")
