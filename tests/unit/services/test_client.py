"""The private parts of pika that the client uses, in the pinned version."""

# pylint: disable=protected-access

from __future__ import annotations

import datetime
import struct
from typing import Any

import pika
import pika.data
import pika.frame
import pytest

from services.broker.client import _Wire, with_far_times_as_numbers

FAR = 2**62
NEAR = 1_700_000_000


def test_the_private_parts_were_read_in_this_version_of_pika() -> None:
    assert pika.__version__ == "1.4.4", "run the tests of the broker, then change this number"


def frame(headers: bytes, properties: bytes = b"", flags: int = 0) -> bytes:
    """A header frame with an encoded table of headers, then the properties before it."""
    table = struct.pack(">I", len(headers)) + headers
    flags |= pika.BasicProperties.FLAG_HEADERS
    payload = struct.pack(">HHQH", 60, 0, 5, flags) + properties + table
    return struct.pack(">BHL", 2, 1, len(payload)) + payload + b"\xce"


def time(seconds: int) -> bytes:
    """An encoded time."""
    return b"T" + struct.pack(">Q", seconds)


def read(data: bytes) -> dict[str, Any]:
    """The headers as a connection reads them."""
    wire = object.__new__(_Wire)
    wire._frame_buffer = data
    length, found = wire._read_frame()
    assert length == len(frame_of(data))
    headers: dict[str, Any] = found.properties.headers
    return headers


def frame_of(data: bytes) -> bytes:
    """The first frame of received bytes."""
    (size,) = struct.unpack_from(">L", data, 3)
    return data[: 7 + size + 1]


def nested(kind: bytes, inside: bytes) -> bytes:
    """An encoded array or table."""
    return kind + struct.pack(">I", len(inside)) + inside


def test_a_time_beyond_pythons_breaks_pika_itself() -> None:
    with pytest.raises((ValueError, OverflowError, OSError)):
        pika.frame.decode_frame(frame(b"\x01t" + time(FAR)))


@pytest.mark.parametrize("seconds", [253_402_300_800, FAR, 1_700_000_000_000, 2**64 - 1])
def test_a_time_beyond_pythons_is_read_as_a_number_and_other_headers_as_they_are(
    seconds: int,
) -> None:
    headers = b"\x01t" + time(seconds) + b"\x01nt\x01" + b"\x01o" + time(NEAR)
    number = seconds if seconds < 2**63 else seconds - 2**64
    assert read(frame(headers)) == {
        "t": number,
        "n": True,
        "o": datetime.datetime.fromtimestamp(NEAR, datetime.UTC),
    }


def test_such_times_in_nested_tables_and_lists_are_read_too() -> None:
    inside = nested(b"A", time(FAR) + b"t\x00" + nested(b"F", b"\x01x" + time(FAR)))
    assert read(frame(b"\x01a" + inside)) == {"a": [FAR, False, {"x": FAR}]}
    # Values behind a nested one are found, too.
    behind = inside + b"\x01b" + nested(b"F", b"") + b"\x01c" + time(FAR)
    assert read(frame(b"\x01a" + behind)) == {"a": [FAR, False, {"x": FAR}], "b": {}, "c": FAR}


@pytest.mark.parametrize(
    ("flags", "properties"),
    [
        (pika.BasicProperties.FLAG_CONTENT_TYPE, b"\x04text"),
        (pika.BasicProperties.FLAG_CONTENT_ENCODING, b"\x04gzip"),
        (
            pika.BasicProperties.FLAG_CONTENT_TYPE | pika.BasicProperties.FLAG_CONTENT_ENCODING,
            b"\x04text\x04gzip",
        ),
    ],
)
def test_the_headers_are_found_behind_other_properties(flags: int, properties: bytes) -> None:
    assert read(frame(b"\x01t" + time(FAR), properties, flags)) == {"t": FAR}


def test_bytes_behind_the_first_frame_stay_as_they_are() -> None:
    first = frame(b"\x01t" + time(FAR))
    rest = frame(b"\x01t" + time(FAR))
    changed = with_far_times_as_numbers(first + rest)
    assert changed[len(first) :] == rest and changed[: len(first)] != first


def test_a_body_frame_stays_as_it_is() -> None:
    body = struct.pack(">BHL", 3, 1, 9) + time(FAR) + b"\xce"
    assert with_far_times_as_numbers(body) == body


def test_pikas_own_decoding_is_not_changed() -> None:
    assert pika.data.decode_value.__module__ == "pika.data"
    assert not hasattr(pika.data.decode_value, "__wrapped__")
