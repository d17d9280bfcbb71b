"""Reading the body of an S3 answer: bounded in size and in time, and still willing to stop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from services.s3.gzip import Gunzip
from utils.errors import ObjectTooLarge

CHUNK_BYTES = 64 * 1024

# Read time-outs do not notice a trickle: whoever sends a byte now and then keeps a reader for days.
# So a body has this long, and as long again as its size takes on a slow line.
GRACE_SECONDS = 60.0
MIN_BYTES_PER_SECOND = 50_000


def copy_body(
    body: Any,
    sink: BinaryIO | Gunzip,
    *,
    declared: int | None,
    max_bytes: int | None,
    watch: Callable[[], None],
    what: str,
) -> int:
    """Copy an answer's body.

    Args:
        body: botocore's `StreamingBody`, whose last read verifies length and checksum.
        sink: Where it goes.
        declared: The answer's Content-Length in bytes, if it says.
        max_bytes: More is refused: before reading if it was declared, else once it arrives.
        watch: Called between chunks; what it raises ends the copy.
        what: The object's address, for errors.

    Returns:
        Bytes copied.

    Raises:
        ObjectTooLarge: The object has more than `max_bytes`.
    """
    # `with` closes the connection: what is left of a refused body is not waited for.
    with body as raw:
        _refuse_more(declared or 0, max_bytes, what)
        with _cut_after(raw, GRACE_SECONDS + (declared or max_bytes or 0) / MIN_BYTES_PER_SECOND):
            copied = 0
            while chunk := body.read(CHUNK_BYTES):
                copied += len(chunk)
                _refuse_more(copied, max_bytes, what)
                sink.write(chunk)
                watch()
            return copied


def _refuse_more(size: int, max_bytes: int | None, what: str) -> None:
    if max_bytes is not None and size > max_bytes:
        raise ObjectTooLarge(f"{what}: has more than the {max_bytes} bytes that are allowed")


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
