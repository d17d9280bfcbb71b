"""Sizes in the units that people use."""

from __future__ import annotations

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def spoken(size: int) -> str:
    """A number of bytes for a person: `512 bytes`, `37.5 MiB`, `9.77 GiB`."""
    value, unit = float(size), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0:
        return f"{size} bytes"
    three_digits = float(f"{value:.3g}")
    return f"{three_digits:g} {_UNITS[unit]}"
