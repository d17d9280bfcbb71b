"""A disk that is full in the middle of a write: half of a file is there, and then ENOSPC."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORK = "training-server"
"""Only files below a folder of this name are cut: `WORK_DIR` of the suite's workers."""


class _Cut(io.BufferedWriter):
    """Takes half of the first write, puts it on the disk, and has no room for the rest."""

    def write(self, data: Any, /) -> int:
        half = bytes(data)[: len(data) // 2]
        super().write(half)
        super().flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cut_writes(marker: Path, note: Callable[[str], None]) -> None:
    """While the file `marker` exists, files that a job writes in this process are cut off.

    Args:
        marker: Checked whenever a file is opened.
        note: Called with the name of each file that is cut.
    """
    original = io.open

    # pylint: disable-next=keyword-arg-before-vararg  # as `io.open` has it
    def opened(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **how: Any) -> Any:
        is_work = isinstance(file, (str, os.PathLike)) and WORK in Path(file).parts
        if is_work and set(mode) & set("wax") and "b" in mode and marker.exists():
            note(Path(file).name)
            return _Cut(io.FileIO(file, mode.replace("b", "")))
        return original(file, mode, buffering, *more, **how)

    setattr(io, "open", opened)  # the one that `pathlib` calls
