"""S3's error codes and the disk's errors, each as one of ours. Knows no client library."""

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
    """Two conditional writes met; S3 asks to try again."""


class Transient(StorageError):
    """The connection broke or what arrived was damaged: another request may do better."""


class NotSupported(StorageError):
    """The store has no such operation, or refuses a header that it does not know."""


class BucketMissing(ObjectNotFound):
    """The bucket does not exist."""


class VersionNotServed(ObjectNotFound):
    """The store answered with another version than the one that was asked for."""


_NOT_FOUND = (ObjectNotFound, "does not exist")
_DENIED = (AccessDenied, "S3 refuses access; the worker's policy must allow it")
_KEY = (
    StorageError,
    "S3 does not accept the access key; check AWS_ACCESS_KEY_ID and, if the credentials are "
    "temporary, AWS_SESSION_TOKEN",
)
_TOKEN = (
    StorageError,
    "S3 does not accept the temporary credentials, or no longer; renew AWS_ACCESS_KEY_ID, "
    "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN together",
)
_NOT_SUPPORTED = (
    NotSupported,
    "the store does not support the request or one of its headers; S3_CHECKSUMS=md5 can help",
)
_BUSY = (StorageError, "S3 is busy or broken; trying again later can help")
_CHANGED = (PreconditionFailed, "was changed by somebody else")
_CONFLICT = (ConditionalConflict, "is being written by somebody else at this moment")
_REGION = (StorageError, "lies in another region; check AWS_S3_REGION_NAME")
_DAMAGED = (StorageError, "arrived damaged")

# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; a code that is missing here
# is judged by its HTTP status. The answer to a HEAD has no body, so its "code" is the bare status.
CODES: dict[str, tuple[type[StorageError], str]] = {
    "NoSuchKey": _NOT_FOUND,
    "NoSuchVersion": _NOT_FOUND,
    "NotFound": _NOT_FOUND,
    "NoSuchBucket": (BucketMissing, "the bucket does not exist"),
    "InvalidBucketName": (BucketMissing, "no bucket can have this name"),
    "KeyTooLongError": (ObjectNotFound, "no object can have so long a key"),
    # What a GET of a deleted object's marker gets.
    "MethodNotAllowed": _NOT_FOUND,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "AccountProblem": (StorageError, "the S3 account is not in order"),
    "NotSignedUp": (StorageError, "the S3 account is not in order"),
    "InvalidObjectState": (AccessDenied, "is archived and must be restored before it can be read"),
    "KMS.DisabledException": (AccessDenied, "its encryption key is disabled"),
    "KMS.NotFoundException": (AccessDenied, "its encryption key does not exist"),
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
    "RequestTimeTooSkewed": (StorageError, "this machine's clock is wrong by more than 15 minutes"),
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "PreconditionFailed": _CHANGED,
    "ConditionalRequestConflict": _CONFLICT,
    "OperationAborted": _CONFLICT,
    "EntityTooLarge": (ObjectTooLarge, "is larger than S3 takes"),
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
    # S3's own codes for it are in the table above; a HEAD or another store may give none.
    409: _CONFLICT,
    412: _CHANGED,
    413: CODES["EntityTooLarge"],
    429: _BUSY,
    501: _NOT_SUPPORTED,
}


def from_answer(code: str, status: int, what: str) -> StorageError:
    """S3's refusal as one of ours.

    Args:
        code: S3's error code, `NoSuchKey`; may be anything.
        status: The answer's HTTP status.
        what: What it was about, `s3://bucket/key`.
    """
    kind, sentence = CODES.get(code) or _STATUSES.get(status) or (StorageError, "S3 refuses")
    if kind is StorageError and status >= 500:
        sentence = _BUSY[1]
    return kind(f"{what}: {sentence} (S3 answered {status} {code})")


def from_disk(error: OSError, what: str) -> TrainingServerError:
    """A local file's error as one of ours, without the path: the text may travel to an artist."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{what}: the worker's disk is full")
    return MachineError(f"{what}: the worker's disk refuses ({error.strerror or error!r})")
