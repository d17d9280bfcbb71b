"""Reads a file of conversations row by row, in any usual encoding, with bounded memory.

A file is JSON Lines, or one JSON document that holds a list of rows. A row that cannot be read is
reported with its number and the reason, and ends nothing.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

MAX_LINE = 16 * 1024**2
"""Characters of one row."""
MAX_DOCUMENT = 64 * 1024**2
"""Bytes of a file that is one JSON document. Larger files must be JSON Lines."""
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class UnreadableFile(ValueError):
    """The file as a whole is not a file of conversations."""


class Literal(str):
    """A number, true or false of a JSON file, as the file spells it."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row: its number in the file, from 1, and its JSON object."""

    number: int
    values: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Unread:
    """One row that cannot be read: its number in the file, and the reason."""

    number: int
    reason: str


def rows_of(path: Path) -> Iterator[Row | Unread]:
    """The rows of a file.

    Args:
        path: JSON Lines, or one JSON document, in UTF-8 or with a byte-order mark.

    Raises:
        UnreadableFile: It holds no rows; the text names what was seen.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    if not head.strip():
        raise UnreadableFile("the file is empty. Write one conversation per line.")
    encoding = next((name for mark, name in _BOMS if head.startswith(mark)), "utf-8")
    document = _document(path, encoding, head)
    if document is not None:
        yield from _rows_of_document(document)
        return
    with path.open(encoding=encoding, errors="surrogateescape", newline="\n") as text:
        yield from _rows_of_lines(text)


def _document(path: Path, encoding: str, head: bytes) -> list[Any] | None:
    """The rows of a file that is one JSON document; None if it is JSON Lines."""
    start = head.decode(encoding, "ignore").lstrip("\ufeff \t\r\n")
    if not start.startswith(("{", "[")):
        shown = start.split("\n", 1)[0][:80]
        raise UnreadableFile(
            f"the file is not JSON Lines; it begins with {shown!r}. Write one JSON object per line."
        )
    small = path.stat().st_size <= MAX_DOCUMENT
    if start.startswith("{"):
        with path.open(encoding=encoding, errors="surrogateescape", newline="\n") as text:
            first = next(_lines(text), None)
        if not small or first is None or isinstance(_parsed(first), dict):
            return None
    if not small:
        raise UnreadableFile(
            f"the file is one JSON document of more than {MAX_DOCUMENT // 1024**2} MiB. Write one "
            "conversation per line (JSON Lines)."
        )
    found = _parsed(path.read_bytes().decode(encoding, "surrogateescape"))
    if isinstance(found, dict):
        return [found]
    if isinstance(found, list):
        return found
    if start.startswith("["):
        raise UnreadableFile("the file is not valid JSON. Write one JSON object per line.")
    return None


def _rows_of_document(rows: list[Any]) -> Iterator[Row | Unread]:
    for number, values in enumerate(rows, 1):
        if isinstance(values, dict):
            yield Row(number, values)
        else:
            yield Unread(number, "is not a JSON object")


def _rows_of_lines(text: TextIO) -> Iterator[Row | Unread]:
    for number, line in enumerate(_lines(text), 1):
        if line is None:
            yield Unread(number, f"is longer than {MAX_LINE:,} characters")
        elif not line.strip("\ufeff \t\r\n"):
            continue
        elif any("\udc80" <= letter <= "\udcff" for letter in line):
            yield Unread(number, "is not text in UTF-8")
        elif isinstance(values := _parsed(line), dict):
            yield Row(number, values)
        else:
            reason = "is not valid JSON" if values is None else "is not a JSON object"
            yield Unread(number, reason)


def _lines(text: TextIO) -> Iterator[str | None]:
    """The lines; None for one that is too long. No more than `MAX_LINE` characters are held."""
    while line := text.readline(MAX_LINE):
        if line.endswith("\n") or len(line) < MAX_LINE:
            yield line
            continue
        del line
        while (rest := text.readline(MAX_LINE)) and not rest.endswith("\n"):
            pass
        yield None


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parsed(text: str | None) -> Any:
    """The JSON value of a text; None if it is not JSON. Numbers keep their spelling."""
    try:
        return json.loads(
            (text or "").lstrip("\ufeff"),
            parse_int=Literal,
            parse_float=Literal,
            parse_constant=_refused,
        )
    except (ValueError, RecursionError):
        return None
