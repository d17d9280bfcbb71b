"""Captions: the original text, or a reason; never a text that a decoder made up."""

from __future__ import annotations

import unicodedata

import pytest

from jobs.captions import MAX_CAPTION_BYTES, clean_caption, read_caption

KOREAN = "수채화, 항구의 새벽"
ENGLISH = "red house, ink"


@pytest.mark.parametrize(
    "text", [KOREAN, ENGLISH, "café — Häuser", "夜明けの港、水彩", "красный дом"]
)
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le mark", "utf-16-be mark"]
)
def test_an_encoding_that_is_certain_is_read(text: str, encoding: str) -> None:
    name, _, marked = encoding.partition(" ")
    content = f"\ufeff{text}".encode(name) if marked else text.encode(encoding)
    assert (read_caption(content).text, read_caption(content).problem) == (text, None)


@pytest.mark.parametrize("text", [KOREAN, ENGLISH, "café, Häuser", "красный дом"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_read_if_only_one_byte_order_is_text(
    text: str, encoding: str
) -> None:
    assert read_caption(text.encode(encoding)).text == text


@pytest.mark.parametrize(
    "content",
    [
        KOREAN.encode("cp949"),
        "빨간 집".encode("euc-kr"),
        "café au lait".encode("cp1252"),
        "“ink” – résumé".encode("cp1252"),
        "水彩画,港口的黎明".encode("gbk"),
        "夜明けの港".encode("shift_jis"),
        "красный дом".encode("cp1251"),
        "一只猫".encode("utf-16-le"),
        b"caf\xc3",  # cut off
        b"\xff\xfea",  # half a character
        b"a\0b",
    ],
)
def test_an_encoding_that_could_only_be_guessed_is_ignored_with_advice(content: bytes) -> None:
    found = read_caption(content)
    assert found.text == "" and "save it as UTF-8" in (found.problem or "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a caf\N{REPLACEMENT CHARACTER}", "U+FFFD"),
        ("red \x1b[31m house", "control characters"),
        ("half a letter \ud800", "control characters"),
        ("C1 \x9f control", "control characters"),
        ("夜明けの港".encode("iso-2022-jp").decode("ascii"), "control characters"),
        (r"{\rtf1\ansi\ansicpg1252 a harbour at dawn}", "save it as plain text"),
        ("\n <!DOCTYPE html><p>a harbour</p>", "save it as plain text"),
        ("<HTML><body>a harbour", "save it as plain text"),
    ],
)
def test_content_that_is_not_text_is_ignored_with_a_reason(text: str, reason: str) -> None:
    found = clean_caption(text)
    assert found.text == "" and reason in (found.problem or "")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b" \r\n", ""),
        (b"", ""),
        (b"a harbour\r\n\tat  dawn\x0c", "a harbour at dawn"),
        (b"\xef\xbb\xbfa\xef\xbb\xbf b", "a b"),
        ("e\u0301tude".encode(), "e\u0301tude"),
    ],
)
def test_a_caption_is_one_line(content: bytes, text: str) -> None:
    assert read_caption(content) == read_caption(text.encode())
    assert read_caption(content).text == text


def test_a_file_that_is_too_large_for_a_caption_is_ignored_with_its_limit() -> None:
    assert read_caption(b"x" * MAX_CAPTION_BYTES).problem is None
    assert read_caption(b"x" * (MAX_CAPTION_BYTES + 1)).problem == "it is larger than 16 KiB"


def test_bytes_that_are_not_utf_8_are_refused_and_no_text_gains_a_character() -> None:
    for byte in range(256):
        found = read_caption(b"ink " + bytes([byte]) + b" wash")
        assert not any(
            unicodedata.category(letter) in ("Cc", "Cs") or letter == "\ufffd"
            for letter in found.text
        )
        is_text = chr(byte).isprintable() or chr(byte) in "\t\n\v\f\r"
        assert bool(found.problem) == (byte >= 0x80 or not is_text)
