"""The backend: is it there, is it the right one, does it take our token and signature?"""

from __future__ import annotations

from collections.abc import Callable
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import urlsplit

from cli.doctor.findings import Finding, Verdict, clock, fail, now, ok, warn
from config import Settings
from consumer.worker import open_webhooks
from services.webhooks.answers import Reply
from services.webhooks.webhook_service import PATHS, WebhookService
from utils.errors import ConfigurationError
from utils.settings.groups import LOCAL_HOSTS
from utils.urls import origin_of, shown

_REFUSED = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)
_OTHER_TOKEN = (fail, "it does not accept the token", "INTERNAL_API_TOKEN must be the backend's")
_TOKEN_TAKEN = (ok, "it accepts the token", "")
_BUSY = (warn, "it is busy; nothing is known of the token", "run the doctor again later")
_ELSEWHERE = (
    fail,
    "this is not the route of progress reports",
    f"BACKEND_API_URL must be the address, with its path if it has one, under which "
    f"{PATHS['progress']} is",
)
# What the answer to an empty progress report means: by its exact status, else by its hundred.
_MEANINGS: dict[int, tuple[Callable[[str, str, str], Finding], str, str]] = {
    400: _TOKEN_TAKEN,
    401: _OTHER_TOKEN,
    403: _OTHER_TOKEN,
    408: _BUSY,
    422: _TOKEN_TAKEN,
    425: _BUSY,
    429: _BUSY,
    2: (
        warn,
        "it takes anything, so nothing is known of the token",
        "see that this is the backend, and that it checks the token",
    ),
    3: (
        fail,
        "it sends us elsewhere, and webhooks follow no redirect (the token would go along)",
        "set BACKEND_API_URL to the address that it redirects to",
    ),
    5: (fail, "it is broken", "look at the backend's log, or at that of the proxy before it"),
}


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
    if origin != origin_of(origin) and findings[0].verdict is not Verdict.OK:
        other, _ = webhooks.knock(origin, with_path=False)
        if other.status in (*_REFUSED, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            findings.append(
                fail(
                    f"backend {origin_of(origin)}",
                    f"it answers without the path ({other.status})",
                    f"set BACKEND_API_URL to {origin_of(origin)}",
                )
            )
    try:
        theirs = parsedate_to_datetime(reply.headers.get("date", ""))
        findings.append(clock("the backend", theirs, asked, answered))
    except (ValueError, TypeError):  # no date, or one that cannot be read or has no time zone
        pass
    return findings


def _judge(origin: str, reply: Reply, words: str) -> Finding:
    check = f"backend {origin}"
    status = reply.status
    if status is None:
        return fail(check, f"cannot be reached: {words}", _unreachable(words))
    answer = f"answered {status} to an empty progress report"
    if status in _REFUSED and "signature" in words.lower():
        return fail(
            check,
            f"{answer}: {words}",
            "WEBHOOK_SIGNING_SECRET must be the backend's; unset, both derive it from the token"
            " (docs/protocol.md, section 3)",
        )
    verdict, meaning, remedy = _MEANINGS.get(status) or _MEANINGS.get(status // 100, _ELSEWHERE)
    detail = f"{answer}: {meaning}"
    if verdict is ok:
        return _accepted(check, origin, detail)
    location = reply.headers.get("location", "")
    said = shown(location) if "://" in location else words
    return verdict(check, f"{detail} ({said})" if said else detail, remedy)


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
            "its certificate must be valid, for this name, and of a known authority (a private "
            "one: WEBHOOK_CA_FILE); this machine's clock must be right"
        )
    if "SSL" in words:
        return "the port does not speak TLS: check https or http in BACKEND_API_URL"
    return "check BACKEND_API_URL, the network and the firewall; behind a proxy set WEBHOOK_PROXY"


def _signing(settings: Settings) -> Finding:
    check = "webhook signature"
    count = len(settings.signing_secrets())
    if settings.webhook_signing_secret:
        keys = "one key" if count == 1 else f"{count} keys, each of which signs"
        return ok(check, f"WEBHOOK_SIGNING_SECRET is set: {keys}")
    return ok(check, "the key is derived from the token (WEBHOOK_SIGNING_SECRET is not set)")
