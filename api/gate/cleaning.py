"""Values that a layer below would refuse, or store and then fail on at every reading.

PostgreSQL refuses NUL in text; half a surrogate pair cannot be written as UTF-8; JSON has no NaN;
databases hold whole numbers of 64 bits. Requests with such values are refused. News of workers is
cleaned instead, because a worker would send it again for ever.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from api.gate.problems import Problem

MOST = 2**63 - 1
MAX_DEPTH = 40
_BAD_TEXT = re.compile(r"[\x00\ud800-\udfff]")


def loads(body: bytes) -> Any:
    """Read a JSON body of a client.

    Raises:
        Problem: It is no JSON, or holds a value that cannot be stored; the field is named.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise Problem("invalid_json", f"The body is not UTF-8 at byte {error.start}.") from None
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise Problem("invalid_json", f"The body is not valid JSON: {reason}.") from None
    check(value)
    return value


def check(value: Any, place: str = "", depth: int = 0) -> None:
    """Refuse values that cannot be stored.

    Raises:
        Problem: It names the field.
    """
    if depth > MAX_DEPTH:
        raise Problem("invalid_parameter", "The body is nested too deeply.", param=place or "body")
    if isinstance(value, str):
        check_text(value, place)
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int) and not -MOST <= value <= MOST:
        raise _wrong(place, "must be a whole number of at most 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise _wrong(place, "must be a finite number")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check(item, f"{place}.{index}" if place else str(index), depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            check_text(name, place or "body")
            check(item, f"{place}.{name}" if place else name, depth + 1)


def check_text(text: str, place: str) -> None:
    """Refuse text with NUL or half a surrogate pair.

    Raises:
        Problem: It names the field.
    """
    if _BAD_TEXT.search(text):
        raise _wrong(place, "must be valid Unicode text without NUL characters")


def cleaned(value: Any) -> Any:
    """The value with what cannot be stored replaced: U+FFFD in text, None for numbers."""
    if isinstance(value, str):
        return _BAD_TEXT.sub("\ufffd", value)
    if isinstance(value, (bool, int, float)) or value is None:
        return value if _is_storable(value) else None
    if isinstance(value, Mapping):
        return {cleaned(str(name)): cleaned(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(item) for item in value]
    return str(value)


def _is_storable(number: Any) -> bool:
    if isinstance(number, float):
        return math.isfinite(number)
    return number is None or -MOST <= number <= MOST


def _wrong(place: str, what: str) -> Problem:
    shown = _BAD_TEXT.sub("\ufffd", place) or "body"
    return Problem("invalid_parameter", f"{shown}: {what}.", param=shown)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _integer(digits: str) -> int:
    if len(digits) > 400:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
