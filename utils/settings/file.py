"""Settings from a file, TOML or JSON: one name after another, as in `.env.example`, no tables."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from utils.errors import ConfigurationError

_MAX_BYTES = 1024**2


def read(path: Path) -> dict[str, Any]:
    """The file's settings by their names in lower case; what is empty or null counts as unset.

    Args:
        path: A file that ends in `.toml` or `.json`. It may hold secrets: no value is ever told.

    Raises:
        ConfigurationError: It cannot be read, or is not such a file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigurationError(f"The file {path} is too large to hold settings")
        values = _parsed(path, content.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigurationError(f"The file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"The file {path} cannot be read: it is not UTF-8") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"The file {path} must be one object of names and values")
    if tables := [name for name, value in values.items() if isinstance(value, dict)]:
        raise ConfigurationError(
            f"The file {path} has tables ({', '.join(tables)}); settings stand side by side, by "
            "their names in .env.example"
        )
    found = {name.lower(): value for name, value in values.items() if value not in ("", None)}
    if len({name.lower() for name in values}) < len(values):
        raise ConfigurationError(f"The file {path} has a name twice, in large and small letters")
    return found


def _parsed(path: Path, text: str) -> Any:
    """The file's content. The parsers' texts say where they stopped, and not what stands there."""
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigurationError(f"The file {path} is not TOML: {_where(error)}") from None
    if path.suffix == ".json":
        try:
            return json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"The file {path} is not JSON: {_where(error)}") from None
    raise ConfigurationError(f"The file {path} must be called .toml or .json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _where(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
