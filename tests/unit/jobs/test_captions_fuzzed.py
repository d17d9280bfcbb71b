"""Captions of any bytes: only characters of the original text are trained."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.training.image_folder import read_folder
from jobs.captions import MAX_CAPTION_BYTES, clean_caption, read_caption

TEXTS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cn", "Co")), max_size=200)
ENCODINGS = st.sampled_from(
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp949", "cp1252", "gbk"]
)


def is_clean(text: str) -> bool:
    """Whether a text may be trained."""
    bad = any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text)
    return not bad and "\ufffd" not in text and text == " ".join(text.split())


@given(st.binary(max_size=MAX_CAPTION_BYTES + 8))
def test_only_clean_text_is_read_from_any_bytes(content: bytes) -> None:
    found = read_caption(content)
    assert is_clean(found.text)
    assert not (found.text and found.problem)


@given(st.text(max_size=200))
def test_only_clean_text_is_kept_of_any_text_and_cleaning_twice_changes_nothing(
    text: str,
) -> None:
    found = clean_caption(text)
    assert is_clean(found.text)
    assert clean_caption(found.text) == found or found.problem


@given(TEXTS, ENCODINGS)
def test_a_text_is_read_as_it_was_written_or_is_refused(text: str, encoding: str) -> None:
    content = text.encode(encoding, errors="ignore")
    written = content.decode(encoding)
    found = read_caption(content)
    if encoding in ("cp949", "cp1252", "gbk") and not content.isascii():
        return  # the encoding is uncertain; only valid UTF-8 is read as such
    if encoding.startswith(("utf-16-", "utf-32-")) and content.isascii():
        return  # the same bytes are a text in ASCII, too
    expected = clean_caption(written)
    assert found.text in ("", expected.text)
    if encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert found == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.one_of(st.binary(max_size=40), TEXTS.map(str.encode)), max_size=6))
def test_a_metadata_file_with_any_lines_raises_no_error(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "a.png").write_bytes(b"image")
    good = json.dumps({"file_name": "a.png", "text": "a harbour"}).encode()
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join([*lines, good]))
    (image,) = read_folder(tmp_path).images
    assert is_clean(image.caption)
