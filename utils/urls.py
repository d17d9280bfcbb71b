"""Reads http(s) addresses: the origin, the path, and a form for the log."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

_HOST = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?")
_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def origin_of(url: str) -> str:
    """Scheme, host and port of an http(s) address.

    Default ports are left out, the host is in lower case and, where it is not ASCII, in the form
    that goes over the wire (`xn--…`), so that two spellings of one origin compare equal.

    Raises:
        ValueError: Not an absolute http or https address, or one that carries a user name or
            password, or one that different programs read as different hosts.
    """
    # Browsers read a backslash as a slash, others as part of a name; urlsplit drops line breaks.
    if re.search(r"[\s\\\x00-\x1f\x7f]", url.strip()):
        raise ValueError("must not contain spaces, line breaks or backslashes")
    parts = urlsplit(url.strip())
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError("must be an address like https://api.example.com")
    if "@" in parts.netloc:
        raise ValueError("must not carry a user name or password")
    port = _port(parts)
    return f"{parts.scheme}://{_host(parts.hostname)}{port}"


def base_of(url: str) -> str:
    """An address that paths are appended to: its origin, and its path as a prefix.

    The path has no slash at its end.

    Raises:
        ValueError: As for `origin_of`; or the address has a query, a fragment or a path that
            servers read in different ways.
    """
    origin = origin_of(url)
    parts = urlsplit(url.strip())
    if "?" in url or "#" in url:
        raise ValueError("must not have a query or a fragment: a path is appended to the address")
    path = parts.path.rstrip("/")
    if not _PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise ValueError("must have a plain path, like https://api.example.com/prod")
    return origin + path


def shown(url: str) -> str:
    """An address for a log line: scheme, host and port, since the rest may hold a secret."""
    try:
        parts = urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        return f"{parts.scheme}://{host[:100]}{port}"
    except ValueError:
        return "an address that cannot be read"


def _port(parts: SplitResult) -> str:
    try:
        port = parts.port
    except ValueError:  # the error's text shows the value, which may be half a password
        raise ValueError("has a port that is not a number from 0 to 65535") from None
    return "" if port in (None, _DEFAULT_PORTS[parts.scheme]) else f":{port}"


def _host(name: str) -> str:
    if ":" in name and "%" not in name:
        return f"[{ipaddress.IPv6Address(name)}]"
    try:
        ascii_name = name.encode("idna").decode("ascii").lower()
    except UnicodeError:
        ascii_name = ""  # a label is empty or too long
    if not _HOST.fullmatch(ascii_name):
        raise ValueError(
            f"has an invalid host name, {name[:100]!r}: use letters, digits, hyphens and single "
            "dots, as in api.example.com"
        )
    return ascii_name
