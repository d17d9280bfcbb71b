"""Folders that are complete or absent: files, a manifest with their hashes, then one rename.

Needs no torch, so the front desk can verify checkpoints too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import CheckpointUnusable

MANIFEST = "manifest.json"
_REMEDY = "A worker continues without it; delete its folder before `train --resume`."


def write_folder(folder: Path, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
    """Write `files` and a manifest that names them, so that `folder` is complete or absent.

    The files are written and synced to a temporary folder next to `folder`, the manifest last; then
    the folder is renamed. A folder of the same name is replaced.

    Args:
        folder: The target.
        files: Content by plain file name.
        facts: Further values of the manifest (JSON values).

    Raises:
        OSError: The disk is full or broken.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in files.items():
            _write_synced(half / name, content)
        listing = {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        }
        manifest = json.dumps({**facts, "files": listing}, indent=2).encode()
        _write_synced(half / MANIFEST, manifest)
        _sync_folder(half)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(half, folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def verify(folder: Path) -> dict[str, Any]:
    """Read the manifest and check that every file in it exists, complete and unchanged.

    Returns:
        The manifest.

    Raises:
        CheckpointUnusable: A file is missing, truncated or altered; the message names it.
    """
    folder = Path(folder)
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        listing = {
            name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
    except FileNotFoundError as error:
        raise CheckpointUnusable(
            f"The checkpoint {folder.name} has no {MANIFEST}: it was never finished. " f"{_REMEDY}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointUnusable(
            f"The checkpoint {folder.name} has a damaged {MANIFEST}: it is not JSON that lists the "
            f"files with size and sha256. {_REMEDY}"
        ) from error
    for name, (size, sha256) in listing.items():
        _verify_file(folder, name, size, sha256)
    return manifest


def _verify_file(folder: Path, name: str, size: int, sha256: str) -> None:
    where = f"The checkpoint {folder.name} cannot be used: {name}"
    if Path(name).name != name:
        raise CheckpointUnusable(f"{where} is not a plain file name. {_REMEDY}")
    if not (folder / name).is_file():
        raise CheckpointUnusable(f"{where} is missing. {_REMEDY}")
    if (found := (folder / name).stat().st_size) != size:
        raise CheckpointUnusable(f"{where} has {found} bytes instead of {size}. {_REMEDY}")
    with (folder / name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise CheckpointUnusable(
                f"{where} was altered: its SHA-256 is not the manifest's. {_REMEDY}"
            )


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
