"""The last release beside the present code, as during a rolling update."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

COMMIT = "1b8d803"
_ROOT = Path(__file__).resolve().parents[2]


def unpack(folder: Path) -> Path | None:
    """The last release's product with this suite's instruments around it.

    Args:
        folder: Where it goes; made here.

    Returns:
        The folder; None where this copy has no history to take it from.
    """
    folder.mkdir(parents=True)
    archive = folder.with_suffix(".tar")
    done = subprocess.run(
        ["git", "-C", str(_ROOT), "archive", "--output", str(archive), COMMIT],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        return None
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    suite = folder / "tests" / "chaos"
    shutil.rmtree(suite)
    shutil.copytree(_ROOT / "tests" / "chaos", suite)
    return folder
