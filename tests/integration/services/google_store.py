"""A store that behaves as Google documents its S3-compatible XML interface.

Cases that its pages leave open are decided against the client: a header that no page names is
refused. The sources are (docs/operations.md has the addresses): "Request preconditions", "HTTP
headers and query string parameters for XML API", "Simple migration from Amazon S3 to Cloud
Storage", "Delete an object", "List objects".
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from sandbox.s3_server import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from services.s3.s3_service import S3Service
from tests.integration.services.s3_proxy import Fault, Request, S3Proxy, refusal


def google(request: Request) -> Fault | None:
    """The store's handling of a request."""
    names = set(request.headers)
    if any(name.startswith("x-goog-") for name in names):
        return refusal(
            400, "ExcessHeaderValues"
        )  # in addition to x-amz headers, which each request has
    chunked = "aws-chunked" in request.headers.get("content-encoding", "")
    if chunked or "x-amz-trailer" in names:
        return refusal(403, "SignatureDoesNotMatch")
    if any("checksum" in name for name in names):
        return refusal(400, "InvalidArgument")
    digest = base64.b64encode(hashlib.md5(request.body, usedforsecurity=False).digest()).decode()
    if request.headers.get("content-md5", digest) != digest:
        return refusal(400, "BadDigest")
    if request.method == "PUT":
        return Fault(careless=True)  # conditions of that kind apply to reads
    return Fault(path=_without_versions(request.path), hide=("x-amz-version-id",))


def _without_versions(path: str) -> str:
    """An object's version is asked for by `generation` there; the other parameter means nothing."""
    parts = urlsplit(path)
    query = [pair for pair in parse_qsl(parts.query, True) if pair[0] != "versionId"]
    return parts._replace(query=urlencode(query)).geturl()


def client(proxy: S3Proxy, **more: Any) -> S3Service:
    """A service as the settings make it for Google's endpoint."""
    choices: dict[str, Any] = {"checksums": "md5", "conditional_writes": False, "attempts": 1}
    return S3Service(
        region="auto",
        endpoint_url=proxy.endpoint,
        access_key_id=ACCESS_KEY_ID,
        secret_access_key=SECRET_ACCESS_KEY,
        **(choices | more),
    )
