"""The last release beside the present code, as during a rolling update."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

COMMIT = "1b8d803"
INSTRUMENTS = "73a5904"
"""The last commit whose instruments fit the module names of that release."""
_ROOT = Path(__file__).resolve().parents[2]


def unpack(folder: Path) -> Path | None:
    """The last release's product with this suite's instruments around it.

    Args:
        folder: Where it goes; made here.

    Returns:
        The folder; None where this copy has no history to take it from.
    """
    folder.mkdir(parents=True)
    if not _extract(folder, COMMIT):
        return None
    shutil.rmtree(folder / "tests" / "chaos")
    return folder if _extract(folder, INSTRUMENTS, "tests/chaos") else None


def _extract(folder: Path, commit: str, *paths: str) -> bool:
    """Copy the files of a commit into the folder; False if the commit is not there."""
    archive = folder.with_suffix(".tar")
    done = subprocess.run(
        ["git", "-C", str(_ROOT), "archive", "--output", str(archive), commit, *paths],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        return False
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    return True
