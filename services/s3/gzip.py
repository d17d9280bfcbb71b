"""Objects that were stored with `Content-Encoding: gzip`, as some programs store all that they
upload: S3 hands them out as they are, and a reader has to unpack them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

from utils.errors import ObjectTooLarge

_GZIP_WINDOW = 31  # zlib's number for gzip's header, and its largest window
_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 64 * 1024


def is_gzipped(answer: Mapping[str, Any]) -> bool:
    """Whether an answer's body is compressed as a whole, as its headers say."""
    codings = str(answer.get("ContentEncoding") or "").lower().split(",")
    return any(coding.strip() in ("gzip", "x-gzip") for coding in codings)


class Gunzip:
    """Writes what is unpacked; a body that only claims to be gzip is written as it is.

    A body that breaks off in the middle, or is damaged there, is written up to that place: whoever
    reads the file judges it.

    Args:
        sink: Where it goes.
        max_bytes: More is refused, counted unpacked.
        what: The object's address, for errors.
    """

    def __init__(self, sink: BinaryIO, *, max_bytes: int | None, what: str) -> None:
        self._sink, self._most, self._what = sink, max_bytes, what
        self._stream = zlib.decompressobj(_GZIP_WINDOW)
        self._start = b""
        self._is_gzip: bool | None = None
        self._broken = False
        self._written = 0

    def write(self, content: bytes) -> int:
        """Take the next bytes of the body.

        Raises:
            ObjectTooLarge: It has more than `max_bytes`.
        """
        size = len(content)
        if self._is_gzip is None:
            content = self._start = self._start + content
            if len(content) < len(_MAGIC):
                return size
            self._is_gzip = content.startswith(_MAGIC)
        if self._is_gzip:
            self._unpack(content)
        else:
            self._put(content)
        return size

    def close(self) -> None:
        """Write what is left of a body that is shorter than gzip's mark."""
        if self._is_gzip is None:
            self._put(self._start)

    def _unpack(self, content: bytes) -> None:
        while content and not self._broken and not self._stream.eof:
            try:
                self._put(self._stream.decompress(content, _CHUNK_BYTES))
            except zlib.error:
                self._broken = True
            content = self._stream.unconsumed_tail

    def _put(self, content: bytes) -> None:
        self._written += len(content)
        if self._most is not None and self._written > self._most:
            raise ObjectTooLarge(
                f"{self._what}: has more than the {self._most} bytes that are allowed, unpacked"
            )
        self._sink.write(content)
