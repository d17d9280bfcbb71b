"""Settings from a file, TOML or JSON: one name after another, as in `.env.example`, no tables.

pydantic-settings has sources for both formats. They ignore a missing file, accept a JSON name that
occurs twice and distinguish small from capital letters, so the file is read here.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from utils.errors import ConfigurationError

_MAX_BYTES = 1024**2


def read(path: Path) -> dict[str, Any]:
    """The file's settings by their names in lower case. An empty or null value counts as unset.

    Args:
        path: A file named `.toml` or `.json`. It may hold secrets, so no error shows a value.

    Raises:
        ConfigurationError: The file cannot be read, or is not such a file.
    """
    try:
        with path.open("rb") as file:
            values = _parsed(path, file.read(_MAX_BYTES + 1))
    except OSError as error:
        raise ConfigurationError(f"The file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"The file {path} is not text in UTF-8.") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"The file {path} must hold one object of names and values.")
    if tables := [name for name, value in values.items() if isinstance(value, dict)]:
        raise ConfigurationError(
            f"The file {path} has tables ({', '.join(tables)}). Write the settings at the top "
            "level, by their names in .env.example."
        )
    if len({name.lower() for name in values}) < len(values):
        raise ConfigurationError(
            f"The file {path} has a name twice, in small and in capital letters. Remove one."
        )
    return {name.lower(): value for name, value in values.items() if value not in ("", None)}


def _parsed(path: Path, content: bytes) -> Any:
    """The file's content. The parsers' errors name the position and show no value."""
    if len(content) > _MAX_BYTES:
        raise ConfigurationError(f"The file {path} is larger than {_MAX_BYTES:,} bytes.")
    text = content.decode("utf-8-sig")
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        form = path.suffix[1:].upper()
        raise ConfigurationError(f"The file {path} is not valid {form}: {reason}.") from None
    raise ConfigurationError(f"The name of the file {path} must end in .toml or .json.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a name twice; remove one")
    return found
