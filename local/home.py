"""The folder of `main.py up`: its lock, its secrets, and the data of its servers."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from utils.errors import ConfigurationError

_LOCK, _SECRETS = "up.lock", "secrets.json"


class RunsAlready(ConfigurationError):
    """Another `main.py up` uses the folder."""


@dataclasses.dataclass(frozen=True, slots=True)
class Secrets:
    """Secrets of one installation, made at its first start.

    Attributes:
        internal_api_token: The token between worker and API.
        api_key_pepper: The secret of the hashes of API keys.
        rabbitmq_password: The password of the broker's account.
        api_key: The key that `main.py up` prints; empty before the first start is complete.
    """

    internal_api_token: str
    api_key_pepper: str
    rabbitmq_password: str
    api_key: str = ""

    @classmethod
    def new(cls) -> Secrets:
        """Random ones."""
        return cls(*(secrets.token_hex(24) for _ in range(3)))


@dataclasses.dataclass(frozen=True, slots=True)
class Home:
    """The folder. Use `opened` to get it.

    Attributes:
        folder: Its absolute path.
    """

    folder: Path

    @property
    def logs(self) -> Path:
        """The folder of the log files."""
        return self.folder / "logs"

    def secrets(self) -> Secrets:
        """The secrets, made at the first call.

        Raises:
            ConfigurationError: Their file is damaged.
        """
        path = self.folder / _SECRETS
        if not path.exists():
            self.keep(Secrets.new())
        try:
            return Secrets(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"The file {path} is damaged. Restore it, or remove {self.folder} to start over "
                "without its jobs and models."
            ) from error

    def keep(self, values: Secrets) -> None:
        """Write the secrets, readable for this user only."""
        path = self.folder / _SECRETS
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(values), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


@contextlib.contextmanager
def opened(folder: Path, address: str) -> Iterator[Home]:
    """The folder, locked for this process while the block runs.

    Args:
        folder: Made if it does not exist.
        address: The address of the API, for another process that finds the lock.

    Raises:
        RunsAlready: Another process has the lock.
        ConfigurationError: The folder cannot be used.
    """
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "logs").mkdir(exist_ok=True)
        lock = (folder / _LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"The folder {folder} cannot be used: {error.strerror}. Name another with --data."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RunsAlready(f"It runs already: {lock.read().strip()}.") from None
        lock.truncate(0)
        lock.write(f"{address} (process {os.getpid()}, data in {folder})")
        lock.flush()
        yield Home(folder)
