"""The writing half of `S3Service`, with the conditional writes that job records stand on."""

from __future__ import annotations

import base64
import hashlib
import io
import mimetypes
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jobs.addresses import S3Location
from services.s3 import errors as s3_errors
from services.s3 import folders as s3_folders
from services.s3.access import S3Access, etag_of
from services.s3.errors import BucketMissing, ConditionalConflict, NotSupported
from utils.errors import ObjectNotFound
from utils.logger import get_logger

log = get_logger(__name__)

_JSON = "application/json"
# Seconds before a conditional write that met another one is tried again.
_CONFLICT_PAUSES = (0.1, 0.3, 0.9)
_DELETE_BATCH = 1000  # S3's own limit for one request


class S3Writing(S3Access):
    """Everything that changes S3."""

    def upload_file(
        self,
        path: Path,
        location: S3Location,
        *,
        metadata: Mapping[str, str] | None = None,
        content_type: str | None = None,
        only_over: str | None = None,
    ) -> str:
        """Upload a local file with a checksum, which S3 verifies. One request: 5 GB at most.

        Args:
            path: The file.
            location: Where to.
            metadata: The object's own metadata (ASCII).
            content_type: Its type; None to tell by the name.
            only_over: Write only over the version with this ETag; `""`: only where there is no
                object; None: whatever is there. See `create` and `replace`. Left out where the
                store does not honour conditions.

        Returns:
            The new ETag.

        Raises:
            PreconditionFailed, ObjectNotFound: Another version is there, or none.
            AccessDenied, StorageError, MachineError: See `utils.errors`.
        """
        kind = content_type or _content_type(location.key)
        more = {"Metadata": dict(metadata or {})}
        with self._translated(location.uri()), path.open("rb") as file:
            if only_over is not None and self._conditional_writes:
                try:
                    return self._put(location, file, kind, **more, **_condition(only_over))
                except NotSupported as error:
                    self._conditional_writes = False
                    log.warning("writing_without_conditions", reason=str(error))
            return self._put(location, file, kind, **more)

    def upload_folder(
        self,
        folder: Path,
        bucket: str,
        prefix: str,
        *,
        last: str,
        metadata: Mapping[str, str] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, str]:
        """Upload a folder's files under `prefix/`, several at a time, and `last` after all others.

        So whoever sees `last` can rely on the rest. After a failure it was not written.

        Args:
            folder: The folder; files in folders below it are uploaded as well.
            bucket: Where to.
            prefix: Where to.
            last: Name of the file that makes the folder complete.
            metadata: Every object's own metadata (ASCII).
            check: Called before each file, in any of several threads; ends the upload by raising.

        Returns:
            File name (relative, with slashes) to ETag.

        Raises:
            AccessDenied, StorageError, MachineError: See `utils.errors`.
            ValueError: The folder has no file named `last`.
        """
        return s3_folders.upload_folder(
            self, folder, bucket, prefix, last=last, metadata=metadata or {}, check=check
        )

    def write(self, location: S3Location, body: bytes, content_type: str = _JSON) -> str:
        """Write a small object, whatever is there. Returns the new ETag.

        Raises:
            AccessDenied, StorageError: See `utils.errors`.
        """
        return self._put(location, io.BytesIO(body), content_type)

    def create(
        self, location: S3Location, body: bytes, *, metadata: Mapping[str, str] | None = None
    ) -> str:
        """Write a small object only where none is (`If-None-Match: *`). Returns the new ETag.

        Args:
            location: Where to.
            body: The object.
            metadata: Its own metadata (ASCII).

        Raises:
            PreconditionFailed: There is one. It can be this call's own: the SDK repeats a request
                whose answer was lost, and finds what the first one wrote. Read it back to know.
            StorageError: S3 cannot be used; the object may have been written all the same.
        """
        return self._put(
            location, io.BytesIO(body), _JSON, Metadata=dict(metadata or {}), **_condition("")
        )

    def replace(
        self,
        location: S3Location,
        body: bytes,
        etag: str,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Write a small object only over the version `etag` (`If-Match`). Returns the new ETag.

        Args:
            location: Where to.
            body: The object.
            etag: The version that is replaced.
            metadata: The new version's own metadata (ASCII).

        Raises:
            PreconditionFailed: Another version is there; it can be this call's own, as in `create`.
            ObjectNotFound: None is there any more.
            StorageError: S3 cannot be used; the object may have been written all the same.
        """
        return self._put(
            location, io.BytesIO(body), _JSON, Metadata=dict(metadata or {}), **_condition(etag)
        )

    def _put(
        self,
        location: S3Location,
        body: io.BytesIO | io.BufferedReader,
        content_type: str,
        **more: Any,
    ) -> str:
        what = location.uri()
        body.seek(0)
        checksum = self._checksum(body)
        for pause in (*_CONFLICT_PAUSES, None):
            body.seek(0)
            try:
                with self._translated(what):
                    answer = self._client.put_object(
                        Bucket=location.bucket,
                        Key=location.key,
                        Body=body,
                        ContentType=content_type,
                        **checksum,
                        **more,
                    )
                return etag_of(answer, what)
            except ConditionalConflict:
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("the last turn returns or raises")

    def _checksum(self, body: io.BytesIO | io.BufferedReader) -> dict[str, Any]:
        if self._checksums == "md5":
            digest = hashlib.file_digest(body, lambda: hashlib.md5(usedforsecurity=False)).digest()
            return {"ContentMD5": base64.b64encode(digest).decode()}
        digest = hashlib.file_digest(body, "sha256").digest()
        return {
            "ChecksumAlgorithm": "SHA256",
            "ChecksumSHA256": base64.b64encode(digest).decode(),
        }

    def copy(
        self,
        source: S3Location,
        target: S3Location,
        *,
        metadata: Mapping[str, str] | None = None,
        etag: str | None = None,
    ) -> str:
        """Copy an object inside S3 (5 GB at most). Returns the new ETag.

        Args:
            source: The object to copy.
            target: Location of the copy.
            metadata: Replaces the object's own metadata; None keeps it.
            etag: Copy only if the source still has this ETag (`CopySourceIfMatch`); None copies
                any version.

        Raises:
            PreconditionFailed: The source has another version.
            ObjectNotFound, AccessDenied, StorageError: See `utils.errors`.
        """
        what = source.uri()
        replaced: dict[str, Any] = {"CopySourceIfMatch": etag} if etag else {}
        if metadata is not None:
            # Replacing the metadata drops the type as well, so it is said again.
            replaced |= {
                "MetadataDirective": "REPLACE",
                "Metadata": dict(metadata),
                "ContentType": _content_type(target.key),
            }
        with self._translated(what):
            answer = self._client.copy_object(
                Bucket=target.bucket,
                Key=target.key,
                CopySource={"Bucket": source.bucket, "Key": source.key},
                **replaced,
            )
        return etag_of(answer.get("CopyObjectResult", {}), what)

    def delete_version(self, location: S3Location, etag: str) -> None:
        """Delete an object if it still has the version `etag` (`If-Match`).

        An object that does not exist is no error. A store without conditional deletes deletes any
        version, so callers also need another guard.

        Raises:
            PreconditionFailed: The object has another version, and stays.
            AccessDenied, StorageError: See `utils.errors`.
        """
        place: dict[str, Any] = {"Bucket": location.bucket, "Key": location.key}
        try:
            with self._translated(location.uri()):
                self._client.delete_object(**place, IfMatch=etag)
        except ObjectNotFound:
            pass
        except NotSupported:
            with self._translated(location.uri()):
                self._client.delete_object(**place)

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there are no error.

        Raises:
            AccessDenied, StorageError: Some could not be deleted.
        """
        remaining = list(keys)
        while remaining:
            batch, remaining = remaining[:_DELETE_BATCH], remaining[_DELETE_BATCH:]
            if self._deletes_one_by_one:
                self._delete_singly(bucket, batch)
            else:
                self._delete_batch(bucket, batch)

    def _delete_batch(self, bucket: str, batch: list[str]) -> None:
        try:
            with self._translated(f"s3://{bucket}/{batch[0]}"):
                answer = self._client.delete_objects(
                    Bucket=bucket,
                    Delete={"Objects": [{"Key": key} for key in batch], "Quiet": True},
                )
        except BucketMissing:
            raise
        except (NotSupported, ObjectNotFound) as error:  # a store without this request
            self._delete_singly(bucket, batch)
            self._deletes_one_by_one = True
            log.info("deleting_one_by_one", bucket=bucket, reason=str(error))
            return
        for refused in answer.get("Errors", ()):
            what = f"s3://{bucket}/{refused.get('Key', '')}"
            raise s3_errors.from_answer(refused.get("Code", ""), 200, what)

    def _delete_singly(self, bucket: str, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                with self._translated(f"s3://{bucket}/{key}"):
                    self._client.delete_object(Bucket=bucket, Key=key)
            except BucketMissing:
                raise
            except ObjectNotFound:
                pass  # S3 answers 204 for what is not there, other stores 404


def _condition(etag: str) -> dict[str, str]:
    return {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}


def _content_type(key: str) -> str:
    return mimetypes.guess_type(key)[0] or "application/octet-stream"
