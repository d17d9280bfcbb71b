"""Reading the body of an S3 answer: limited in size and in time, unpacked, and easy to stop."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from utils.errors import ObjectTooLarge

CHUNK_BYTES = 64 * 1024

# Read time-outs do not notice a server that sends one byte now and then. A body may take
# GRACE_SECONDS, plus the time that its size takes on a slow line.
GRACE_SECONDS = 60.0
MIN_BYTES_PER_SECOND = 50_000

_GZIP_WINDOW = 31  # zlib's number for gzip's header with the largest window
_GZIP_MAGIC = b"\x1f\x8b"


def copy_body(
    answer: Mapping[str, Any],
    sink: BinaryIO,
    *,
    max_bytes: int | None,
    watch: Callable[[], None],
    what: str,
) -> None:
    """Copy an answer's body; one with `Content-Encoding: gzip` is unpacked.

    Some programs compress everything that they upload, and S3 returns it as it was stored.

    Args:
        answer: boto3's answer to GetObject. Its body verifies length and checksum at its end.
        sink: The target.
        max_bytes: A larger body is refused: before reading if the answer declares its length,
            otherwise when the limit is reached. Packed and unpacked bytes are both counted.
        watch: Called between chunks; an error that it raises ends the copy.
        what: The object's address, for errors.

    Raises:
        ObjectTooLarge: The object has more than `max_bytes`.
    """
    body, declared = answer["Body"], answer.get("ContentLength")
    unpacking = _Gunzip(sink, max_bytes=max_bytes, what=what) if _is_gzipped(answer) else None
    # `with` closes the connection, so the rest of a refused body is not waited for.
    with body as raw:
        _refuse_more(declared or 0, max_bytes, what)
        with _cut_after(raw, GRACE_SECONDS + (declared or max_bytes or 0) / MIN_BYTES_PER_SECOND):
            copied = 0
            while chunk := body.read(CHUNK_BYTES):
                copied += len(chunk)
                _refuse_more(copied, max_bytes, what)
                (unpacking or sink).write(chunk)
                watch()
    if unpacking:
        unpacking.close()


def _refuse_more(size: int, max_bytes: int | None, what: str) -> None:
    if max_bytes is not None and size > max_bytes:
        raise ObjectTooLarge(f"{what}: the object has more than the allowed {max_bytes} bytes")


@contextlib.contextmanager
def _cut_after(raw: Any, seconds: float) -> Iterator[None]:
    """Shut the connection down after a while; the reader then finds the body incomplete."""
    timer = threading.Timer(seconds, raw.shutdown)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_gzipped(answer: Mapping[str, Any]) -> bool:
    codings = str(answer.get("ContentEncoding") or "").lower().split(",")
    return any(coding.strip() in ("gzip", "x-gzip") for coding in codings)


class _Gunzip:
    """Unpacks gzip; a body that only claims to be gzip is written unchanged.

    A body that is cut off or damaged is written up to that place. The reader of the file judges it.
    """

    def __init__(self, sink: BinaryIO, *, max_bytes: int | None, what: str) -> None:
        self._sink, self._most, self._what = sink, max_bytes, what
        self._stream = zlib.decompressobj(_GZIP_WINDOW)
        self._start = b""
        self._is_gzip: bool | None = None
        self._broken = False
        self._written = 0

    def write(self, content: bytes) -> None:
        """Take the next bytes of the body."""
        if self._is_gzip is None:
            content = self._start = self._start + content
            if len(content) < len(_GZIP_MAGIC):
                return
            self._is_gzip = content.startswith(_GZIP_MAGIC)
        if self._is_gzip:
            self._unpack(content)
        else:
            self._put(content)

    def close(self) -> None:
        """Write the rest of a body that is shorter than gzip's mark."""
        if self._is_gzip is None:
            self._put(self._start)

    def _unpack(self, content: bytes) -> None:
        while content and not self._broken and not self._stream.eof:
            try:
                self._put(self._stream.decompress(content, CHUNK_BYTES))
            except zlib.error:
                self._broken = True
            content = self._stream.unconsumed_tail

    def _put(self, content: bytes) -> None:
        self._written += len(content)
        if self._most is not None and self._written > self._most:
            raise ObjectTooLarge(
                f"{self._what}: the unpacked object has more than the allowed {self._most} bytes"
            )
        self._sink.write(content)
