"""S3 in memory: `S3Service` itself, over a client that keeps its objects in a dictionary.

It knows conditions on writes, copies, reads and deletions as S3 does. `before` is called ahead of
every request, so that a test can stop, delay or break the work between any two of them.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

from botocore.exceptions import ClientError
from botocore.response import StreamingBody

from services.s3.s3_service import S3Service
from utils.errors import StorageError

Before = Callable[[str, str, str], None]


@dataclasses.dataclass(frozen=True)
class StoredObject:
    """An object's content, metadata, and date."""

    body: bytes
    metadata: Mapping[str, str]
    written_at: datetime.datetime

    @property
    def etag(self) -> str:
        """As S3 makes it for an upload in one request."""
        return f'"{hashlib.md5(self.body).hexdigest()}"'


class MemoryS3(S3Service):
    """The service over one store.

    Args:
        objects: (bucket, key) to object; several services may share one.

    Attributes:
        before: Called with method, bucket and key ahead of each request; raising fails it.
        now: The store's clock.
        requests: Method and key of every request.
    """

    def __init__(self, objects: dict[tuple[str, str], StoredObject] | None = None) -> None:
        self.objects = {} if objects is None else objects
        self.before: Before = lambda method, bucket, key: None
        self.now = datetime.datetime(2025, 1, 20, 12, tzinfo=datetime.UTC)
        self.requests: list[tuple[str, str]] = []
        super().__init__(region="", attempts=1, client=cast(Any, _Client(self)))

    def asked(self, method: str, bucket: str, key: str) -> None:
        """Called ahead of each request."""
        self.requests.append((method, key))
        self.before(method, bucket, key)

    def pass_seconds(self, seconds: float) -> None:
        """Let time pass: every object becomes older."""
        self.now += datetime.timedelta(seconds=seconds)

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """The keys of a bucket, in order."""
        return sorted(
            key for place, key in self.objects if place == bucket and key.startswith(prefix)
        )

    def count(self, method: str) -> int:
        """How many requests of this kind were made."""
        return sum(made == method for made, _ in self.requests)

    def change(self, bucket: str, key: str, **values: Any) -> None:
        """Change an object as another client would: its body, metadata or date."""
        self.objects[bucket, key] = dataclasses.replace(self.objects[bucket, key], **values)


class _Raw(io.BytesIO):
    def shutdown(self) -> None:
        """Called when a body takes too long."""


class _Client:
    def __init__(self, store: MemoryS3) -> None:
        self._store = store
        self._lock = threading.RLock()

    def _at(self, bucket: str, key: str) -> StoredObject | None:
        return self._store.objects.get((bucket, key))

    def _existing(self, bucket: str, key: str) -> StoredObject:
        found = self._at(bucket, key)
        if found is None:
            raise _error("NoSuchKey", 404)
        return found

    def _answer(self, found: StoredObject) -> dict[str, Any]:
        date = self._store.now.strftime("%a, %d %b %Y %H:%M:%S GMT")
        return {
            "ETag": found.etag,
            "LastModified": found.written_at,
            "ContentLength": len(found.body),
            "Metadata": dict(found.metadata),
            "ResponseMetadata": {"HTTPHeaders": {"date": date}},
        }

    def _write(self, bucket: str, key: str, body: bytes, metadata: Mapping[str, str]) -> str:
        written = StoredObject(body, dict(metadata), self._store.now)
        self._store.objects[bucket, key] = written
        return written.etag

    # The names and arguments are boto3's.
    # pylint: disable=invalid-name,missing-function-docstring

    def put_object(self, *, Bucket: str, Key: str, Body: Any, **more: Any) -> dict[str, Any]:
        self._store.asked("PUT", Bucket, Key)
        body = Body.read()
        with self._lock:
            there = self._at(Bucket, Key)
            if more.get("IfNoneMatch") == "*" and there is not None:
                raise _error("PreconditionFailed", 412)
            if "IfMatch" in more and self._existing(Bucket, Key).etag != more["IfMatch"]:
                raise _error("PreconditionFailed", 412)
            return {"ETag": self._write(Bucket, Key, body, more.get("Metadata", {}))}

    def get_object(self, *, Bucket: str, Key: str, IfMatch: str | None = None) -> dict[str, Any]:
        self._store.asked("GET", Bucket, Key)
        found = self._existing(Bucket, Key)
        if IfMatch not in (None, found.etag):
            raise _error("PreconditionFailed", 412)
        stream = cast(Any, _Raw(found.body))
        return self._answer(found) | {"Body": StreamingBody(stream, len(found.body))}

    def head_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        self._store.asked("HEAD", Bucket, Key)
        return self._answer(self._existing(Bucket, Key))

    def copy_object(
        self, *, Bucket: str, Key: str, CopySource: dict[str, str], **more: Any
    ) -> dict[str, Any]:
        self._store.asked("COPY", Bucket, Key)
        with self._lock:
            source = self._existing(CopySource["Bucket"], CopySource["Key"])
            if more.get("CopySourceIfMatch") not in (None, source.etag):
                raise _error("PreconditionFailed", 412)
            metadata = more.get("Metadata", source.metadata)
            return {"CopyObjectResult": {"ETag": self._write(Bucket, Key, source.body, metadata)}}

    def delete_object(self, *, Bucket: str, Key: str, IfMatch: str | None = None) -> dict[str, Any]:
        self._store.asked("DELETE", Bucket, Key)
        with self._lock:
            if IfMatch is not None and self._existing(Bucket, Key).etag != IfMatch:
                raise _error("PreconditionFailed", 412)
            self._store.objects.pop((Bucket, Key), None)
        return {}

    def delete_objects(self, *, Bucket: str, Delete: dict[str, Any]) -> dict[str, Any]:
        keys = [each["Key"] for each in Delete["Objects"]]
        self._store.asked("DELETE", Bucket, " ".join(keys))
        with self._lock:
            for key in keys:
                self._store.objects.pop((Bucket, key), None)
        return {}

    def list_objects_v2(self, *, Bucket: str, Prefix: str) -> dict[str, Any]:
        self._store.asked("LIST", Bucket, Prefix)
        with self._lock:
            found = sorted(self._store.objects.items())
        contents = [
            {"Key": key, "Size": len(each.body), "ETag": each.etag, "LastModified": each.written_at}
            for (bucket, key), each in found
            if bucket == Bucket and key.startswith(Prefix)
        ]
        return {"IsTruncated": False, "Contents": contents}


def _error(code: str, status: int) -> ClientError:
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "request")


def works(_method: str, _bucket: str, _key: str) -> None:
    """For `MemoryS3.before`: nothing is wrong."""


def away(method: str, bucket: str, key: str) -> None:
    """For `MemoryS3.before`: a store that cannot be reached."""
    raise StorageError(f"S3 is away ({method} {bucket} {key})")
