"""What a setting's value must look like.

Each raises `ValueError`, whose text follows the setting's name and shows no value that may hold a
secret.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib.util
import ipaddress
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from utils.urls import origin_of


def split(value: Any) -> Any:
    """Items of a text with commas; a number alone, as a file may have it, is one item."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, (int, float)) else value


def path(value: str | Path) -> str:
    """Absolute, from the folder in which the program was started: the trainer runs in another."""
    return os.path.abspath(os.path.expanduser(value))


def base_model(value: str) -> str:
    """A folder as a path; `owner/name` is the hub's unless there is such a folder."""
    is_of_the_hub = re.fullmatch(r"[^./~][^/]*/[^/]+", value) and not Path(value).is_dir()
    return value if is_of_the_hub else path(value)


def host(value: str) -> str:
    """A host alone, by name or as an IPv6 address."""
    if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?", value):
        return value
    try:
        return str(ipaddress.IPv6Address(value))
    except ValueError:  # its text shows the value, which may be an address with a password
        raise ValueError("is not a host name alone (RABBITMQ_PORT is the port's setting)") from None


def endpoint(value: str) -> str:
    """The address of an S3."""
    origin_of(value)
    if "_" in str(urlsplit(value).hostname):
        raise ValueError("has an underscore in its host name, which S3's client refuses")
    return value


def http_address(value: str) -> str:
    """An address of a service, perhaps with a path, and without a password."""
    origin_of(value)
    return value


def tensorboard(value: bool) -> bool:
    """Whether event files are wanted, which need a library that not every machine has."""
    if value and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "wants the package tensorboard, which is not installed: install it (requirements.txt "
            "names the version), or leave this off"
        )
    return value


def region(value: str) -> str:
    """The name of a region."""
    if not re.fullmatch(r"(?![0-9]+$)(?!-)[A-Za-z0-9-]{1,63}(?<!-)", value):
        raise ValueError("is not the name of a region (eu-central-1, for example)")
    return value


def bucket_name(value: str) -> str:
    """The name of a bucket."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", value):
        raise ValueError("is not a bucket name (3 to 63 of a-z, 0-9, dot and hyphen; no s3://)")
    return value


def signing_secrets(value: str) -> None:
    """Keys of Standard Webhooks, separated by commas."""
    for secret in split(value) or ("",):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except ValueError:  # its text says which byte is wrong
            key = b""
        if not secret.startswith("whsec_") or len(key) < 24:
            raise ValueError("must be whsec_ and base64 of at least 24 bytes")


def derived_signing_secret(token: str) -> str:
    """The key that signs webhooks if none is set, as docs/protocol.md has it."""
    message = b"training-server webhook signing v1"
    digest = hmac.new(token.encode(), message, hashlib.sha256).digest()
    return "whsec_" + base64.b64encode(digest).decode()
