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
_NAMED, _UNNAMED = "worker-", "starting-"
_LOCKING_SECONDS = 60.0


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
            self._lock, self.path = self._locked_folder()
            self.temporary = self.path / "tmp"
            self.temporary.mkdir()
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

    def _locked_folder(self) -> tuple[int, Path]:
        """A new folder and its lock, which the kernel releases however the process ends.

        The folder gets its name when it is locked. Another worker that starts at this moment would
        take a lock that is not held for that of a dead process, and remove the folder.
        """
        unnamed = Path(tempfile.mkdtemp(prefix=_UNNAMED, dir=self._root))
        lock = os.open(unnamed / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = unnamed.with_name(_NAMED + unnamed.name.removeprefix(_UNNAMED))
        unnamed.rename(path)
        return lock, path

    def _remove_leftovers(self) -> None:
        folders = [folder for folder in self._root.glob(f"{_NAMED}*") if not _in_use(folder)]
        folders += [folder for folder in self._root.glob(f"{_UNNAMED}*") if _is_old(folder)]
        for folder in folders:
            log.info("leftovers_removed", folder=folder.name)
            shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:  # a worker of the last release is about to make the lock, or died
        return not _is_old(folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


def _is_old(folder: Path) -> bool:
    """Whether a folder is older than its worker needs to lock it, by the disk's own clock."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder.parent) as probe:
            now = os.stat(probe.name).st_mtime
        return folder.stat().st_mtime <= now - _LOCKING_SECONDS
    except FileNotFoundError:
        return False  # it has just been named, or removed
