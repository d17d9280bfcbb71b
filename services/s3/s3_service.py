"""S3: images in, checkpoints and models in and out, and conditional writes for job records.

The only module that imports boto3. Every public method raises errors of `utils.errors` and nothing
else: `StorageError` and its kin for S3, `MachineError` and `DiskFull` for the local disk. The
methods are in `services.s3.reading` and `services.s3.writing`; here are the client and its errors.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import boto3
import urllib3.exceptions
from boto3.exceptions import Boto3Error
from botocore import exceptions as botocore_errors
from botocore.config import Config
from botocore.parsers import ResponseParserError

from services.s3 import errors as s3_errors
from services.s3 import metrics as s3_metrics
from services.s3.errors import Transient
from services.s3.reading import S3Reading
from services.s3.types import FetchedImage, ImageRequest, ObjectInfo, StoredObject
from services.s3.writing import S3Writing
from utils.errors import ConfigurationError, ObjectNotFound, StorageError, TrainingServerError
from utils.metrics import Metrics

__all__ = [
    "FetchedImage",
    "ObjectInfo",
    "ImageRequest",
    "S3Service",
    "StoredObject",
]

# What boto3 and the layers below it raise, the first match counting. `ClientError` (S3's own
# refusals) and the local disk's `OSError` are judged apart; some of botocore's errors are OSErrors
# as well, so these come first.
FOREIGN: tuple[tuple[tuple[type[Exception], ...], type[StorageError], str], ...] = (
    (
        (botocore_errors.NoCredentialsError, botocore_errors.PartialCredentialsError),
        StorageError,
        "there are no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    (
        (botocore_errors.ChecksumError, botocore_errors.FlexibleChecksumError),
        Transient,
        "arrived damaged: its checksum differs",
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
    ((UnicodeError,), ObjectNotFound, "no object can have this key"),
    (
        # botocore follows a redirect of its own look-up of the region by another look-up.
        (RecursionError,),
        StorageError,
        "the store only redirects; check AWS_ENDPOINT_URL_S3 and AWS_S3_REGION_NAME",
    ),
    ((botocore_errors.BotoCoreError, Boto3Error), StorageError, "S3 could not be used"),
    # The parser's own, and what it raises for a number or a date that is none.
    (
        (ResponseParserError, ValueError),
        Transient,
        "the answer is not S3's; check AWS_ENDPOINT_URL_S3",
    ),
)
_CAUGHT: tuple[type[Exception], ...] = (
    botocore_errors.ClientError,
    OSError,
    *(cls for classes, _, _ in FOREIGN for cls in classes),
)


def translate(error: Exception, what: str) -> TrainingServerError:
    """An error of boto3, of what lies below it, or of the disk, as one of ours.

    Args:
        error: What was raised.
        what: What it was about, `s3://bucket/key`.
    """
    if isinstance(error, botocore_errors.ClientError):
        answer: Mapping[str, Any] = error.response
        code = str(answer.get("Error", {}).get("Code", "without a code"))
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return s3_errors.from_answer(code, status, what)
    for classes, kind, sentence in FOREIGN:
        if isinstance(error, classes):
            return kind(f"{what}: {sentence} ({type(error).__name__})")
    if isinstance(error, OSError):
        return s3_errors.from_disk(error, what)
    return StorageError(f"{what}: S3 could not be used ({type(error).__name__})")


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Inside the block every foreign error becomes one of ours; see `translate`."""
    try:
        yield
    except _CAUGHT as error:
        raise translate(error, what) from error


class S3Service(S3Reading, S3Writing):
    """S3, or a store that speaks its interface. Safe to share between threads.

    Args:
        region: AWS region of the buckets.
        endpoint_url: Address of another store than AWS's; it is then spoken to in path style.
        ignore_configured_endpoints: Do not look for another address in boto3's own configuration.
        access_key_id: Access key; None for boto3's own chain (environment, profile, instance role).
        secret_access_key: Its secret.
        session_token: The third part of temporary credentials; None for lasting ones.
        checksums: What uploads carry for the store to verify: `sha256` in S3's own header, or
            `md5` in `Content-MD5`, which every store takes. With `md5` nothing else is sent that
            only AWS is sure to know: no checksums are asked for, and objects are deleted singly.
        conditional_writes: False for a store that ignores or refuses conditions on a PUT:
            `upload_file` then writes without them. `create` and `replace` always send theirs.
        connect_timeout: Seconds to wait for a connection.
        read_timeout: Seconds to wait for the next bytes.
        attempts: How often, in all, a request is made that fails for a passing reason.
        metrics: Where requests and bytes are counted; None for nowhere.

    Raises:
        ConfigurationError: No client can be made of this.
    """

    def __init__(
        self,
        *,
        region: str,
        endpoint_url: str | None = None,
        ignore_configured_endpoints: bool = False,
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        session_token: str | None = None,
        checksums: Literal["sha256", "md5"] = "sha256",
        conditional_writes: bool = True,
        connect_timeout: float = 5.0,
        read_timeout: float = 20.0,
        attempts: int = 3,
        metrics: Metrics | None = None,
    ) -> None:
        try:
            client = boto3.session.Session().client(
                "s3",
                region_name=region,
                endpoint_url=endpoint_url,
                aws_access_key_id=access_key_id,
                aws_secret_access_key=secret_access_key,
                aws_session_token=session_token,
                config=_client_config(
                    path_style=bool(endpoint_url),
                    ignore_configured_endpoints=ignore_configured_endpoints,
                    timeouts=(connect_timeout, read_timeout),
                    attempts=attempts,
                    checksums=checksums,
                ),
            )
        except (botocore_errors.BotoCoreError, ValueError) as error:
            raise ConfigurationError(f"S3 cannot be set up: {error}") from error
        if metrics:
            s3_metrics.count_requests(client.meta.events, metrics)
        super().__init__(
            client,
            translated,
            attempts,
            checksums=checksums,
            conditional_writes=conditional_writes,
        )


def _client_config(
    *,
    path_style: bool,
    ignore_configured_endpoints: bool,
    timeouts: tuple[float, float],
    attempts: int,
    checksums: str,
) -> Config:
    return Config(  # type: ignore[call-arg]  # one option is missing in the stubs
        connect_timeout=timeouts[0],
        read_timeout=timeouts[1],
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
        tcp_keepalive=True,
        ignore_configured_endpoint_urls=ignore_configured_endpoints or None,
        s3={"addressing_style": "path" if path_style else "auto"},
        # Uploads carry a checksum of our own making in a header. The SDK's default, a checksum in
        # a trailer, is understood by AWS and few others.
        request_checksum_calculation="when_required",
        response_checksum_validation=(
            "when_supported" if checksums == "sha256" else "when_required"
        ),
    )
