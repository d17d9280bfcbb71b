"""The only importer of boto3: makes the client, translates its errors, and counts its requests."""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import boto3
import urllib3.exceptions
from boto3.exceptions import Boto3Error
from botocore import exceptions as botocore_errors
from botocore.config import Config
from botocore.parsers import ResponseParserError

from services.s3.errors import Transient, from_answer, from_disk
from utils.errors import (
    ConfigurationError,
    ObjectNotFound,
    StorageError,
    TrainingServerError,
)
from utils.metrics import Metrics

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Errors of boto3 and of the layers below it; the first match counts. `ClientError` (a refusal by
# S3) and the local disk's `OSError` are judged apart. Some of botocore's errors are OSErrors too,
# so this table comes first.
FOREIGN: tuple[tuple[tuple[type[Exception], ...], type[StorageError], str], ...] = (
    (
        (botocore_errors.NoCredentialsError, botocore_errors.PartialCredentialsError),
        StorageError,
        "there are no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    (
        (botocore_errors.ChecksumError, botocore_errors.FlexibleChecksumError),
        Transient,
        "the content arrived damaged: its checksum differs",
    ),
    (
        (
            botocore_errors.ReadTimeoutError,
            botocore_errors.ConnectTimeoutError,
            urllib3.exceptions.TimeoutError,
            TimeoutError,
        ),
        Transient,
        "S3 did not answer in time",
    ),
    (
        (
            botocore_errors.ConnectionError,
            botocore_errors.HTTPClientError,
            botocore_errors.IncompleteReadError,
            urllib3.exceptions.HTTPError,
            http.client.HTTPException,
            ConnectionError,
            ssl.SSLError,
        ),
        Transient,
        "S3 could not be reached, or the connection broke",
    ),
    ((UnicodeError,), ObjectNotFound, "the key is not valid Unicode, so no object can have it"),
    (
        # botocore follows a redirect in its look-up of the region with another look-up.
        (RecursionError,),
        StorageError,
        "the store only redirects; check AWS_ENDPOINT_URL_S3 and AWS_S3_REGION_NAME",
    ),
    ((botocore_errors.BotoCoreError, Boto3Error), StorageError, "S3 could not be used"),
    # The parser's own error, and the errors that it raises for an invalid number or date.
    (
        (ResponseParserError, ValueError),
        Transient,
        "the answer does not come from S3; check AWS_ENDPOINT_URL_S3",
    ),
)
_CAUGHT: tuple[type[Exception], ...] = (
    botocore_errors.ClientError,
    OSError,
    *(cls for classes, _, _ in FOREIGN for cls in classes),
)


def translate(error: Exception, what: str) -> TrainingServerError:
    """Turn an error of boto3, of the layers below it, or of the disk into an error of this server.

    Args:
        error: The foreign error.
        what: The object's address for the message, `s3://bucket/key`.
    """
    if isinstance(error, botocore_errors.ClientError):
        answer: Mapping[str, Any] = error.response
        code = str(answer.get("Error", {}).get("Code", "without a code"))
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return from_answer(code, status, what)
    for classes, kind, sentence in FOREIGN:
        if isinstance(error, classes):
            return kind(f"{what}: {sentence} ({type(error).__name__})")
    if isinstance(error, OSError):
        return from_disk(error, what)
    return StorageError(f"{what}: S3 could not be used ({type(error).__name__})")


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Inside the block every foreign error is translated; see `translate`."""
    try:
        yield
    except _CAUGHT as error:
        raise translate(error, what) from error


def open_client(
    *,
    region: str,
    endpoint_url: str | None,
    ignore_configured_endpoints: bool,
    keys: tuple[str | None, str | None, str | None],
    timeouts: tuple[float, float],
    attempts: int,
    validates_answers: bool,
    metrics: Metrics | None,
) -> S3Client:
    """A client of boto3; see `S3Service` for the arguments.

    Raises:
        ConfigurationError: boto3 refuses the values.
    """
    config = Config(  # type: ignore[call-arg]  # one option is missing in the stubs
        signature_version="s3v4",  # also in signed addresses, where boto3 would use version 2
        connect_timeout=timeouts[0],
        read_timeout=timeouts[1],
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
        tcp_keepalive=True,
        ignore_configured_endpoint_urls=ignore_configured_endpoints or None,
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        # Uploads carry a checksum that this package computes, in a header. The SDK's default, a
        # checksum in a trailer, is understood by AWS and few other stores.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_supported" if validates_answers else "when_required",
    )
    access_key_id, secret_access_key, session_token = keys
    try:
        client = boto3.session.Session().client(
            "s3",
            region_name=region,
            endpoint_url=endpoint_url,
            aws_access_key_id=access_key_id,
            aws_secret_access_key=secret_access_key,
            aws_session_token=session_token,
            config=config,
        )
    except (botocore_errors.BotoCoreError, ValueError) as error:
        raise ConfigurationError(
            f"No S3 client can be made of the settings: {error}. "
            "Check AWS_S3_REGION_NAME and AWS_ENDPOINT_URL_S3."
        ) from error
    if metrics:
        counter = _Counter(metrics)
        client.meta.events.register("before-call.s3", counter.begins)
        client.meta.events.register("after-call.s3", counter.is_answered)
        client.meta.events.register("after-call-error.s3", counter.fails)
    return client


_BEGAN_AT, _BYTES = "training_server_began_at", "training_server_bytes"


class _Counter:
    """Counts and times every call of a client, the SDK's own repetitions included."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def begins(
        self, *, event_name: str, params: dict[str, Any], context: dict[str, Any], **_: Any
    ) -> None:
        """A request is about to be made."""
        context[_BEGAN_AT] = time.monotonic()
        if event_name.endswith(".PutObject"):
            context[_BYTES] = _size(params["body"])

    def is_answered(
        self,
        *,
        event_name: str,
        http_response: Any,
        parsed: dict[str, Any],
        context: dict[str, Any],
        **_: Any,
    ) -> None:
        """A request got an answer, of any status."""
        status = http_response.status_code
        self._count(event_name, f"{status // 100}xx", context)
        if status >= 300:
            return
        if event_name.endswith(".GetObject"):
            self._metrics.s3_bytes.labels("received").inc(parsed.get("ContentLength", 0))
        elif _BYTES in context:
            self._metrics.s3_bytes.labels("sent").inc(context[_BYTES])

    def fails(self, *, event_name: str, context: dict[str, Any], **_: Any) -> None:
        """A request got no answer."""
        self._count(event_name, "no_answer", context)

    def _count(self, event_name: str, outcome: str, context: dict[str, Any]) -> None:
        operation = _snake(event_name.rpartition(".")[2])
        self._metrics.s3_requests.labels(operation, outcome).inc()
        if _BEGAN_AT in context:
            seconds = time.monotonic() - context[_BEGAN_AT]
            self._metrics.s3_request_duration_seconds.labels(operation).observe(seconds)


def _size(body: Any) -> int:
    """Bytes of a request's body: bytes, or a file at its beginning."""
    if not hasattr(body, "seek"):
        return len(body)
    size: int = body.seek(0, io.SEEK_END)
    body.seek(0)
    return size


def _snake(operation: str) -> str:
    """`PutObject` as `put_object`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", operation).lower()
