"""Whole folders to and from S3, several files at a time."""

from __future__ import annotations

import contextvars
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from jobs.addresses import S3Location
from services.s3.types import ObjectInfo
from utils.errors import ObjectNotFound, ObjectTooLarge, StorageError

T = TypeVar("T")

AT_ONCE = 4

_SAFE_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class Writer(Protocol):
    """What an upload needs of `S3Service`."""

    def upload_file(
        self, path: Path, location: S3Location, *, metadata: Mapping[str, str] = ...
    ) -> str:
        """Upload one file; its ETag."""


class Reader(Protocol):
    """What a download needs of `S3Service`."""

    def download(self, location: S3Location, path: Path, *, max_bytes: int | None = None) -> int:
        """Download one object; its size in bytes."""

    def list_objects(self, bucket: str, prefix: str) -> Iterator[ObjectInfo]:
        """The objects under a prefix."""


def upload_folder(
    store: Writer,
    folder: Path,
    bucket: str,
    prefix: str,
    *,
    last: str,
    metadata: Mapping[str, str],
    check: Callable[[], None],
) -> dict[str, str]:
    """Upload every file of a folder; see `S3Service.upload_folder`."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    if last not in names:
        raise ValueError(f"{last} is not in the folder, so nothing can mark it as complete")
    names.remove(last)

    def upload(name: str) -> str:
        check()
        location = S3Location(bucket, _joined(prefix, name))
        return store.upload_file(folder / name, location, metadata=metadata)

    return each(upload, names) | {last: upload(last)}


def download_folder(
    store: Reader, bucket: str, prefix: str, target: Path, *, max_bytes: int | None
) -> int:
    """Download everything under a prefix; see `S3Service.download_folder`."""
    prefix = _joined(prefix, "")
    objects = {
        info.key.removeprefix(prefix): info
        for info in store.list_objects(bucket, prefix)
        if info.key != prefix  # an empty object that some tools make to show a folder
    }
    if not objects:
        raise ObjectNotFound(f"s3://{bucket}/{prefix}: nothing is there")
    for name in objects:
        _refuse_unsafe(name, f"s3://{bucket}/{prefix}")
    total = sum(info.size for info in objects.values())
    if max_bytes is not None and total > max_bytes:
        raise ObjectTooLarge(
            f"s3://{bucket}/{prefix}: has {total} bytes, more than the {max_bytes} that are allowed"
        )

    def download(name: str) -> int:
        info = objects[name]
        return store.download(S3Location(bucket, info.key), target / name, max_bytes=info.size)

    return sum(each(download, objects).values())


def _joined(prefix: str, name: str) -> str:
    return f"{prefix.rstrip('/')}/{name}" if prefix else name


def _refuse_unsafe(name: str, where: str) -> None:
    """A folder of ours has plain names; what has another was put there by somebody else."""
    if not all(_SAFE_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise StorageError(f"{where}: holds {name!r}, which is no file of ours")


def each(function: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
    """What the function gives for every name, several at a time; a failure begins nothing new."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="s3-folder") as pool:
        futures = {
            # Each with a copy of this thread's context, so that its log lines carry the job, too.
            name: pool.submit(contextvars.copy_context().run, function, name)
            for name in names
        }
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
