"""S3: inputs in, checkpoints and models in and out, and conditional writes for job records.

Every public method raises errors of `utils.errors` and nothing else: `StorageError` and its
subclasses for S3, `MachineError` and `DiskFull` for the local disk.
"""

from __future__ import annotations

import base64
import hashlib
import io
import mimetypes
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from jobs.addresses import S3Location
from services.s3.body import copy_body
from services.s3.client import open_client, translated
from services.s3.errors import (
    BucketMissing,
    ConditionalConflict,
    NotSupported,
    Transient,
    VersionNotServed,
    from_answer,
)
from services.s3.types import (
    ObjectInfo,
    StoredObject,
    check_page,
    etag_of,
    last_modified_of,
    server_date_of,
)
from utils.errors import ObjectNotFound, ObjectTooLarge, StorageError
from utils.logger import get_logger
from utils.metrics import Metrics
from utils.settings.storage import Store
from utils.threads import in_parallel

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["ObjectInfo", "S3Service", "StoredObject"]

log = get_logger(__name__)

FILES_AT_ONCE = 4

_JSON = "application/json"
_RECORD_BYTES = 4 * 1024**2  # a job record has a few kilobytes
# Seconds before a conditional write that met another one is tried again.
_CONFLICT_PAUSES = (0.1, 0.3, 0.9)
_DELETE_BATCH = 1000  # S3's limit for one request
_SAFE_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def _nothing() -> None:
    """The default `watch`."""


class S3Service:
    """S3, or a store with the same interface. Safe to share between threads.

    Args:
        region: AWS region of the buckets.
        endpoint_url: Address of another store than AWS; requests to it use the path style.
        ignore_configured_endpoints: Ignore an address in boto3's own configuration.
        access_key_id: Access key; None for boto3's own chain (environment, profile, instance role).
        secret_access_key: Its secret.
        session_token: The third part of temporary credentials; None for permanent ones.
        checksums: The checksum of uploads, for the store to verify: `sha256` in S3's own header,
            or `md5` in `Content-MD5`, which every store takes. With `md5` nothing else is sent that
            only AWS is sure to know: no checksums are asked for, and objects are deleted singly.
        conditional_writes: False for a store that ignores or refuses conditions on a PUT:
            `upload_file` then writes without them. `create` and `replace` always send theirs.
        connect_timeout: Seconds to wait for a connection.
        read_timeout: Seconds to wait for the next bytes.
        attempts: Tries per request, in all, if it fails for a passing reason.
        metrics: Counts requests and bytes; None counts nothing.
        client: A client to use; None makes one of boto3's from the values above.

    Raises:
        ConfigurationError: No client can be made of the values.
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
        client: S3Client | None = None,
    ) -> None:
        self._client = client or open_client(
            region=region,
            endpoint_url=endpoint_url,
            ignore_configured_endpoints=ignore_configured_endpoints,
            keys=(access_key_id, secret_access_key, session_token),
            timeouts=(connect_timeout, read_timeout),
            attempts=attempts,
            validates_answers=checksums == "sha256",
            metrics=metrics,
        )
        self._attempts = attempts
        self._checksums = checksums
        self._conditional_writes = conditional_writes
        # The request that deletes many objects needs a checksum that not every store takes.
        self._deletes_one_by_one = checksums == "md5"

    @property
    def client(self) -> S3Client:
        """boto3's client, for the other modules of this package."""
        return self._client

    @property
    def endpoint(self) -> str:
        """The address that requests go to, from whichever configuration."""
        return str(self._client.meta.endpoint_url)

    # ---- reading ---------------------------------------------------------------------------------

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
        """Write an object into a local file, which appears only when it is complete.

        Args:
            location: The object.
            path: The file; missing folders are made.
            max_bytes: A larger object is refused, before and during the download.
            watch: Called between chunks; an error that it raises ends the download.
            etag: Download only if the object has this ETag (`If-Match`); None takes any version.
            version_id: The version to read; None for the current one.

        Returns:
            Bytes written.

        Raises:
            PreconditionFailed: The object has another version.
            ObjectNotFound, AccessDenied, ObjectTooLarge, StorageError, MachineError: See
                `utils.errors`. A checksum that differs is a `StorageError`.
        """
        part = path.with_name(path.name + ".part")
        with translated(location.uri()):
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
            ObjectNotFound: There are no objects under the prefix.
            ObjectTooLarge: The objects have more than `max_bytes` in all.
            StorageError: A name is not a plain relative one, or S3 cannot be used.
            MachineError: The worker's disk cannot be written.
        """
        prefix = _joined(prefix, "")
        what = f"s3://{bucket}/{prefix}"
        objects = {
            info.key.removeprefix(prefix): info
            for info in self.list_objects(bucket, prefix)
            if info.key != prefix  # an empty object that some tools make to show a folder
        }
        if not objects:
            raise ObjectNotFound(f"{what}: there are no objects under this prefix")
        for name in objects:
            _refuse_unsafe(name, what)
        total = sum(info.size for info in objects.values())
        if max_bytes is not None and total > max_bytes:
            raise ObjectTooLarge(
                f"{what}: the objects have {total} bytes, more than the allowed {max_bytes}"
            )

        def download(name: str) -> int:
            info = objects[name]
            return self.download(S3Location(bucket, info.key), target / name, max_bytes=info.size)

        return sum(in_parallel(download, objects, at_once=FILES_AT_ONCE, name="s3-folder"))

    def read(self, location: S3Location, *, max_bytes: int = _RECORD_BYTES) -> StoredObject:
        """A small object with its body, its version and both of S3's dates.

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

        The SDK repeats requests that fail before the answer's body begins. This method repeats
        those that fail inside the body.
        """
        what = location.uri()
        which: dict[str, Any] = {"IfMatch": etag} if etag else {}
        if version_id:
            which["VersionId"] = version_id
        if not location.key:
            raise ObjectNotFound(f"{what}: the address names no object; add its key")
        for left in reversed(range(self._attempts)):
            if sink.tell():
                sink.seek(0)
                sink.truncate()
            with translated(what):
                answer = self._client.get_object(Bucket=location.bucket, Key=location.key, **which)
            _require_version(answer, version_id, what)
            try:
                with translated(what):
                    copy_body(answer, sink, max_bytes=max_bytes, watch=watch, what=what)
                return answer
            except Transient as error:
                if not left:
                    raise
                log.info("download_repeated", object=what, reason=str(error))
        raise AssertionError("attempts is at least 1")

    def head(self, location: S3Location, *, version_id: str | None = None) -> ObjectInfo:
        """The facts about an object, or about one version of it, with its metadata.

        Raises:
            ObjectNotFound, AccessDenied, StorageError: See `utils.errors`.
        """
        what = location.uri()
        with translated(what):
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
        """Whether the object exists.

        Raises:
            AccessDenied, StorageError: S3 does not answer the question.
        """
        try:
            self.head(location)
        except ObjectNotFound:
            return False
        return True

    def reach(self, bucket: str) -> None:
        """Make sure that the bucket can be reached now, by the cheapest request.

        Raises:
            ObjectNotFound, AccessDenied, StorageError: See `utils.errors`.
        """
        with translated(f"s3://{bucket}"):
            self._client.head_bucket(Bucket=bucket)

    def list_objects(self, bucket: str, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, by key; pages are requested as needed.

        Raises:
            ObjectNotFound: The bucket does not exist.
            AccessDenied, StorageError: See `utils.errors`.
        """
        what = f"s3://{bucket}/{prefix}"
        more: dict[str, Any] = {}
        while True:
            with translated(what):
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

    # ---- writing ---------------------------------------------------------------------------------

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
            location: The target.
            metadata: The object's own metadata (ASCII).
            content_type: Its type; None derives it from the name.
            only_over: Write only over the version with this ETag; `""`: only if there is no
                object; None: unconditionally. See `create` and `replace`. The condition is left
                out for a store that does not honour it.

        Returns:
            The new ETag.

        Raises:
            PreconditionFailed, ObjectNotFound: The object has another version, or is missing.
            AccessDenied, StorageError, MachineError: See `utils.errors`.
        """
        kind = content_type or _content_type(location.key)
        more = {"Metadata": dict(metadata or {})}
        with translated(location.uri()), path.open("rb") as file:
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

        So if `last` exists, the folder is complete. After a failure `last` was not written.

        Args:
            folder: The folder; files in folders below it are uploaded as well.
            bucket, prefix: The target.
            last: Name of the file that makes the folder complete.
            metadata: Every object's own metadata (ASCII).
            check: Called before each file, in several threads; an error that it raises ends the
                upload.

        Returns:
            File name (relative, with slashes) to ETag.

        Raises:
            AccessDenied, StorageError, MachineError: See `utils.errors`.
            ValueError: The folder has no file named `last`.
        """
        names = sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )
        if last not in names:
            raise ValueError(f"{last} is not in the folder, so nothing can mark it as complete")
        names.remove(last)

        def upload(name: str) -> str:
            check()
            location = S3Location(bucket, _joined(prefix, name))
            return self.upload_file(folder / name, location, metadata=metadata)

        etags = in_parallel(upload, names, at_once=FILES_AT_ONCE, name="s3-folder")
        return dict(zip(names, etags, strict=True)) | {last: upload(last)}

    def write(self, location: S3Location, body: bytes, content_type: str = _JSON) -> str:
        """Write a small object unconditionally. Returns the new ETag.

        Raises:
            AccessDenied, StorageError: See `utils.errors`.
        """
        return self._put(location, io.BytesIO(body), content_type)

    def create(
        self, location: S3Location, body: bytes, *, metadata: Mapping[str, str] | None = None
    ) -> str:
        """Write a small object only if there is none (`If-None-Match: *`). Returns the new ETag.

        Args:
            location: The target.
            body: The object.
            metadata: Its own metadata (ASCII).

        Raises:
            PreconditionFailed: There is one. This call may have written it: the SDK repeats a
                request whose answer was lost, and finds the object of the first one. Read the
                object to find out.
            StorageError: S3 cannot be used; the object may have been written nevertheless.
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
            location: The target.
            body: The object.
            etag: The version to replace.
            metadata: The new version's own metadata (ASCII).

        Raises:
            PreconditionFailed: The object has another version; this call may have written it, as in
                `create`.
            ObjectNotFound: The object no longer exists.
            StorageError: S3 cannot be used; the object may have been written nevertheless.
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
                with translated(what):
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
            # Replacing the metadata drops the type as well, so the type is repeated.
            replaced |= {
                "MetadataDirective": "REPLACE",
                "Metadata": dict(metadata),
                "ContentType": _content_type(target.key),
            }
        with translated(what):
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
            with translated(location.uri()):
                self._client.delete_object(**place, IfMatch=etag)
        except ObjectNotFound:
            pass
        except NotSupported:
            with translated(location.uri()):
                self._client.delete_object(**place)

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        """Delete objects; a missing object is no error.

        Raises:
            AccessDenied, StorageError: An object could not be deleted.
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
            with translated(f"s3://{bucket}/{batch[0]}"):
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
            raise from_answer(refused.get("Code", ""), 200, what)

    def _delete_singly(self, bucket: str, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                with translated(f"s3://{bucket}/{key}"):
                    self._client.delete_object(Bucket=bucket, Key=key)
            except BucketMissing:
                raise
            except ObjectNotFound:
                pass  # S3 answers 204 for a missing object, other stores 404


def _joined(prefix: str, name: str) -> str:
    return f"{prefix.rstrip('/')}/{name}" if prefix else name


def _refuse_unsafe(name: str, where: str) -> None:
    """Refuse a name that could lead outside a folder; names that this server writes are plain."""
    if not all(_SAFE_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise StorageError(
            f"{where}: holds {name!r}, which is not a file of this server. Remove the object."
        )


def _version(version_id: str | None) -> dict[str, Any]:
    return {"VersionId": version_id} if version_id else {}


def _require_version(answer: Mapping[str, Any], wanted: str | None, what: str) -> None:
    """A store without versions ignores the request for one and returns the current object."""
    # "null" names the version that was written without versioning; its answer has no id.
    if wanted and answer.get("VersionId", "null") != wanted:
        answer["Body"].close()
        raise VersionNotServed(
            f"{what}: the store did not return the version {wanted}; does the bucket have versions?"
        )


def _condition(etag: str) -> dict[str, str]:
    return {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}


def _content_type(key: str) -> str:
    return mimetypes.guess_type(key)[0] or "application/octet-stream"


def open_store(
    store: Store, *, attempts: int = 3, patience: float = 20.0, metrics: Metrics | None = None
) -> S3Service:
    """A client of a store that the settings name.

    Args:
        attempts: Tries per request, in all, if it fails for a passing reason.
        patience: Seconds to wait for a connection, and for the next bytes.
        metrics: Counts requests and bytes; None counts nothing.

    Raises:
        ConfigurationError: No client can be made of the settings.
    """
    return S3Service(
        region=store.region,
        endpoint_url=store.endpoint,
        ignore_configured_endpoints=store.ignore_configured_endpoints,
        access_key_id=store.access_key_id,
        secret_access_key=store.secret_access_key,
        session_token=store.session_token,
        checksums=store.checksums,
        conditional_writes=store.conditional_writes,
        connect_timeout=min(5.0, patience),
        read_timeout=patience,
        attempts=attempts,
        metrics=metrics,
    )
