"""Header values that are sound AMQP and that Python cannot hold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def tolerant(decode: Callable[[bytes, int], tuple[Any, int]]) -> Any:
    """pika's reading of a header's value, less the error that costs the connection.

    A time in the year 50,000, from a publisher who counts in milliseconds, is sound AMQP, and no
    value of Python's. pika raises in mid-frame, the connection is lost, and the message comes back.
    """

    @functools.wraps(decode)
    def decode_value(encoded: bytes, offset: int) -> tuple[Any, int]:
        try:
            return decode(encoded, offset)
        except (ValueError, OverflowError, OSError):
            if encoded[offset : offset + 1] != b"T":
                raise
            return None, offset + 9  # its kind, and eight bytes

    return decode_value
