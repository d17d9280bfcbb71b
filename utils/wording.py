"""Counts, sizes and lists in sentences for people."""

from __future__ import annotations

from collections.abc import Iterable

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")

MOST_NAMES = 10
"""Names that one group lists; the others are counted."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `1 image`, `3 images`.

    Args:
        number: The count.
        noun: The noun's singular.
        plural: Its plural; the singular and an `s` by default.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def spoken(size: int) -> str:
    """A number of bytes for a person: `512 bytes`, `37.5 MiB`, `9.77 GiB`."""
    value, unit = float(size), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0:
        return f"{size} bytes"
    three_digits = float(f"{value:.3g}")
    return f"{three_digits:g} {_UNITS[unit]}"


def grouped(problems: Iterable[tuple[str, str]], noun: str, *, plural: str | None = None) -> str:
    """Things and the problem of each, with each reason named once.

    `3 images: could not be found in storage (a.jpg, b.jpg, c.jpg); d.jpg: is an empty file`.
    Reasons keep the order of their first appearance.

    Args:
        problems: The name of each thing, and its reason.
        noun: The word for a thing, in the singular.
        plural: The noun's plural; the singular and an `s` by default.
    """
    names: dict[str, list[str]] = {}
    for name, reason in problems:
        names.setdefault(reason, []).append(name)
    return "; ".join(_group(reason, found, noun, plural) for reason, found in names.items())


def _group(reason: str, names: list[str], noun: str, plural: str | None) -> str:
    if len(names) == 1:
        return f"{names[0]}: {reason}"
    listed = ", ".join(names[:MOST_NAMES])
    if more := len(names) - MOST_NAMES:
        listed += f" and {more} more" if more > 0 else ""
    return f"{counted(len(names), noun, plural)}: {reason} ({listed})"
