"""Earlier versions of the product, taken from git's history."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

LAST_RELEASE = "1b8d803"
BEFORE_ROOMS = "73a5904"
"""The last commit before the packages were divided by business."""

_ROOT = Path(__file__).resolve().parents[1]


class NotInHistory(Exception):
    """This copy of the repository does not contain the commit."""


def extract(commit: str, folder: Path, *paths: str) -> Path:
    """Write the files of a commit into a folder.

    Args:
        folder: Created if it does not exist.
        paths: Only these files and folders; none for all.

    Returns:
        The folder.

    Raises:
        NotInHistory: The history does not reach the commit, as in a shallow clone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder.with_suffix(".tar")
    done = subprocess.run(
        ["git", "-C", str(_ROOT), "archive", "--output", str(archive), commit, *paths],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotInHistory(f"The commit {commit} is not in git's history: {done.stderr.strip()}")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    return folder
