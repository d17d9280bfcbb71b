"""The texts of the web page in each language: one JSON file per language in `messages/`.

To add a language, translate `en.json` into a file that is named by its language tag, such as
`de.json`. A test compares the keys and the placeholders.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "messages"
DEFAULT = "en"
NAME, NOTE = "_name", "_note"
"""Keys of the language's own name, and of a note about the translation."""


@dataclasses.dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one language.

    Attributes:
        tag: The language tag.
        texts: By key; a text may have placeholders in braces.
    """

    tag: str
    texts: Mapping[str, str]

    def __call__(self, key: str, **values: Any) -> str:
        """A text with its placeholders filled in."""
        return self.texts[key].format(**values)

    def known(self, key: str, fallback: str) -> str:
        """A text whose key is made at run time, or another one if there is none."""
        return self.texts.get(key) or self.texts[fallback]


@functools.cache
def languages() -> dict[str, Texts]:
    """All languages by tag, the default one first."""
    tags = sorted((path.stem for path in FOLDER.glob("*.json")), key=lambda tag: tag != DEFAULT)
    return {
        tag: Texts(tag, json.loads((FOLDER / f"{tag}.json").read_text(encoding="utf-8")))
        for tag in tags
    }


def chosen(asked: str | None, accepted: str) -> Texts:
    """The language of a visitor.

    Args:
        asked: A tag that the visitor has chosen.
        accepted: The header Accept-Language.
    """
    known = languages()
    for each in (asked or "", *accepted.split(",")):
        tag = each.partition(";")[0].strip().lower().partition("-")[0]
        if tag in known:
            return known[tag]
    return known[DEFAULT]
