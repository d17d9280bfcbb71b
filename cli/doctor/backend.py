"""Checks of the backend: its address, and whether it accepts the worker's token and signature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import urlsplit

from cli.doctor.findings import Finding, Verdict, clock, fail, now, ok, warn
from config import LOCAL_HOSTS, Settings
from consumer.worker import open_webhooks
from services.webhooks.answers import Reply
from services.webhooks.webhook_service import PATHS, WebhookService
from utils.urls import origin_of, shown

_TOKEN_REFUSED = (fail, "it does not accept the token", "Set INTERNAL_API_TOKEN to the backend's.")
_TOKEN_ACCEPTED = (ok, "it accepts the token", "")
_BUSY = (warn, "it is busy, so the token was not tested", "Run the doctor again later.")
_ELSEWHERE = (
    fail,
    "this is not the route of progress reports",
    f"Set BACKEND_API_URL to the address, with its path if it has one, that has the route "
    f"{PATHS['progress']}.",
)
# The meaning of the answer to an empty progress report, by its status, else by its class.
_MEANINGS: dict[int, tuple[Callable[[str, str, str], Finding], str, str]] = {
    400: _TOKEN_ACCEPTED,
    401: _TOKEN_REFUSED,
    403: _TOKEN_REFUSED,
    408: _BUSY,
    422: _TOKEN_ACCEPTED,
    425: _BUSY,
    429: _BUSY,
    2: (
        warn,
        "it accepts any request, so the token was not tested",
        "Make sure that this is the backend, and that it checks the token.",
    ),
    3: (
        fail,
        "it redirects, and webhooks follow no redirect because it would receive the token",
        "Set BACKEND_API_URL to the address that it redirects to.",
    ),
    5: (fail, "it is broken", "Read the log of the backend, or of the proxy in front of it."),
}


def examine(settings: Settings) -> Iterator[Finding]:
    """Send an empty progress report to each origin, and report how webhooks are signed."""
    webhooks = open_webhooks(settings)
    for base in dict.fromkeys((settings.backend_api_url, *settings.webhook_allowed_origins)):
        yield from _visit(webhooks, base)
    keys = len(settings.signing_secrets())
    detail = "WEBHOOK_SIGNING_SECRET is not set; the key is derived from the token."
    if settings.webhook_signing_secret:
        signs = "one key signs" if keys == 1 else f"{keys} keys sign"
        detail = f"WEBHOOK_SIGNING_SECRET is set; {signs} each webhook."
    yield ok("webhook signature", detail)


def _visit(webhooks: WebhookService, base: str) -> Iterator[Finding]:
    asked = now()
    reply, words = webhooks.knock(base)
    answered = now()
    yield (finding := _judge(f"backend {base}", base, reply, words))
    origin = origin_of(base)
    if base != origin and finding.verdict is not Verdict.OK:
        status = webhooks.knock(base, with_path=False)[0].status
        if status in (400, 401, 403, 422):
            detail = f"It answers {status} without the path."
            yield fail(f"backend {origin}", detail, f"Set BACKEND_API_URL to {origin}.")
    try:
        theirs = parsedate_to_datetime(reply.headers.get("date", ""))
        yield clock("the backend", theirs, asked, answered)
    except (ValueError, TypeError):  # no date, an unreadable date, or one without a time zone
        pass


def _judge(check: str, base: str, reply: Reply, words: str) -> Finding:
    status = reply.status
    if status is None:
        return fail(check, f"It cannot be reached: {words}", _unreachable(words))
    answer = f"It answered {status} to an empty progress report"
    if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY):
        if "signature" in words.lower():
            return fail(
                check,
                f"{answer}: {words}",
                "Set WEBHOOK_SIGNING_SECRET to the backend's. If it is unset, both sides derive it "
                "from the token (docs/protocol.md, section 3).",
            )
        if urlsplit(base).scheme == "http" and urlsplit(base).hostname not in LOCAL_HOSTS:
            return warn(
                check,
                f"{answer}: it accepts the token, but the network can read it in plain http.",
                "Use https. ALLOW_INSECURE_WEBHOOKS=true is for private networks.",
            )
    verdict, meaning, remedy = _MEANINGS.get(status) or _MEANINGS.get(status // 100, _ELSEWHERE)
    location = reply.headers.get("location", "")
    said = shown(location) if "://" in location else words
    detail = f"{answer}: {meaning}"
    return verdict(check, f"{detail} ({said})." if said and remedy else f"{detail}.", remedy)


def _unreachable(words: str) -> str:
    if "certificate" in words.lower():
        return (
            "The certificate must be valid for this name and from a known authority. Set "
            "WEBHOOK_CA_FILE for a private authority, and check this machine's clock."
        )
    if "SSL" in words:
        return "The port does not speak TLS. Check https or http in BACKEND_API_URL."
    return "Check BACKEND_API_URL, the network and the firewall. Set WEBHOOK_PROXY for a proxy."
