"""Folders of images as users have them: every caption belongs to an image, or is named."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from cli.training.image_folder import read_folder
from utils.errors import ConfigurationError


def fill(folder: Path, **files: bytes) -> Path:
    """A folder with these files; an image needs no content here."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def captions(folder: Path) -> dict[str, str]:
    """The captions by the names of images."""
    return {image.source: image.caption for image in read_folder(folder).images}


NFC, NFD = unicodedata.normalize("NFC", "é가"), unicodedata.normalize("NFD", "é가")


@pytest.mark.parametrize(
    ("image", "caption"),
    [
        ("a.png", "a.txt"),
        ("a.png", "a.TXT"),
        ("a.png", "a.Txt"),
        ("a.png", "a.caption"),
        ("a.png", "a.CAPTION"),
        ("a.png", "a.png.txt"),
        ("a.png", "a.png.caption"),
        ("A.JPG", "a.txt"),
        ("space .png", "space.txt"),
        ("space.png", "space .txt"),
        (f"{NFC}.png", f"{NFD}.txt"),
        (f"{NFD}.png", f"{NFC}.txt"),
    ],
)
def test_a_caption_finds_its_image_however_it_is_spelt(
    tmp_path: Path, image: str, caption: str
) -> None:
    found = read_folder(fill(tmp_path, **{image: b"image", caption: b"a harbour"}))
    assert [each.caption for each in found.images] == ["a harbour"]
    assert not found.notes


def test_the_most_exact_name_wins_and_the_other_file_is_named(tmp_path: Path) -> None:
    fill(tmp_path, **{"a.png": b"", "a.caption": b"second", "a.txt": b"first"})
    found = read_folder(tmp_path)
    assert [each.caption for each in found.images] == ["first"]
    assert found.notes == ("These belong to no image and are not used: a.caption.",)


def test_a_metadata_file_captions_the_images_without_a_caption_file(
    tmp_path: Path,
) -> None:
    lines = [
        {"file_name": "a.png", "text": "from the list"},
        {"file_name": "b.png", "text": "not this one"},
        {"file_name": f"{NFD}.png", "text": "composed"},
        {"file_name": "gone.png", "text": "of nothing"},
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n{broken\n"
    names = ("a.png", "b.png", f"{NFC}.png")
    fill(tmp_path, **dict.fromkeys(names, b""))
    fill(tmp_path, **{"b.txt": b"its own", "metadata.jsonl": text.encode()})
    assert captions(tmp_path) == {
        "a.png": "from the list",
        "b.png": "its own",
        f"{NFC}.png": "composed",
    }
    notes = " ".join(read_folder(tmp_path).notes)
    assert "line 5" in notes and "gone.png" in notes


@pytest.mark.parametrize(
    "name", ["a.json", "b.csv", "notes.md", "other.txt", "desktop.ini", "Thumbs.db", "a.npz"]
)
def test_a_file_that_is_neither_image_nor_caption_is_named_and_not_counted_as_a_broken_image(
    tmp_path: Path, name: str
) -> None:
    found = read_folder(fill(tmp_path, **{"a.png": b"", name: b"{}"}))
    assert [each.source for each in found.images] == ["a.png"]
    assert found.notes == (f"These belong to no image and are not used: {name}.",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"x" * 25_000, "larger than 16 KiB"),
        ("빨간 집".encode("cp949"), "save it as UTF-8"),
        (b"caf\xe9", "save it as UTF-8"),
        (b"red \x00house", "save it as UTF-8"),
    ],
)
def test_a_caption_that_cannot_be_used_leaves_its_reason_on_the_image(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    (image,) = read_folder(fill(tmp_path, **{"a.png": b"", "a.txt": content})).images
    assert image.caption == "" and problem in (image.caption_problem or "")


def test_kohyas_folders_of_repeats_get_a_sentence_that_explains(tmp_path: Path) -> None:
    (tmp_path / "10_ink").mkdir()
    with pytest.raises(ConfigurationError, match="10_ink are not read: kohya.*Train on 10_ink"):
        read_folder(tmp_path)
    fill(tmp_path, **{"a.png": b""})
    assert "repeats" in read_folder(tmp_path).notes[0]


def test_other_subfolders_are_named(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    notes = read_folder(fill(tmp_path, **{"a.png": b""})).notes
    assert notes == ("Subfolders are not read (more). Move their images up to use them.",)


def test_a_name_that_is_not_utf_8_is_shown_by_its_bytes_and_its_file_is_found(
    tmp_path: Path,
) -> None:
    raw = os.fsencode(tmp_path) + b"/" + "가나".encode("cp949")
    Path(os.fsdecode(raw + b".png")).write_bytes(b"image")
    Path(os.fsdecode(raw + b".txt")).write_bytes(b"a harbour")
    (image,) = read_folder(tmp_path).images
    assert image.source == r"\xb0\xa1\xb3\xaa.png" and image.caption == "a harbour"
    assert Path(image.path or "").read_bytes() == b"image"
