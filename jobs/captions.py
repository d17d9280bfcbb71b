"""The text of a caption, read from a file only if its encoding is certain.

The same rules hold for a caption object on S3, for a caption file in a folder, and for a caption in
a message, so only text that a person wrote is trained.
"""

from __future__ import annotations

import codecs
import dataclasses
import unicodedata

MAX_CAPTION_BYTES = 16 * 1024
"""A larger file is no caption, and is not read."""
TOO_LARGE = f"it is larger than {MAX_CAPTION_BYTES // 1024} KiB"
SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files, in lower case; the first one wins if an image has both."""

_UNKNOWN = (
    "its encoding is not known (it is neither UTF-8 nor UTF-16; older programs write cp949 or "
    "Windows-1252, for example); save it as UTF-8"
)
_DAMAGED = "it contains U+FFFD, the mark of characters that an earlier conversion lost"
_BINARY = "it contains control characters, so it is not a text"
_DOCUMENTS = (
    ("{\\rtf", "it is a formatted document (RTF); save it as plain text"),
    ("<!doctype html", "it is a web page (HTML); save it as plain text"),
    ("<html", "it is a web page (HTML); save it as plain text"),
)
"""The beginnings of files that word processors and browsers save as a text, in lower case."""
# UTF-32 first: its mark for little-endian begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_ASCII_TEXT = bytes(range(0x20, 0x7F)) + b"\t\n\v\f\r"
_WORD_JOINERS = dict.fromkeys(map(ord, "\ufeff\u2060"))  # byte-order marks in the middle of a text
_LINES = dict.fromkeys(map(ord, "\t\n\v\f\r\x85"), " ")
# Scripts that one caption may mix, by the first word of their characters' names.
_SCRIPTS = (
    {"HANGUL", "CJK"},
    {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK", "IDEOGRAPHIC"},
    {"CYRILLIC"},
    {"GREEK"},
    {"HEBREW"},
    {"ARABIC"},
    {"THAI"},
    {"DEVANAGARI"},
    set[str](),  # only Latin
)


@dataclasses.dataclass(frozen=True, slots=True)
class CaptionText:
    """The content of a caption file.

    Attributes:
        text: The caption on one line; "" if it is empty or cannot be used.
        problem: Why it is ignored, to follow "its caption was ignored: "; None if it is used.
    """

    text: str
    problem: str | None = None


def read_caption(content: bytes) -> CaptionText:
    """Decode a caption file.

    UTF-8, and UTF-16 and UTF-32 with a byte-order mark, are certain. UTF-16 without a mark is used
    if only one of the two byte orders gives a text. Other encodings look alike in a text as
    short as a caption, so nothing is guessed.
    """
    if len(content) > MAX_CAPTION_BYTES:
        return CaptionText("", TOO_LARGE)
    text = decoded(content)
    return CaptionText("", _UNKNOWN) if text is None else clean_caption(text)


def clean_caption(text: str) -> CaptionText:
    """A caption as it may be trained: on one line, without characters that are not text."""
    text = text.translate(_LINES).translate(_WORD_JOINERS)
    if "\N{REPLACEMENT CHARACTER}" in text:
        return CaptionText("", _DAMAGED)
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        return CaptionText("", _BINARY)
    text = " ".join(text.split())
    for beginning, problem in _DOCUMENTS:
        if text[: len(beginning)].lower() == beginning:
            return CaptionText("", problem)
    return CaptionText(text)


def decoded(content: bytes) -> str | None:
    """A text file's text, without its byte-order mark; None if its encoding is not certain."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return _strictly(content.removeprefix(mark), encoding)
    if b"\0" in content:  # in no encoding of captions but UTF-16 and UTF-32
        return _without_mark(content)
    return _strictly(content, "utf-8")


def _without_mark(content: bytes) -> str | None:
    """UTF-16 without a byte-order mark, if only one byte order gives a text."""
    zeros = content.count(0)
    if 2 * zeros != len(content) and not content.translate(None, b"\0" + _ASCII_TEXT):
        return None  # ASCII with stray zeros, which read as UTF-16 would be Chinese
    readings = [_strictly(content, encoding) for encoding in ("utf-16-le", "utf-16-be")]
    texts = [text for text in readings if text is not None and _is_text(text)]
    return texts[0] if len(texts) == 1 else None


def _strictly(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return None


def _is_text(text: str) -> bool:
    """Whether it has an ASCII character and its letters are of scripts that people mix.

    The wrong byte order makes of ASCII characters rare Chinese ones, and of others a jumble.
    """
    if not any(" " <= letter <= "~" for letter in text):
        return False
    scripts = set()
    for letter in text:
        category = unicodedata.category(letter)
        if category in ("Cc", "Cn", "Co", "Cs") and letter not in "\t\r\n":
            return False
        if category[0] in "LM":
            scripts.add(unicodedata.name(letter, "?").split()[0])
    scripts -= {"LATIN", "COMBINING", "MODIFIER", "FULLWIDTH", "HALFWIDTH"}
    return any(scripts <= allowed for allowed in _SCRIPTS)
