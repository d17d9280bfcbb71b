"""An S3 server that keeps its objects in a folder: ministack, in a separate environment.

ministack needs another version of botocore than this program, so `scripts/setup` installs it apart.
It checks no signature: every program on this machine can read and write the store. It listens on
the loopback address only.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Collection
from pathlib import Path

from local.processes import HOST, ChildProcess, free_ports, inherited
from utils.errors import ConfigurationError, TrainingServerError

ENVIRONMENT = ".venv-s3"
REGION = "us-east-1"
ACCESS_KEY_ID = SECRET_ACCESS_KEY = "test"
"""The only account whose signed addresses ministack accepts."""
_START_SECONDS = 60.0
_REQUEST_SECONDS = 5.0
_SETTINGS = ("AWS_", "S3_", "MINISTACK_")


class FileStore:
    """The server. `start` begins it and makes its buckets.

    Args:
        folder: The folder of the objects and of the log.
        buckets: Buckets to make if they do not exist.
        root: The project's folder, with the environment of ministack.

    Raises:
        ConfigurationError: ministack is not installed.
    """

    def __init__(self, folder: Path, buckets: Collection[str], *, root: Path) -> None:
        program = root / ENVIRONMENT / "bin" / "ministack"
        if not program.exists():
            raise ConfigurationError(
                f"The S3 server is not installed: {program} does not exist. Run scripts/setup."
            )
        (port,) = free_ports(1)
        self.endpoint = f"http://{HOST}:{port}"
        self._buckets = tuple(buckets)
        folder.mkdir(parents=True, exist_ok=True)
        own = {
            "SERVICES": "s3",
            "S3_PERSIST": "1",
            "S3_DATA_DIR": str(folder / "objects"),
            "BIND_HOST": HOST,
            "GATEWAY_PORT": str(port),
        }
        kept = {
            name: value for name, value in inherited().items() if not name.startswith(_SETTINGS)
        }
        self.process = ChildProcess(
            "S3", [str(program)], environment=kept | own, folder=folder, log=folder / "server.log"
        )

    def start(self) -> None:
        """Start the server and wait until its buckets exist.

        Raises:
            TrainingServerError: It ended, or it did not answer in time.
        """
        self.process.start()
        deadline = time.monotonic() + _START_SECONDS
        while not all(self._make(bucket) for bucket in self._buckets):
            if self.process.exit_code is not None or time.monotonic() > deadline:
                self.process.kill()
                raise TrainingServerError(
                    f"The S3 server did not start:\n{self.process.last_words()}"
                )
            time.sleep(0.1)

    def _make(self, bucket: str) -> bool:
        """Make a bucket, or find it. False while the server does not answer."""
        request = urllib.request.Request(f"{self.endpoint}/{bucket}", method="PUT")
        try:
            with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS):
                return True
        except urllib.error.HTTPError as error:
            return error.code == 409  # it exists
        except OSError:
            return False
