"""S3 in memory, for fast tests of what is decided on it; the adapter has tests on a real server.

It honours conditional writes, keeps metadata, and has a clock of its own: `pass_seconds` makes
every object older. `fail` is called with the operation and the key before each request.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.s3_service import FetchedPicture, ObjectInfo, PictureRequest, S3Location, StoredObject
from utils.errors import ObjectNotFound, PreconditionFailed, StorageError


@dataclasses.dataclass(slots=True)
class _Object:
    body: bytes
    metadata: Mapping[str, str]
    written_at: datetime.datetime

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.body, usedforsecurity=False).hexdigest()}"'


class MemoryS3:
    """Stands in for `S3Service`."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], _Object] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], None] = lambda operation, key: None
        self._now = datetime.datetime.now(datetime.UTC)

    def pass_seconds(self, seconds: float) -> None:
        """Let time go by."""
        self._now += datetime.timedelta(seconds=seconds)

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """The keys of a bucket, in order."""
        return sorted(
            key for place, key in self.objects if place == bucket and key.startswith(prefix)
        )

    def count(self, operation: str) -> int:
        """How many requests of this kind were made."""
        return sum(made == operation for made, _ in self.requests)

    def read(self, location: S3Location, **_: Any) -> StoredObject:
        self._request("read", location.key)
        found = self._find(location)
        return StoredObject(found.body, found.etag, found.written_at, self._now, found.metadata)

    def write(self, location: S3Location, body: bytes, content_type: str = "") -> str:
        del content_type
        self._request("write", location.key)
        return self._put(location, body, {})

    def create(
        self, location: S3Location, body: bytes, *, metadata: Mapping[str, str] | None = None
    ) -> str:
        self._request("create", location.key)
        if (location.bucket, location.key) in self.objects:
            raise PreconditionFailed()
        return self._put(location, body, metadata or {})

    def replace(
        self,
        location: S3Location,
        body: bytes,
        etag: str,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        self._request("replace", location.key)
        if self._find(location).etag != etag:
            raise PreconditionFailed()
        return self._put(location, body, metadata or {})

    def exists(self, location: S3Location) -> bool:
        self._request("head", location.key)
        return (location.bucket, location.key) in self.objects

    def head(self, location: S3Location, **_: Any) -> ObjectInfo:
        self._request("head", location.key)
        return self._info(location.key, self._find(location))

    def delete(self, bucket: str, keys: Iterable[str]) -> None:
        for key in list(keys):
            self._request("delete", key)
            self.objects.pop((bucket, key), None)

    def list_objects(self, bucket: str, prefix: str) -> Iterator[ObjectInfo]:
        self._request("list", prefix)
        for key in self.keys(bucket, prefix):
            yield self._info(key, self.objects[bucket, key])

    def fetch_pictures(
        self, requests: Sequence[PictureRequest], folder: Path, **_: Any
    ) -> list[FetchedPicture]:
        fetched = []
        for number, one in enumerate(requests):
            self._request("read", one.location.key)
            found = self.objects.get((one.location.bucket, one.location.key))
            if found is None:
                problem = "could not be found in storage"
                fetched.append(FetchedPicture(one.source, None, None, problem))
                continue
            path = folder / str(number)
            path.write_bytes(found.body)
            fetched.append(FetchedPicture(one.source, path, one.caption))
        return fetched

    def download_folder(self, bucket: str, prefix: str, target: Path, **_: Any) -> int:
        size = 0
        for key in self.keys(bucket, prefix):
            self._request("read", key)
            (target / key.removeprefix(prefix)).write_bytes(self.objects[bucket, key].body)
            size += 1
        if not size:
            raise ObjectNotFound()
        return size

    def upload_folder(
        self,
        folder: Path,
        bucket: str,
        prefix: str,
        *,
        last: str,
        metadata: Mapping[str, str] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        names = sorted(path.name for path in folder.iterdir() if path.name != last)
        for name in (*names, last):
            check()
            self._request("write", prefix + name)
            self._put(
                S3Location(bucket, prefix + name), (folder / name).read_bytes(), metadata or {}
            )

    def _request(self, operation: str, key: str) -> None:
        self.requests.append((operation, key))
        self.fail(operation, key)

    def _find(self, location: S3Location) -> _Object:
        try:
            return self.objects[location.bucket, location.key]
        except KeyError:
            raise ObjectNotFound(location.uri()) from None

    def _put(self, location: S3Location, body: bytes, metadata: Mapping[str, str]) -> str:
        written = _Object(body, dict(metadata), self._now)
        self.objects[location.bucket, location.key] = written
        return written.etag

    def _info(self, key: str, found: _Object) -> ObjectInfo:
        return ObjectInfo(key, len(found.body), found.etag, found.written_at, found.metadata)


def away(operation: str, key: str) -> None:
    """A store that cannot be reached, for `MemoryS3.fail`."""
    raise StorageError(f"S3 is away ({operation} {key})")
