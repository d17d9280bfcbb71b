"""A local folder of images: its images, their captions, and the files that are of no use."""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from jobs.captions import (
    MAX_CAPTION_BYTES,
    SUFFIXES,
    TOO_LARGE,
    CaptionText,
    clean_caption,
    decoded,
    read_caption,
)
from jobs.style import TrainingImage
from utils.errors import ConfigurationError
from utils.logger import get_logger
from utils.names import printable

log = get_logger(__name__)

MAX_IMAGES = 200
METADATA = "metadata.jsonl"
"""Captions of a whole folder, one JSON object a line with `file_name` and `text`."""
MAX_METADATA_BYTES = 4 * 1024**2

# Endings of files in a folder of images that are never images.
_NO_IMAGES = frozenset(
    (*SUFFIXES, ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".toml", ".xml", ".xmp")
    + (".ini", ".db", ".log", ".npz", ".pt", ".safetensors", ".html")
)
# kohya's scripts read folders with this kind of name: so many repeats of what is in them.
_REPEATS = re.compile(r"\d+_.+")
_NAMED_AT_MOST = 10


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFolder:
    """The contents of a folder.

    Attributes:
        images: By name, each with its caption.
        notes: Sentences about files that are not used.
    """

    images: tuple[TrainingImage, ...]
    notes: tuple[str, ...]


def read_folder(folder: Path, *, ignored: Collection[str] = ()) -> ImageFolder:
    """Find the images of a folder and their captions.

    Whether a file is an image is judged by its content, later. Hidden files are not looked at,
    nor are subfolders. `NAME.txt`, `NAME.caption` and `NAME.png.txt` caption `NAME.png`, the suffix
    in any case; letters with accents match however they are composed. `metadata.jsonl` captions
    images that have no such file.

    Args:
        folder: The folder.
        ignored: Names of files that are not looked at.

    Raises:
        ConfigurationError: The folder is missing, holds no images, or too many files.
    """
    if not folder.is_dir():
        raise ConfigurationError(
            f"{printable(str(folder))} is not a folder. Name an existing folder of images."
        )
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if path.is_file() and path.name not in ignored]
    images = [path for path in files if path.suffix.lower() not in _NO_IMAGES]
    layout = _layout_note(path.name for path in entries if path.is_dir())
    shown = printable(str(folder))
    if not images:
        raise ConfigurationError(" ".join(filter(None, (f"{shown} holds no images.", layout))))
    if len(images) > MAX_IMAGES:
        raise ConfigurationError(
            f"{shown} holds {len(images)} files that may be images; at most {MAX_IMAGES} can be "
            "trained on. Move the others out of the folder."
        )
    captions = _Captions(path for path in files if path.suffix.lower() in SUFFIXES)
    listed, problems = _listed(folder / METADATA)
    found = tuple(_image(path, captions, listed) for path in images)
    unused = [
        path.name
        for path in files
        if path.suffix.lower() in _NO_IMAGES and path.name != METADATA and path not in captions.used
    ]
    strangers = [name for name in listed if name not in {_key(path.name) for path in images}]
    notes = (
        *problems,
        *_named("belong to no image and are not used", unused),
        *_named(f"are captioned in {METADATA} and are not in the folder", strangers),
        *([layout] if layout else ()),
    )
    for note in notes:
        log.warning("folder_note", reason=note)
    return ImageFolder(found, notes)


class _Captions:
    """The caption files of a folder, by the names of the images that they may belong to."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._by_stem: dict[str, list[Path]] = {}
        for path in files:
            self._by_stem.setdefault(_key(path.stem), []).append(path)
        self.used: set[Path] = set()

    def of(self, image: Path) -> CaptionText | None:
        """The caption of an image, or why it is ignored; None where there is none."""
        stems = (_key(image.stem), _key(image.name))
        files = [path for stem in stems for path in self._by_stem.get(stem, ())]
        # The most exact name first: other spellings are for images that have no such file.
        files.sort(
            key=lambda path: (
                path.stem not in (image.stem, image.name),
                SUFFIXES.index(path.suffix.lower()),
                path.suffix != path.suffix.lower(),
                path.stem != image.stem,
            )
        )
        if not files:
            return None
        self.used.add(files[0])
        found = _read(files[0])
        if found.problem:
            log.warning("caption_ignored", caption=printable(files[0].name), reason=found.problem)
        return found


def _image(path: Path, captions: _Captions, listed: dict[str, CaptionText]) -> TrainingImage:
    caption = captions.of(path) or listed.get(_key(path.name)) or CaptionText("")
    return TrainingImage(
        source=printable(path.name),
        path=str(path.resolve()),
        caption=caption.text,
        caption_problem=caption.problem,
    )


def _read(path: Path) -> CaptionText:
    try:
        if path.stat().st_size > MAX_CAPTION_BYTES:
            return CaptionText("", TOO_LARGE)
        return read_caption(path.read_bytes())
    except OSError as error:
        return CaptionText("", f"its file could not be read ({error.strerror})")


def _listed(path: Path) -> tuple[dict[str, CaptionText], tuple[str, ...]]:
    """Captions by the keys of file names, and sentences about lines that are not understood."""
    if not path.is_file():
        return {}, ()
    if path.stat().st_size > MAX_METADATA_BYTES:
        return {}, (f"{METADATA} is larger than {MAX_METADATA_BYTES // 1024**2} MiB; not used.",)
    text = decoded(path.read_bytes())
    if text is None:
        return {}, (f"{METADATA} is not UTF-8; it is not used.",)
    captions: dict[str, CaptionText] = {}
    wrong = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        entry = _entry(line)
        if entry is None:
            wrong.append(f"line {number}")
        else:
            captions[_key(entry[0])] = clean_caption(entry[1])
    return captions, _named(
        f"of {METADATA} are not JSON objects with file_name and text, and are not used", wrong
    )


def _entry(line: str) -> tuple[str, str] | None:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    name, text = values.get("file_name"), values.get("text")
    return (name, text) if isinstance(name, str) and isinstance(text, str) else None


def _layout_note(folders: Iterable[str]) -> str:
    """A sentence about subfolders; "" where there are none."""
    names = sorted(folders)
    if not names:
        return ""
    repeats = [name for name in names if _REPEATS.fullmatch(name)]
    if repeats:
        shown = printable(repeats[0])
        return (
            f"Subfolders such as {shown} are not read: kohya's scripts take the number in front "
            f"for repeats, which are set by the epochs here. Train on {shown} itself."
        )
    return f"Subfolders are not read ({_list(names)}). Move their images up to use them."


def _named(what: str, names: list[str]) -> tuple[str, ...]:
    return (f"These {what}: {_list(names)}.",) if names else ()


def _list(names: list[str]) -> str:
    shown = [printable(name) for name in names[:_NAMED_AT_MOST]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _key(name: str) -> str:
    """Equal for names that people take for the same."""
    return unicodedata.normalize("NFC", name).casefold().strip()
