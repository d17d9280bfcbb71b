"""Renders the pages: the templates, their filters, and the headers that confine a page."""

from __future__ import annotations

import datetime
import functools
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Response
from fastapi.responses import HTMLResponse

from api.gate.keys import ADMIN, TRAIN
from api.page.catalogue import NAME, NOTE, Texts, languages
from api.page.visit import Visit
from utils.names import printable
from utils.wording import spoken

_HERE = Path(__file__).parent
STATIC = _HERE / "static"
ASSETS = "/page-assets"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def page(visit: Visit, template: str, **context: Any) -> HTMLResponse:
    """Render a page.

    Args:
        visit: The visitor, whose language and rights the page follows.
        template: A file in `templates/`.
        context: The values that the template shows.
    """
    shared = {
        "t": visit.texts,
        "visit": visit,
        "token": visit.token,
        "languages": [(tag, each.texts[NAME]) for tag, each in languages().items()],
        "note": visit.texts.texts.get(NOTE, ""),
        "may_train": visit.may(TRAIN),
        "may_admin": visit.may(ADMIN),
        "offers_style": "style" in visit.services.kinds.served,
        "offers_llm": "llm" in visit.services.kinds.served,
        "is_open": visit.services.is_open,
        "server_notice": visit.services.settings.api_notice or "",
    }
    text = _environment().get_template(template).render(shared | context)
    return HTMLResponse(text.encode("utf-8", "replace"))


def secured(response: Response) -> Response:
    """Add the headers that confine a page, and keep it out of caches."""
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Cache-Control", "no-store")
    return response


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "moment": _moment,
        "duration": duration,
        "number": _number,
        "size": spoken,
        "line": printable,
        "prose": _prose,
    }
    environment.globals |= {"asset": asset}
    return environment


@functools.cache
def asset(name: str) -> str:
    """Address of a static file; it changes with the file, so that browsers keep it for ever."""
    content = (STATIC / name).read_bytes()
    return f"{ASSETS}/{name}?v={hashlib.sha256(content).hexdigest()[:12]}"


def duration(seconds: float | None, texts: Texts) -> str:
    """A duration in words, to two units."""
    if seconds is None:
        return texts("time.unknown")
    whole = max(0, round(seconds))
    if whole < 60:
        return texts("time.seconds", seconds=whole)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86_400
    if minutes < 60:
        return texts("time.minutes", minutes=minutes, seconds=whole % 60)
    if hours < 48:
        return texts("time.hours", hours=hours, minutes=minutes % 60)
    return texts("time.days", days=days, hours=hours % 24)


def _moment(at: float | None) -> str:
    """A time in UTC; empty for None."""
    if at is None:
        return ""
    return f"{datetime.datetime.fromtimestamp(at, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _prose(text: str) -> str:
    """A text of several lines, without characters that change how a page reads."""
    return " ".join(printable(line) for line in text.splitlines())


def _number(value: float | None) -> str:
    """A measured number with the digits that the database has; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
