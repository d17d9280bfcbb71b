"""Messages that the tests change one field of, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from config import Settings, load
from jobs.kinds import JobKind, Kinds
from jobs.message import Job, parse
from utils.errors import InvalidMessage

CONTRACT = Path(__file__).parents[2] / "contract" / "messages"
BUCKET = "stylelicense-media"
ENDPOINT = "http://127.0.0.1:9000"


def make_settings(**values: Any) -> Settings:
    """Settings of these tests, independent of the environment."""
    defaults: dict[str, Any] = {
        "backend_api_url": "https://api.stylelicense.com",
        "internal_api_token": "t" * 32,
        "aws_storage_bucket_name": BUCKET,
        "image_buckets": f"{BUCKET},second-bucket,with.dots",
        "aws_endpoint_url_s3": ENDPOINT,
    }
    return load(_env_file=None, **(defaults | values))


SETTINGS = make_settings()


def style_kind(settings: Settings = SETTINGS) -> JobKind:
    """The style kind with the defaults of these settings."""
    return settings.kinds().of("style")


def all_kinds(settings: Settings = SETTINGS) -> Kinds:
    """Every registered kind, with the defaults of these settings."""
    return settings.kinds(every=True)


def flat(**values: Any) -> dict[str, Any]:
    """A valid flat message with these fields in it."""
    return {"style_id": 10, "image_urls": ["s3://stylelicense-media/a.jpg"]} | values


def envelope(**values: Any) -> dict[str, Any]:
    """A valid envelope with these fields in its `data`."""
    data = {"style_id": 10, "images": ["s3://stylelicense-media/a.jpg"]} | values
    return {"task_id": "t-1", "type": "model_training", "data": data}


def read(message: Any, *, message_id: str | None = None, settings: Settings = SETTINGS) -> Job:
    """The job of a message given as JSON values or bytes."""
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return parse(body, message_id=message_id, kinds=settings.kinds())


def refused(message: Any, *, message_id: str | None = None) -> InvalidMessage:
    """The error of a message that must be refused."""
    with pytest.raises(InvalidMessage) as caught:
        read(message, message_id=message_id)
    return caught.value
