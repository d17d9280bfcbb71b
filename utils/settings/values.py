"""Checks of the settings' values, and the types that they make.

A check raises `ValueError`. Its text follows the setting's name, and shows no value that may hold a
secret.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import os
import re
import ssl
import unicodedata
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from utils.urls import base_of

BASE_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
BASE_MODEL_REVISION = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
"""The commit on the Hugging Face hub that `BASE_MODEL` means, unless the settings name another.
https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/tree/451f4fe16113bff5a5d2269ed5ad43b0592e9a14
`scripts/pin-images` compares it with the hub."""

_PLACEHOLDER = "replace-me"
_PLACEHOLDER_HOST = "api.example.com"


def filled_in(value: Any) -> Any:
    """The value, unless it is a placeholder of `.env.example`."""
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, str):
            _refuse_placeholders(item)
    return value


def _refuse_placeholders(value: str) -> None:
    for part in value.lower().split(","):
        if part.strip().startswith(_PLACEHOLDER):
            raise ValueError("is still the placeholder of .env.example. Set your own value")
        # Compared as text, because a malformed address has no host.
        address = re.sub(r"^[a-z]+://", "", part.strip()).rpartition("@")[2]
        if re.fullmatch(rf"{re.escape(_PLACEHOLDER_HOST)}\.?(?:[:/?#].*)?", address):
            raise ValueError(
                f"still names the placeholder {_PLACEHOLDER_HOST} of .env.example. Set your own "
                "host"
            )


class Group(BaseModel):
    """A group of settings: immutable, with errors that show no value.

    Every check belongs to a field. A check of the whole group would not run while a field is wrong,
    and the operator would find the problems one restart at a time.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_filled_in(cls, value: Any) -> Any:
        return filled_in(value)

    @field_validator("*")
    @classmethod
    def _is_one_line(cls, value: Any) -> Any:
        """Secrets in files often end with a line break, which no header and no login can carry."""
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if isinstance(text, str) and any(unicodedata.category(letter) == "Cc" for letter in text):
            raise ValueError("must not contain a line break or another control character")
        return value


def split(value: Any) -> Any:
    """The items of a text with commas. A number, which a file may hold, is one item."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, (int, float)) else value


def path(value: str | Path) -> str:
    """An absolute path. A relative one starts at this process's folder: the trainer has another."""
    return os.path.abspath(os.path.expanduser(value))


AbsolutePath = Annotated[Path, BeforeValidator(path)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def lower(value: Any) -> Any:
    """A text in small letters."""
    return value.lower() if isinstance(value, str) else value


def upper(value: Any) -> Any:
    """A text in capitals."""
    return value.upper() if isinstance(value, str) else value


def base_model(value: str) -> str:
    """The path of a folder, or a model of the hub: `owner/name`, unless such a folder exists."""
    return value if _is_on_the_hub(value) else path(value)


def base_model_revision(value: str | None, info: ValidationInfo) -> str | None:
    """The revision that is set, or the pinned one of the default model."""
    is_default = info.data.get("base_model") == BASE_MODEL
    return BASE_MODEL_REVISION if value is None and is_default else value


BaseModelName = Annotated[str, AfterValidator(base_model)]
BaseModelRevision = Annotated[str | None, AfterValidator(base_model_revision)]
"""The default of the revision depends on the field `base_model`, which must be before it."""


def not_pinned(model: str, revision: str | None) -> str:
    """The reason why a base model's files may change between two starts; empty if they cannot.

    A model on the hub can change, unless the revision is a commit. A folder is under the operator's
    control.
    """
    if not _is_on_the_hub(model) or re.fullmatch("[0-9a-f]{40}", revision or ""):
        return ""
    named = f"{revision} is a branch or a tag" if revision else "no revision is set"
    return f"{named} for {model}, so its files can change on the hub"


def _is_on_the_hub(model: str) -> bool:
    return bool(re.fullmatch(r"[^./~][^/]*/[^/]+", model)) and not Path(model).is_dir()


def host(value: str) -> str:
    """A host name without a port, or an IP address."""
    if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?", value):
        return value
    try:
        return str(ipaddress.IPv6Address(value))
    except ValueError:  # the error shows the value, which may be an address with a password
        raise ValueError("is not a host name. Set the port in RABBITMQ_PORT") from None


def endpoint(value: str) -> str:
    """The address of an S3, perhaps with a path, which is in front of each bucket."""
    base_of(value)
    if "_" in str(urlsplit(value).hostname):
        raise ValueError("has an underscore in its host name, which S3's client refuses")
    return value


def http_address(value: str) -> str:
    """The address of a service, with or without a path, without a password."""
    base_of(value)
    return value


def region(value: str) -> str:
    """The name of a region."""
    if not re.fullmatch(r"(?![0-9]+$)(?!-)[A-Za-z0-9-]{1,63}(?<!-)", value):
        raise ValueError("is not the name of a region, such as eu-central-1")
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
        except ValueError:  # the error shows a part of the secret
            key = b""
        if not secret.startswith("whsec_") or len(key) < 24:
            raise ValueError("must be whsec_ and base64 of at least 24 bytes")


def derived_signing_secret(token: str) -> str:
    """The key that signs webhooks if none is set; docs/protocol.md defines it."""
    message = b"training-server webhook signing v1"
    digest = hmac.new(token.encode(), message, hashlib.sha256).digest()
    return "whsec_" + base64.b64encode(digest).decode()


def certificates(value: Path) -> Path:
    """A file of certificates in PEM.

    Raises:
        ValueError: The file cannot be read, or holds no certificate.
    """
    try:
        ssl.create_default_context(cafile=value)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"is not a readable file of certificates in PEM ({error})") from None
    return value


def proxy(value: str) -> str:
    """The address of an HTTP proxy, which may carry a user name and a password.

    Raises:
        ValueError: The value is not such an address. The error does not show it, because it may
            hold a password.
    """
    parts = urlsplit(value)
    try:
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port
    except ValueError:
        complete = False
    if not complete or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("must be an address with a port, such as http://proxy.example.com:3128")
    return value
