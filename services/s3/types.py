"""Facts of S3: frozen, and free of any client library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from jobs.addresses import S3Location


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What S3 says of an object without its body.

    Attributes:
        size: Bytes.
        etag: As S3 wrote it, quotes included.
        last_modified: S3's own date, with its time zone.
        metadata: The object's own metadata; empty in a listing, which does not tell.
    """

    key: str
    size: int
    etag: str
    last_modified: datetime
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredObject:
    """A small object, whole, with all that a lease is judged by.

    Attributes:
        etag: Names this version; give it back to `S3Service.replace`.
        last_modified: When this version was written, by S3's clock.
        server_date: What S3's clock said when it answered.
        metadata: Its own metadata.
    """

    body: bytes
    etag: str
    last_modified: datetime
    server_date: datetime
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRequest:
    """An image that a job asks for.

    Attributes:
        source: Its address in the message's own spelling, for the report.
        location: Where that is.
        caption: Its caption; None to look for a caption file beside the image.
        version_id: The version of the object that is meant; None for the present one.
    """

    source: str
    location: S3Location
    caption: str | None = None
    version_id: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class FetchedImage:
    """What became of a `ImageRequest`.

    Attributes:
        source: As in the request.
        path: The local file; None where the image could not be fetched.
        caption: The request's caption, or the text found beside the image, or None.
        problem: Why it could not be fetched, for an artist to read ("could not be found in
            storage"); else None.
        caption_problem: Why the caption found beside it is ignored; None where it is not.
    """

    source: str
    path: Path | None
    caption: str | None = None
    problem: str | None = None
    caption_problem: str | None = None
