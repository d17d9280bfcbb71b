"""Facts about stored objects, and the checks that S3 sent them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from utils.errors import StorageError


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectInfo:
    """The facts that S3 reports about an object without its body.

    Attributes:
        size: Bytes.
        etag: As S3 wrote it, quotes included.
        last_modified: S3's own date, with its time zone.
        metadata: The object's own metadata; empty in a listing, which does not report it.
    """

    key: str
    size: int
    etag: str
    last_modified: datetime
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredObject:
    """A small object with its body, its version and the dates that a lease is judged by.

    Attributes:
        etag: The version; pass it to `S3Service.replace`.
        last_modified: When this version was written, by S3's clock.
        server_date: The time of the answer, by S3's clock.
        metadata: The object's own metadata.
    """

    body: bytes
    etag: str
    last_modified: datetime
    server_date: datetime
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


# A proxy or a captive portal may answer 200 to any request. An answer that lacks the fields which
# S3 always sends does not come from S3.
_CHECK = "so it does not come from S3. Check AWS_ENDPOINT_URL_S3."


def etag_of(answer: Mapping[str, Any], what: str) -> str:
    """The version that an answer names.

    Raises:
        StorageError: The answer names none.
    """
    if not answer.get("ETag"):
        raise StorageError(f"{what}: the answer has no ETag, {_CHECK}")
    return str(answer["ETag"])


def last_modified_of(answer: Mapping[str, Any], what: str) -> datetime:
    """The time when the object was written, by S3's clock.

    Raises:
        StorageError: The answer has no such time.
    """
    date = answer.get("LastModified")
    if not isinstance(date, datetime):
        raise StorageError(f"{what}: the answer has no Last-Modified, {_CHECK}")
    return date


def server_date_of(answer: Mapping[str, Any], what: str) -> datetime:
    """The time of the answer, by S3's clock.

    Raises:
        StorageError: The answer has no such time.
    """
    text = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        return parsedate_to_datetime(text)
    except ValueError as error:
        raise StorageError(f"{what}: the answer has no valid Date header, {_CHECK}") from error


def check_page(page: Mapping[str, Any], what: str) -> None:
    """Refuse a page of a listing that does not say whether more pages follow.

    Without that field the page cannot be told from an empty folder.

    Raises:
        StorageError: The field is missing.
    """
    if "IsTruncated" not in page:
        raise StorageError(f"{what}: the answer is not a listing, {_CHECK}")
