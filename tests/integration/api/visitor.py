"""A visitor of the web page, as a browser without scripts: cookies, forms and links."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from typing import Any

import httpx

from tests.integration.api.world import World


class Visitor:
    """A visitor.

    Args:
        world: The running API.
        key: Signs in with it; None stays outside.
    """

    def __init__(self, world: World, key: str | None = None, language: str = "en") -> None:
        headers = {"accept-language": language}
        # Without connections that stay open, a visitor needs no end.
        self.client = httpx.Client(
            base_url=world.url,
            headers=headers,
            timeout=30,
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        if key is not None:
            answer = self.submit("/login", "/login", {"key": key, "next": "/jobs"})
            assert answer.status_code == 303, answer.text

    def get(self, path: str) -> httpx.Response:
        """Open a page, without following redirects."""
        return self.client.get(path)

    def text(self, path: str) -> str:
        """Open a page that must exist, and return its source."""
        answer = self.client.get(path, follow_redirects=True)
        assert answer.status_code == 200, answer.text
        return answer.text

    def token(self, page: str) -> str:
        """The token of the forms of a page."""
        found = re.search(r'form_token(?:" value="|=)([0-9a-f]{64})', self.text(page))
        assert found, page
        return found[1]

    def submit(self, page: str, action: str, fields: dict[str, Any]) -> httpx.Response:
        """Send a form of a page."""
        return self.client.post(action, data={"form_token": self.token(page)} | fields)

    def upload(self, page: str, action: str, files: list[tuple[str, bytes, str]]) -> httpx.Response:
        """Send a form with files: the name, the content and the type of each."""
        parts = [("file", each) for each in files]
        return self.client.post(f"{action}?form_token={self.token(page)}", files=parts)


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One element, as a browser reads it."""
        self.found.append((tag, {name: value or "" for name, value in attrs}))


def elements(source: str) -> list[tuple[str, dict[str, str]]]:
    """The elements of a page with their attributes, as a browser reads them."""
    parser = _Elements()
    parser.feed(source)
    return parser.found


def text_of(source: str) -> str:
    """The text of a page without its tags."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", source)).split())
