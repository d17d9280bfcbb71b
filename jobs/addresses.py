"""Reads an image's address, in any of its spellings, as a bucket and a key.

The object is always fetched through the configured S3 endpoint, never from a host that a message
names.
"""

from __future__ import annotations

import dataclasses
import re
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

MAX_ADDRESS = 8192  # characters; a presigned address carries a long query
MAX_KEY_BYTES = 1024  # S3's own limit

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_REGION = r"[a-z]{2}(?:-[a-z]+){1,2}-\d"
# https://docs.aws.amazon.com/general/latest/gr/s3.html: global, regional, legacy s3-region, dual
# stack, FIPS, China, and transfer acceleration, each with or without the bucket in front.
_AWS_HOST = re.compile(
    rf"(?:(?P<bucket>.+)\.)?"
    rf"s3(?:-fips)?(?:-accelerate)?(?:\.dualstack)?(?:[.-]{_REGION})?\.amazonaws\.com(?:\.cn)?"
)
# https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html: the query of a presigned
# address, and the headers that it may request. None of them changes the object.
_HARMLESS = re.compile(
    r"x-(?:amz|goog)-[a-z0-9-]+|x-id|awsaccesskeyid|googleaccessid|key-pair-id|policy|signature"
    r"|expires|response-[a-z-]+",
    re.IGNORECASE,
)
# These request another object, a part of the object, or facts about it.
_OTHER_OBJECT = frozenset(
    {
        "acl",
        "attributes",
        "generation",
        "legal-hold",
        "partNumber",
        "retention",
        "select",
        "tagging",
    }
    | {"torrent", "uploadId", "uploads", "versions"}
)
_VERSION = "versionId"
_VERSION_ID = re.compile(r"[\x21-\x7e]{1,1024}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclasses.dataclass(frozen=True, slots=True)
class S3Location:
    """The location of an object on S3."""

    bucket: str
    key: str

    def uri(self, scheme: str = "s3") -> str:
        """The address, `s3://bucket/key`."""
        return f"{scheme}://{self.bucket}/{self.key}"


@dataclasses.dataclass(frozen=True, slots=True)
class AddressRules:
    """The buckets and hosts that addresses may name.

    Attributes:
        default_bucket: Bucket of a bare key.
        allowed: Buckets that may be read from.
        endpoint: The store's own address, if it is not AWS's.
    """

    default_bucket: str
    allowed: tuple[str, ...]
    endpoint: str | None = None


class BrokenAddress(ValueError):
    """No object can have this address. It is not forbidden, so it only costs one image."""


def read_address(address: str, rules: AddressRules) -> tuple[str, S3Location]:
    """Bucket and key of an image's address.

    Args:
        address: `s3://bucket/key`, `gs://bucket/key`, an https address of S3 or of the endpoint
            (virtual-hosted or path style, percent-encoded; of its query only a version counts: the
            rest may be a signature, and `unused_parts` names what is neither), or a bare key.
        rules: The buckets and hosts that it may name.

    Returns:
        The address as it may be shown (of its query only the version), and the location.

    Raises:
        BrokenAddress: No object of S3 can have it.
        ValueError: It names another bucket, another host or a local file. The text follows the
            field's name and never repeats a query.
    """
    if len(address) > MAX_ADDRESS:
        raise BrokenAddress(f"is longer than {MAX_ADDRESS} characters")
    if _UNSAFE.search(address):
        raise BrokenAddress("contains a control character")
    address = address.strip()
    if not address:
        raise BrokenAddress("is empty")
    shown, location = _split(address, rules.default_bucket, rules.endpoint)
    if not _BUCKET.fullmatch(location.bucket):
        raise BrokenAddress("names no valid bucket")
    if location.bucket not in rules.allowed:
        raise ValueError(
            f"is in the bucket {location.bucket!r}, which this worker may not read. Use a bucket "
            "of IMAGE_BUCKETS, or add this one to that setting"
        )
    _check_key(location.key)
    return shown, location


def version_of(address: str) -> str | None:
    """The object's version that an https address of `read_address` names; None for the present one.

    An `s3://` address has none: its question mark is a part of the key.
    """
    if not _is_url(address):
        return None
    return dict(parse_qsl(urlsplit(address).query)).get(_VERSION)


def unused_parts(address: str) -> tuple[str, ...]:
    """Names of the parts of an https address that have no effect and are not a signature.

    Args:
        address: An address that `read_address` accepts.
    """
    if not _is_url(address.strip()):
        return ()
    parts = urlsplit(address.strip())
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    unused = [
        f"?{name}"
        for name in names
        if name.lower() != _VERSION.lower() and not _HARMLESS.fullmatch(name)
    ]
    return tuple(dict.fromkeys(unused)) + (("#",) if parts.fragment else ())


def _is_url(address: str) -> bool:
    scheme = address.partition(":")[0].lower()
    return scheme in ("http", "https") and _SCHEME.match(address) is not None


def _split(address: str, default_bucket: str, endpoint: str | None) -> tuple[str, S3Location]:
    scheme = address.partition(":")[0].lower()
    if _is_url(address):
        return _from_url(address, endpoint)
    if scheme in ("s3", "gs") and _SCHEME.match(address):
        bucket, _, key = address[len(scheme) + 3 :].partition("/")
        return address, S3Location(bucket, key)
    if _SCHEME.match(address) or scheme in ("file", "data"):
        raise ValueError(
            f"is a {scheme[:40]}: address; use s3://bucket/key, gs://bucket/key, an https address "
            "of S3, or a bare key"
        )
    if address.startswith("/"):
        raise ValueError("is an absolute path; a bare key has no slash in front")
    return address, S3Location(default_bucket, address)


def _from_url(address: str, endpoint: str | None) -> tuple[str, S3Location]:
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise BrokenAddress("is not a well-formed address") from error
    if parts.username is not None or parts.password is not None:
        raise ValueError("carries a user name or password. Remove it from the address")
    # `hostname` is lower case, as buckets are.
    bucket, base = _bucket_in_host(parts, port, endpoint)
    if not parts.path.startswith(f"{base}/"):
        raise ValueError(f"is on the store's host, but not under the path {base} of its address")
    try:
        path = unquote(parts.path.removeprefix(base), errors="strict").removeprefix("/")
    except UnicodeDecodeError as error:
        raise BrokenAddress("is not percent-encoded UTF-8") from error
    if bucket is None:
        bucket, _, path = path.partition("/")
    version = _version(parts.query)
    query = f"{_VERSION}={quote(version, safe='')}" if version else ""
    return parts._replace(query=query, fragment="").geturl(), S3Location(bucket, path)


def _version(query: str) -> str | None:
    """The version that a query names, if it names one."""
    try:
        found = parse_qsl(query, keep_blank_values=True, max_num_fields=100)
    except ValueError:
        raise BrokenAddress("has more than 100 query parameters") from None
    for name, _ in found:
        if name in _OTHER_OBJECT:
            raise BrokenAddress(f"asks by {name!r} for something else than a whole object")
    versions = [value for name, value in found if name.lower() == _VERSION.lower()]
    if not versions:
        return None
    if len(versions) > 1 or not _VERSION_ID.fullmatch(versions[0]):
        raise BrokenAddress("names no valid version, or several")
    return versions[0]


def _bucket_in_host(
    parts: SplitResult, port: int | None, endpoint: str | None
) -> tuple[str | None, str]:
    """The bucket of a virtual-hosted address, and the path of the store's own address before it.

    The bucket is None if it is the first part of the path.
    """
    host = parts.hostname or ""
    if endpoint:
        own = urlsplit(endpoint)
        base = own.path.rstrip("/")
        same = (parts.scheme, port) == (own.scheme, own.port)
        if same and host == own.hostname:
            return None, base
        if same and own.hostname and host.endswith(f".{own.hostname}"):
            return host.removesuffix(f".{own.hostname}"), base
    if parts.scheme == "https" and port in (None, 443) and (match := _AWS_HOST.fullmatch(host)):
        return match["bucket"], ""
    raise ValueError(f"is on {parts.scheme}://{host[:80]}, which is not an https address of S3")


def _check_key(key: str) -> None:
    if not key or key.endswith("/"):
        raise BrokenAddress("names no object in the bucket")
    if _UNSAFE.search(key):
        raise BrokenAddress("contains a control character")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise BrokenAddress(f"has a key of more than {MAX_KEY_BYTES} bytes")
    # A proxy that normalises paths would resolve these to a place outside the checked bucket.
    if any(part in (".", "..") for part in key.split("/")):
        raise BrokenAddress("has a key with `.` or `..` in it")
