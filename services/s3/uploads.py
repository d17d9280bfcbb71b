"""Uploads in parts, and addresses that are signed for a client of the API.

A client gets an address for one object, for a limited time, and needs no other credentials.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from urllib.parse import quote

from jobs.addresses import S3Location
from services.s3.client import translated
from services.s3.s3_service import S3Service, open_store
from utils.settings.storage import Store

_PLAIN = re.compile(r"[^A-Za-z0-9._ -]")


def content_disposition(filename: str) -> str:
    """The header that names a download: an ASCII name in quotes, and the whole name encoded."""
    plain = _PLAIN.sub("_", filename) or "file"
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


class Uploads:
    """Multipart uploads and signed addresses. Safe to share between threads.

    Args:
        s3: The storage.
        public: The storage under the address that clients use; the same by default.
    """

    def __init__(self, s3: S3Service, public: S3Service | None = None) -> None:
        self._client = s3.client
        self._public = (public or s3).client

    def begin(self, location: S3Location, content_type: str) -> str:
        """Begin an upload. Returns S3's id for it. Raises `StorageError`."""
        with translated(location.uri()):
            answer = self._client.create_multipart_upload(
                Bucket=location.bucket, Key=location.key, ContentType=content_type
            )
        return answer["UploadId"]

    def put_part(self, location: S3Location, upload_id: str, number: int, body: bytes) -> str:
        """Upload one part. Returns its ETag. Raises `StorageError`."""
        with translated(location.uri()):
            answer = self._client.upload_part(
                Bucket=location.bucket,
                Key=location.key,
                UploadId=upload_id,
                PartNumber=number,
                Body=body,
            )
        return answer["ETag"]

    def parts(self, location: S3Location, upload_id: str) -> list[tuple[int, str, int]]:
        """Number, ETag and size of each part that S3 has. Raises `StorageError`."""
        found: list[tuple[int, str, int]] = []
        with translated(location.uri()):
            pages = self._client.get_paginator("list_parts").paginate(
                Bucket=location.bucket, Key=location.key, UploadId=upload_id
            )
            for page in pages:
                found += [
                    (part["PartNumber"], part["ETag"], part["Size"])
                    for part in page.get("Parts", ())
                ]
        return found

    def complete(
        self, location: S3Location, upload_id: str, parts: Sequence[tuple[int, str]]
    ) -> None:
        """Make the object of its parts, by number and ETag. Raises `StorageError`."""
        with translated(location.uri()):
            self._client.complete_multipart_upload(
                Bucket=location.bucket,
                Key=location.key,
                UploadId=upload_id,
                MultipartUpload={
                    "Parts": [{"PartNumber": number, "ETag": etag} for number, etag in parts]
                },
            )

    def abort(self, location: S3Location, upload_id: str) -> None:
        """Drop an upload and its parts. Raises `StorageError`."""
        with translated(location.uri()):
            self._client.abort_multipart_upload(
                Bucket=location.bucket, Key=location.key, UploadId=upload_id
            )

    def part_address(
        self, location: S3Location, upload_id: str, number: int, *, seconds: int
    ) -> str:
        """An address to which a client PUTs one part."""
        with translated(location.uri()):
            return self._public.generate_presigned_url(
                "upload_part",
                Params={
                    "Bucket": location.bucket,
                    "Key": location.key,
                    "UploadId": upload_id,
                    "PartNumber": number,
                },
                ExpiresIn=seconds,
            )

    def download_address(self, location: S3Location, filename: str, *, seconds: int) -> str:
        """An address from which a client GETs an object, under a name for its disk."""
        with translated(location.uri()):
            return self._public.generate_presigned_url(
                "get_object",
                Params={
                    "Bucket": location.bucket,
                    "Key": location.key,
                    "ResponseContentDisposition": content_disposition(filename),
                },
                ExpiresIn=seconds,
            )


def open_uploads(s3: S3Service, store: Store, public_endpoint: str | None) -> Uploads:
    """Uploads of a store, whose signed addresses begin with the public endpoint.

    Raises:
        ConfigurationError: No client can be made of the settings.
    """
    if public_endpoint is None:
        return Uploads(s3)
    return Uploads(s3, open_store(dataclasses.replace(store, endpoint=public_endpoint)))
