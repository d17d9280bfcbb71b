"""A private PostgreSQL server in its own folder, for the demo and the tests.

Nothing of the machine's own server is touched. It listens on the loopback interface and on no
socket file, and ends with this process, even if that is killed. PostgreSQL refuses to run as root:
then the server runs as the user `postgres` or `nobody`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from local.processes import HOST, free_ports

START_SECONDS = 60.0
_FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")
_CONFIGURATION = """
listen_addresses = '{host}'
port = {port}
unix_socket_directories = ''
max_connections = 200
shared_buffers = 64MB
fsync = {fsync}
log_destination = 'stderr'
"""


class PostgresMissing(RuntimeError):
    """There is no PostgreSQL server on this machine."""


class PostgresNode:
    """A database server that belongs to one `with` block.

    Args:
        folder: Folder of the data; a temporary one, removed afterwards, if None. Every user must be
            able to enter its parents if this process is root's.
        durable: Write to the disk before each commit is answered. False is faster, for tests.

    Attributes:
        port: The port, the same after a restart.

    Raises:
        PostgresMissing: From the constructor: no PostgreSQL on this machine.
    """

    def __init__(self, folder: Path | None = None, *, durable: bool = False) -> None:
        self._programs = _find_programs()
        self._is_temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-")) if folder is None else folder
        self._data = self.folder / "data"
        self._durable = durable
        (self.port,) = free_ports(1)
        self._server: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._is_temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str = "postgres") -> str:
        """The SQLAlchemy address of a database."""
        return f"postgresql+psycopg://postgres@{HOST}:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Make an empty database. Returns its SQLAlchemy address."""
        command = f'CREATE DATABASE "{name}"'
        self._run("psql", *self._address, "-d", "postgres", "-q", "-c", command)
        return self.url(name)

    def dump(self, database: str) -> Path:
        """Write a backup of a database. Returns its file, which the next backup replaces."""
        path = self.folder / f"{database}.sql"
        self._run("pg_dump", *self._address, "-d", database, "-f", str(path))
        return path

    def restore(self, database: str, backup: Path) -> None:
        """Replace a database by its backup. Open connections to it are closed."""
        for command in (
            f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)',
            f'CREATE DATABASE "{database}"',
        ):
            self._run("psql", *self._address, "-d", "postgres", "-q", "-c", command)
        self._run("psql", *self._address, "-d", database, "-q", "-f", str(backup))

    @property
    def _address(self) -> tuple[str, ...]:
        return ("-h", HOST, "-p", str(self.port), "-U", "postgres")

    def start(self) -> None:
        """Start the server with the data it had before, and wait until it answers.

        Raises:
            RuntimeError: It did not start; the message has the end of its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if user := _other_user():
            shutil.chown(self.folder, user)
            self.folder.chmod(0o755)
        if not self._data.exists():
            self._run(
                "initdb",
                "-D",
                str(self._data),
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--no-sync",
                "--locale=C.UTF-8",
            )
        fsync = "on" if self._durable else "off"
        text = _CONFIGURATION.format(host=HOST, port=self.port, fsync=fsync)
        (self._data / "postgresql.auto.conf").write_text(text, encoding="utf-8")
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        atexit.register(self.stop)
        with (self.folder / "server.log").open("ab") as log:
            # pylint: disable-next=consider-using-with
            self._server = subprocess.Popen(
                [str(self._programs / "postgres"), "-D", str(self._data)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                user=_other_user(),
                group=_other_group(),
                extra_groups=[] if _other_user() else None,
                start_new_session=True,
            )
        self._guard = _guard_over(self._server.pid)
        self._wait()

    def stop(self) -> None:
        """End the server; the data stay in the folder. Safe to call again."""
        atexit.unregister(self.stop)
        if self._server is not None and self._server.poll() is None:
            self._server.send_signal(signal.SIGINT)  # fast: clients are disconnected
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(20)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the server and its children. `start` brings it back."""
        for process in (self._guard, self._server):
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if process.stdin:
                    process.stdin.close()
        self._guard = self._server = None

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=START_SECONDS,
            user=_other_user(),
            group=_other_group(),
            extra_groups=[] if _other_user() else None,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr or done.stdout}")

    def _wait(self) -> None:
        assert self._server
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                break
            with contextlib.suppress(RuntimeError):
                self._run("pg_isready", "-h", HOST, "-p", str(self.port), "-q")
                return
            time.sleep(0.05)
        log = (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"PostgreSQL did not start:\n{log[-3000:]}")


def _find_programs() -> Path:
    found = [
        path
        for pattern in _FOLDERS
        for path in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)
    ]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve().parent)
    for folder in found:
        if all((folder / name).exists() for name in ("postgres", "initdb", "psql")):
            return folder
    raise PostgresMissing(
        "PostgreSQL is not installed on this machine. On Debian or Ubuntu: apt-get install "
        "postgresql (set create_main_cluster=false in /etc/postgresql-common/createcluster.conf "
        "first, so that no server of the machine's own starts)"
    )


def _other_user() -> str | None:
    """The user that the server runs as; None for this process's own."""
    if os.geteuid() != 0:
        return None
    names = {each.pw_name for each in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _other_group() -> int | None:
    user = _other_user()
    return pwd.getpwnam(user).pw_gid if user else None


def _guard_over(group: int) -> subprocess.Popen[bytes]:
    """A shell that kills the server's processes when this process is gone: its input ends."""
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read _; kill -9 "-$0"', str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
