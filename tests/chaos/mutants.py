"""Mutants."""

from __future__ import annotations

NAMES: tuple[str, ...] = ()


def apply(name: str) -> None:
    """Apply."""
    raise KeyError(name)
