"""The servers and processes of `main.py up`, started in their order, watched and stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from local.home import Home, Secrets
from local.processes import HOST, ChildProcess, is_free
from local.rabbitmq_node import RabbitMqMissing, RabbitMqNode
from local.s3_store import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, FileStore
from utils.errors import ConfigurationError, TrainingServerError

FILES, MODELS, STATE = "files", "models", "state"
"""The buckets."""
LOOK_SECONDS = 0.5
_START_SECONDS = 90.0
_STOP_SECONDS = 30.0
_QUICK_SECONDS = 30.0
"""A program that ends so soon after its start counts as one that cannot run."""
_MOST_QUICK_ENDS = 3
_ACCOUNT = "training"
_ORG = "org_default"


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """How the API and the worker are started.

    Attributes:
        root: The project's folder.
        port: The port of the API.
        environment: Returns a child's environment for the settings that this machine makes.
    """

    root: Path
    port: int
    environment: Callable[[Mapping[str, str]], dict[str, str]]

    @property
    def address(self) -> str:
        """The address of the API."""
        return f"http://{HOST}:{self.port}"


class OneMachine:
    """Everything that trains on this machine.

    Args:
        home: The folder of the data.
        program: How the API and the worker are started.
        settings: Settings of the API and the worker, by name.
        show: Receives a sentence about each event.

    Raises:
        ConfigurationError: A program is not installed.
    """

    def __init__(
        self,
        home: Home,
        program: Program,
        settings: Mapping[str, str],
        show: Callable[[str], None],
    ) -> None:
        self._home = home
        self._program = program
        self._show = show
        self._secrets = home.secrets()
        try:
            self._broker = RabbitMqNode(
                home.folder / "rabbitmq",
                name="training-server",
                user=_ACCOUNT,
                password=self._secrets.rabbitmq_password,
            )
        except RabbitMqMissing as error:
            raise ConfigurationError(str(error)) from error
        self._store = FileStore(home.folder / "s3", (FILES, MODELS, STATE), root=program.root)
        self._settings = program.environment({**self._own_settings(), **settings})
        self._api = self._child("API", "api")
        self._worker = self._child("worker", "worker")
        self._watched = [_Watched(self._api), _Watched(self._worker)]

    @contextlib.contextmanager
    def running(self) -> Iterator[Secrets]:
        """Start everything; stop it at the end of the block.

        Raises:
            TrainingServerError: A server did not start.
        """
        try:
            self._broker.start()
            self._store.start()
            self._keep_key()
            self._start_api()
            self._worker.start()
            yield self._secrets
        except RuntimeError as error:
            raise TrainingServerError(str(error)) from error
        finally:
            self._stop()

    def look(self) -> None:
        """Start again what has ended.

        Raises:
            TrainingServerError: A program ends again and again.
        """
        if not self._broker.is_running:
            self._show("RabbitMQ has ended; it is started again.")
            self._broker.kill()
            self._broker.start()
        if self._store.process.exit_code is not None:
            self._show("The S3 server has ended; it is started again.")
            self._store.start()
        for one in self._watched:
            one.look(self._show)

    def _own_settings(self) -> dict[str, str]:
        """The addresses and secrets of this machine's servers."""
        return {
            "RABBITMQ_HOST": self._broker.host,
            "RABBITMQ_PORT": str(self._broker.port),
            "RABBITMQ_USER": _ACCOUNT,
            "RABBITMQ_PASS": self._secrets.rabbitmq_password,
            "AWS_ENDPOINT_URL_S3": self._store.endpoint,
            "AWS_S3_REGION_NAME": REGION,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
            "AWS_STORAGE_BUCKET_NAME": FILES,
            "MODEL_BUCKET_NAME": MODELS,
            "STATE_BUCKET_NAME": STATE,
            "BACKEND_API_URL": self._program.address,
            "INTERNAL_API_TOKEN": self._secrets.internal_api_token,
            "API_KEY_PEPPER": self._secrets.api_key_pepper,
            "API_DATABASE_URL": f"sqlite:///{self._home.folder / 'api.db'}",
            "API_HOST": HOST,
            "API_PORT": str(self._program.port),
            "WORK_DIR": str(self._home.folder / "work"),
        }

    def _child(self, name: str, command: str) -> ChildProcess:
        return ChildProcess(
            name,
            [sys.executable, str(self._program.root / "main.py"), command],
            environment=self._settings,
            folder=self._home.folder,  # without a `.env`
            log=self._home.logs / f"{command}.log",
        )

    def _keep_key(self) -> None:
        """Make the key that is printed, at the first start."""
        if self._secrets.api_key:
            return
        main = [sys.executable, str(self._program.root / "main.py")]
        made = subprocess.run(
            [*main, *("api", "keys", "create", "--org", _ORG, "--name", "up", "--scope", "admin")],
            env=self._settings,
            cwd=self._home.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            raise TrainingServerError(f"No API key could be made: {made.stderr.strip()}")
        self._secrets = dataclasses.replace(self._secrets, api_key=made.stdout.split()[-1])
        self._home.keep(self._secrets)

    def _start_api(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        # The API of an earlier start, which was killed a moment ago, may still be ending.
        while not is_free(self._program.port):
            if time.monotonic() > deadline - _START_SECONDS + 15:
                raise ConfigurationError(
                    f"Port {self._program.port} is in use. Set API_PORT to a free port."
                )
            time.sleep(0.2)
        self._api.start()
        while not _answers(f"{self._program.address}/health"):
            if self._api.exit_code is not None or time.monotonic() > deadline:
                raise TrainingServerError(
                    f"The API did not start. The end of {self._api.log}:\n{self._api.last_words()}"
                )
            time.sleep(0.1)

    def _stop(self) -> None:
        """First the worker, so that the API hears its last report; then the servers."""
        self._worker.stop(_STOP_SECONDS)
        self._api.stop(_STOP_SECONDS)
        self._store.process.stop(_STOP_SECONDS)
        self._broker.shut_down()


class _Watched:
    """A program that is started again when it ends."""

    def __init__(self, process: ChildProcess) -> None:
        self._process = process
        self._started_at = time.monotonic()
        self._quick_ends = 0

    def look(self, show: Callable[[str], None]) -> None:
        """Start the program again if it has ended, and print that."""
        code = self._process.exit_code
        if code is None:
            return
        quick = time.monotonic() - self._started_at < _QUICK_SECONDS
        self._quick_ends = self._quick_ends + 1 if quick else 0
        words = self._process.last_words()
        if self._quick_ends >= _MOST_QUICK_ENDS:
            raise TrainingServerError(
                f"The {self._process.name} ends again and again, with exit code {code}. "
                f"The end of {self._process.log}:\n{words}"
            )
        show(f"The {self._process.name} has ended with exit code {code}; it is started again.")
        time.sleep(1.0)
        self._started_at = time.monotonic()
        self._process.start()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False
