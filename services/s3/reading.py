"""The reading half of `S3Service`."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jobs.addresses import S3Location
from services.s3 import folders as s3_folders
from services.s3 import image_download as image_download
from services.s3.access import (
    S3Access,
    check_page,
    etag_of,
    last_modified_of,
    server_date_of,
)
from services.s3.body import copy_body
from services.s3.errors import Transient, VersionNotServed
from services.s3.gzip import Gunzip, is_gzipped
from services.s3.types import FetchedImage, ImageRequest, ObjectInfo, StoredObject
from utils.errors import ObjectNotFound
from utils.logger import get_logger

log = get_logger(__name__)

_RECORD_BYTES = 4 * 1024**2  # a job record has a few kilobytes


def _nothing() -> None:
    """The default `watch`."""


class S3Reading(S3Access):
    """Everything that leaves S3 as it is."""

    def fetch_images(
        self,
        sources: Sequence[ImageRequest],
        folder: Path,
        *,
        max_bytes: int,
        stop: Callable[[], bool],
    ) -> tuple[FetchedImage, ...]:
        """Fetch images side by side into `folder`, under our own names (`0000.img`, …).

        An image that is missing, forbidden or too large is reported, not raised: the job may go
        on without it.

        Args:
            sources: What to fetch.
            folder: Where to.
            max_bytes: The most that one image may have.
            stop: Asked often, from several threads; once true, what is not there yet is reported
                as stopped. Whoever gave it asks it again before judging the result.

        Returns:
            One entry for each of `sources`, in their order.

        Raises:
            AccessDenied: Every image was refused: a policy's fault, not the images'.
            StorageError: S3 as a whole cannot be used.
            DiskFull: The worker's disk is full.
        """
        return image_download.fetch_images(self, sources, folder, max_bytes=max_bytes, stop=stop)

    def download(
        self,
        location: S3Location,
        path: Path,
        *,
        max_bytes: int | None = None,
        watch: Callable[[], None] = _nothing,
        etag: str | None = None,
        version_id: str | None = None,
    ) -> int:
        """Write an object into a local file, which appears only when it is whole.

        Args:
            location: The object.
            path: The file; missing folders are made.
            max_bytes: More is refused, before and while downloading.
            watch: Called between chunks; what it raises ends the download.
            etag: Download only if the object has this ETag (`If-Match`); None takes any version.
            version_id: The version that is meant; None for the present one.

        Returns:
            Bytes written.

        Raises:
            PreconditionFailed: The object has another version.
            ObjectNotFound, AccessDenied, ObjectTooLarge, StorageError, MachineError: See
                `utils.errors`. A checksum that differs is a `StorageError`.
        """
        part = path.with_name(path.name + ".part")
        with self._translated(location.uri()):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    self._pull(location, file, max_bytes, watch, etag=etag, version_id=version_id)
                    size = file.tell()
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        return size

    def download_folder(
        self, bucket: str, prefix: str, target: Path, *, max_bytes: int | None = None
    ) -> int:
        """Download everything under `prefix/` into `target`, under the same names.

        Returns:
            Bytes written.

        Raises:
            ObjectNotFound: Nothing is there.
            ObjectTooLarge: It has more than `max_bytes` in all.
            StorageError: A name is not a plain relative one, or S3 cannot be used.
            MachineError: The worker's disk refuses.
        """
        return s3_folders.download_folder(self, bucket, prefix, target, max_bytes=max_bytes)

    def read(self, location: S3Location, *, max_bytes: int = _RECORD_BYTES) -> StoredObject:
        """A small object, whole, with its version and both of S3's dates.

        Raises:
            ObjectNotFound, AccessDenied, ObjectTooLarge, StorageError: See `utils.errors`.
        """
        what = location.uri()
        sink = io.BytesIO()
        answer = self._pull(location, sink, max_bytes, _nothing)
        return StoredObject(
            body=sink.getvalue(),
            etag=etag_of(answer, what),
            last_modified=last_modified_of(answer, what),
            server_date=server_date_of(answer, what),
            metadata=dict(answer.get("Metadata", {})),
        )

    def _pull(
        self,
        location: S3Location,
        sink: BinaryIO,
        max_bytes: int | None,
        watch: Callable[[], None],
        *,
        etag: str | None = None,
        version_id: str | None = None,
    ) -> Mapping[str, Any]:
        """GET into `sink`.

        The SDK repeats what fails before an answer's body begins, this what fails inside it.
        """
        what = location.uri()
        which: dict[str, Any] = {"IfMatch": etag} if etag else {}
        if version_id:
            which["VersionId"] = version_id
        if not location.key:
            raise ObjectNotFound(f"{what}: an object has a key")
        for left in reversed(range(self._attempts)):
            if sink.tell():
                sink.seek(0)
                sink.truncate()
            with self._translated(what):
                answer = self._client.get_object(Bucket=location.bucket, Key=location.key, **which)
            _require_version(answer, version_id, what)
            unpacking = Gunzip(sink, max_bytes=max_bytes, what=what) if is_gzipped(answer) else None
            try:
                with self._translated(what):
                    copy_body(
                        answer["Body"],
                        unpacking or sink,
                        declared=answer.get("ContentLength"),
                        max_bytes=max_bytes,
                        watch=watch,
                        what=what,
                    )
                if unpacking:
                    unpacking.close()
                return answer
            except Transient as error:
                if not left:
                    raise
                log.info("download_repeated", object=what, reason=str(error))
        raise AssertionError("attempts is at least 1")

    def head(self, location: S3Location, *, version_id: str | None = None) -> ObjectInfo:
        """What S3 says of an object, or of one version of it, its metadata included.

        Raises:
            ObjectNotFound, AccessDenied, StorageError: See `utils.errors`.
        """
        what = location.uri()
        with self._translated(what):
            answer = self._client.head_object(
                Bucket=location.bucket, Key=location.key, **_version(version_id)
            )
        return ObjectInfo(
            key=location.key,
            size=answer.get("ContentLength", 0),
            etag=etag_of(answer, what),
            last_modified=last_modified_of(answer, what),
            metadata=dict(answer.get("Metadata", {})),
        )

    def exists(self, location: S3Location) -> bool:
        """Whether the object is there.

        Raises:
            AccessDenied, StorageError: It cannot be said.
        """
        try:
            self.head(location)
        except ObjectNotFound:
            return False
        return True

    def reach(self, bucket: str) -> None:
        """Make sure that the bucket can be reached now, by the cheapest of requests.

        Raises:
            ObjectNotFound, AccessDenied, StorageError: See `utils.errors`.
        """
        with self._translated(f"s3://{bucket}"):
            self._client.head_bucket(Bucket=bucket)

    def list_objects(self, bucket: str, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, by key; pages are asked for as needed.

        Raises:
            ObjectNotFound: The bucket does not exist.
            AccessDenied, StorageError: See `utils.errors`.
        """
        what = f"s3://{bucket}/{prefix}"
        more: dict[str, Any] = {}
        while True:
            with self._translated(what):
                page = self._client.list_objects_v2(Bucket=bucket, Prefix=prefix, **more)
            check_page(page, what)
            for item in page.get("Contents", ()):
                yield ObjectInfo(
                    key=item.get("Key", ""),
                    size=item.get("Size", 0),
                    etag=etag_of(item, what),
                    last_modified=last_modified_of(item, what),
                )
            if not page.get("NextContinuationToken"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}


def _version(version_id: str | None) -> dict[str, Any]:
    return {"VersionId": version_id} if version_id else {}


def _require_version(answer: Mapping[str, Any], wanted: str | None, what: str) -> None:
    """A store without versions ignores the request for one, and would give the present object."""
    # "null" names the version that was written without versioning, where no id is answered.
    if wanted and answer.get("VersionId", "null") != wanted:
        answer["Body"].close()
        raise VersionNotServed(f"{what}: the store did not answer with the version {wanted}")
