"""S3's error codes and the disk's errors as errors of this server. Imports no client library."""

from __future__ import annotations

import errno

from utils.errors import (
    AccessDenied,
    DiskFull,
    MachineError,
    ObjectNotFound,
    ObjectTooLarge,
    PreconditionFailed,
    StorageError,
    TrainingServerError,
)


class ConditionalConflict(PreconditionFailed):
    """Two conditional writes met; S3 asks the client to try again."""


class Transient(StorageError):
    """The connection broke, or the content arrived damaged; another request may succeed."""


class NotSupported(StorageError):
    """The store lacks the operation, or refuses a header that it does not know."""


class BucketMissing(ObjectNotFound):
    """The bucket does not exist."""


class VersionNotServed(ObjectNotFound):
    """The store returned another version than the requested one."""


_NOT_FOUND = (ObjectNotFound, "the object does not exist")
_DENIED = (AccessDenied, "S3 refuses access; allow it in the worker's policy")
_KEY = (
    StorageError,
    "S3 does not accept the access key; check AWS_ACCESS_KEY_ID and, if the credentials are "
    "temporary, AWS_SESSION_TOKEN",
)
_TOKEN = (
    StorageError,
    "S3 does not accept the temporary credentials, or they have expired; renew AWS_ACCESS_KEY_ID, "
    "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN together",
)
_NOT_SUPPORTED = (
    NotSupported,
    "the store does not support the request or one of its headers; S3_CHECKSUMS=md5 can help",
)
_BUSY = (StorageError, "S3 is busy or broken; try again later")
_CHANGED = (PreconditionFailed, "the object was changed by another program")
_CONFLICT = (ConditionalConflict, "another program writes the object at this moment")
_REGION = (StorageError, "the bucket is in another region; check AWS_S3_REGION_NAME")
_DAMAGED = (StorageError, "the content arrived damaged")

# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; a code that is missing here
# is judged by its HTTP status. The answer to a HEAD has no body, so its "code" is the status.
CODES: dict[str, tuple[type[StorageError], str]] = {
    "NoSuchKey": _NOT_FOUND,
    "NoSuchVersion": _NOT_FOUND,
    "NotFound": _NOT_FOUND,
    "NoSuchBucket": (BucketMissing, "the bucket does not exist"),
    "InvalidBucketName": (BucketMissing, "the bucket's name is not valid"),
    "KeyTooLongError": (ObjectNotFound, "the key exceeds S3's limit of 1,024 bytes"),
    # The answer to a GET of a deleted object's marker.
    "MethodNotAllowed": _NOT_FOUND,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "AccountProblem": (StorageError, "there is a problem with the S3 account; see AWS's console"),
    "NotSignedUp": (StorageError, "the account is not signed up for S3; see AWS's console"),
    "InvalidObjectState": (AccessDenied, "the object is archived; restore it first"),
    "KMS.DisabledException": (AccessDenied, "the object's encryption key is disabled"),
    "KMS.NotFoundException": (AccessDenied, "the object's encryption key does not exist"),
    "InvalidAccessKeyId": _KEY,
    "SignatureDoesNotMatch": (
        StorageError,
        "S3 does not accept the signature; check AWS_SECRET_ACCESS_KEY",
    ),
    "ExpiredToken": _TOKEN,
    "InvalidToken": _TOKEN,
    "TokenRefreshRequired": _TOKEN,
    "InvalidSecurity": _TOKEN,
    "RequestExpired": _TOKEN,
    "RequestTimeTooSkewed": (
        StorageError,
        "this machine's clock is wrong by more than 15 minutes; set it",
    ),
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "PreconditionFailed": _CHANGED,
    "ConditionalRequestConflict": _CONFLICT,
    "OperationAborted": _CONFLICT,
    "EntityTooLarge": (ObjectTooLarge, "the object is larger than S3 accepts"),
    "NotImplemented": _NOT_SUPPORTED,
    "MissingContentMD5": _NOT_SUPPORTED,
    "ExcessHeaderValues": _NOT_SUPPORTED,
    "BadDigest": _DAMAGED,
    "InvalidDigest": _DAMAGED,
    "XAmzContentSHA256Mismatch": _DAMAGED,
    "IncompleteBody": _DAMAGED,
    "InternalError": _BUSY,
    "ServiceUnavailable": _BUSY,
    "SlowDown": _BUSY,
    "RequestTimeout": _BUSY,
    "Throttling": _BUSY,
}

_STATUSES: dict[int, tuple[type[StorageError], str]] = {
    301: _REGION,
    307: _REGION,
    403: _DENIED,
    404: _NOT_FOUND,
    # S3's own codes are in the table above; a HEAD or another store may send none.
    409: _CONFLICT,
    412: _CHANGED,
    413: CODES["EntityTooLarge"],
    429: _BUSY,
    501: _NOT_SUPPORTED,
}


def from_answer(code: str, status: int, what: str) -> StorageError:
    """The error for a refusal by S3.

    Args:
        code: S3's error code, such as `NoSuchKey`; unknown codes are judged by the status.
        status: The answer's HTTP status.
        what: The object's address, `s3://bucket/key`.
    """
    kind, sentence = (
        CODES.get(code) or _STATUSES.get(status) or (StorageError, "S3 refuses the request")
    )
    if kind is StorageError and status >= 500:
        sentence = _BUSY[1]
    return kind(f"{what}: {sentence} (S3 answered {status} {code})")


def from_disk(error: OSError, what: str) -> TrainingServerError:
    """The error for a local file, without its path: an artist may read the text."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{what}: the worker's disk is full")
    return MachineError(
        f"{what}: the worker's disk cannot be used ({error.strerror or error!r}); check it"
    )
