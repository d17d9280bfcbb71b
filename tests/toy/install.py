"""Adds the toy kind to a copy of the product, as the author of a kind would."""

from __future__ import annotations

import filecmp
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDED = {
    "tests/toy/kind.py": "jobs/toy.py",
    "tests/toy/work.py": "training/toy/work.py",
}
"""The kind's file and its training folder, by the files of this folder."""
REGISTRY_LINE = '    "toy": "jobs.toy:ToyKind",\n'
_REGISTRY = "REGISTRY = {\n"
_PLACES = {"tests.toy.kind": "jobs.toy", "tests.toy.work": "training.toy.work"}


def copy_with_toy(folder: Path) -> Path:
    """Copy the product into a folder, with the toy kind.

    Returns:
        The folder.
    """
    for name in product_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    for source, name in ADDED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        for old, new in _PLACES.items():
            text = text.replace(old, new)
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")
    (folder / "training" / "toy" / "__init__.py").touch()
    kinds = folder / "jobs" / "kinds.py"
    before, found, after = kinds.read_text(encoding="utf-8").partition(_REGISTRY)
    assert found, "the registry has another form"
    head, end, rest = after.partition("}\n")
    kinds.write_text(f"{before}{found}{head}{REGISTRY_LINE}{end}{rest}", encoding="utf-8")
    return folder


def product_files() -> list[str]:
    """The files that git lists, without those of the tests."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [
        name
        for name in listed.splitlines()
        if not name.startswith("tests/") and (ROOT / name).is_file()
    ]


def differences(folder: Path) -> set[str]:
    """Files of the copy that the product has not, or has with another content."""
    there = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return {
        name
        for name in there | set(product_files())
        if not (ROOT / name).is_file()
        or not (folder / name).is_file()
        or not filecmp.cmp(ROOT / name, folder / name, shallow=False)
    }
