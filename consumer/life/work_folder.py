"""Folders on the worker's disk: one per process, and in it one per job.

Folders of dead processes are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from utils.errors import ConfigurationError
from utils.logger import get_logger

log = get_logger(__name__)

_LOCK = ".lock"


class WorkFolder:
    """This process's folder under `WORK_DIR`.

    A file lock marks it as in use for as long as the process lives.

    Args:
        root: `WORK_DIR`; None for a folder in the system's place for temporary files.

    Attributes:
        path: The process's folder.
        temporary: The trainer's folder for temporary files, which goes with this process.

    Raises:
        ConfigurationError: The folder cannot be written.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = (root or Path(tempfile.gettempdir()) / "training-server").resolve()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self.path = Path(tempfile.mkdtemp(prefix="worker-", dir=self._root))
            self.temporary = self.path / "tmp"
            self.temporary.mkdir()
            # Held open on purpose: the kernel releases the lock however the process ends.
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(
                f"WORK_DIR: {self._root} cannot be written ({error.strerror}). Allow the worker to "
                "write there, or set another folder."
            ) from error

    def close(self) -> None:
        """Remove the process's folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    @contextlib.contextmanager
    def job(self) -> Iterator[Path]:
        """An empty folder for one job, removed at the end of the block.

        Its name does not depend on the job: no text from a message becomes a path.
        """
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=self.path))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                log.warning("job_folder_not_removed", folder=str(folder))

    def _remove_leftovers(self) -> None:
        for folder in self._root.glob("worker-*"):
            if not _in_use(folder):
                log.info("leftovers_removed", folder=folder.name)
                shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        # Either its process died before it made the lock, or it is about to make it: give it a
        # minute.
        with contextlib.suppress(FileNotFoundError):
            return folder.stat().st_mtime > _now_on_disk(folder.parent) - 60
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


def _now_on_disk(folder: Path) -> float:
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        return os.stat(probe.name).st_mtime
