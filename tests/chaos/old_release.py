"""The last release next to the present code, as during a rolling update."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.releases import BEFORE_ROOMS, LAST_RELEASE, NotInHistory, extract

COMMIT = LAST_RELEASE
_INSTRUMENTS = BEFORE_ROOMS
"""The last commit whose instruments fit the module names of that release."""


def unpack(folder: Path) -> Path | None:
    """Write the last release's product into a folder, with instruments of this suite.

    Returns:
        The folder; None if this copy of the repository has no history.
    """
    try:
        extract(COMMIT, folder)
        shutil.rmtree(folder / "tests" / "chaos")
        return extract(_INSTRUMENTS, folder, "tests/chaos")
    except NotInHistory:
        return None
