"""What the reading and the writing half of `S3Service` share: the client, and how its answers and
errors are taken. Imports no client library; `services.s3.s3_service` puts it all together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from utils.errors import StorageError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class S3Access:
    """A client of S3 whose errors are ours.

    Args:
        client: boto3's client; safe to share between threads.
        translated: `with translated(what):` turns every foreign error into one that names `what`.
        attempts: How often, in all, a request is made that fails for a passing reason.
        checksums: `sha256` or `md5`: which checksum uploads carry.
        conditional_writes: Whether `upload_file` sends its condition.
    """

    def __init__(
        self,
        client: S3Client,
        translated: Callable[[str], AbstractContextManager[None]],
        attempts: int,
        *,
        checksums: str = "sha256",
        conditional_writes: bool = True,
    ) -> None:
        self._client = client
        self._translated = translated
        self._attempts = attempts
        self._checksums = checksums
        self._conditional_writes = conditional_writes
        # The request that deletes many objects wants a checksum that not every store takes.
        self._deletes_one_by_one = checksums == "md5"

    @property
    def endpoint(self) -> str:
        """The address that requests go to, wherever it was configured."""
        return str(self._client.meta.endpoint_url)


# A proxy or a captive portal may answer 200 to anything; what lacks S3's own marks is not S3's.
_CHECK = "check AWS_ENDPOINT_URL_S3"


def etag_of(answer: Mapping[str, Any], what: str) -> str:
    """The version that an answer names.

    Raises:
        StorageError: It names none.
    """
    if not answer.get("ETag"):
        raise StorageError(f"{what}: the answer has no ETag, so it is not S3's; {_CHECK}")
    return str(answer["ETag"])


def last_modified_of(answer: Mapping[str, Any], what: str) -> datetime:
    """When the object was written, by S3's clock.

    Raises:
        StorageError: The answer does not say.
    """
    date = answer.get("LastModified")
    if not isinstance(date, datetime):
        raise StorageError(f"{what}: the answer has no Last-Modified, so it is not S3's; {_CHECK}")
    return date


def server_date_of(answer: Mapping[str, Any], what: str) -> datetime:
    """What S3's clock said when it answered.

    Raises:
        StorageError: The answer does not say.
    """
    text = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        return parsedate_to_datetime(text)
    except ValueError as error:
        raise StorageError(f"{what}: S3's answer has no date that can be read") from error


def check_page(page: Mapping[str, Any], what: str) -> None:
    """A page of a listing says whether more follow.

    Raises:
        StorageError: It does not, so that it cannot be told from an empty folder.
    """
    if "IsTruncated" not in page:
        raise StorageError(f"{what}: the answer is no listing, so it is not S3's; {_CHECK}")
