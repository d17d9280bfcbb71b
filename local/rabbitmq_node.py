"""A private RabbitMQ node in a separate folder, for `main.py up`, the demo and the tests.

It does not use the machine's own broker: the node has its own name, ports, cookie, data, log,
configuration and `epmd` (Erlang's name server), all bound to the loopback interface. Everything
ends with this process, even if it is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from local.processes import HOST, free_ports, inherited

START_SECONDS = 60.0
STOP_SECONDS = 20.0
# Debian and the generic tarball have the real script here. The one in PATH is often a wrapper that
# requires the account `rabbitmq` and /var/lib/rabbitmq.
_USUAL_FOLDERS = (
    "/usr/lib/rabbitmq/bin",
    "/usr/lib/rabbitmq/lib/*/sbin",
    "/opt/rabbitmq/sbin",
    "/usr/local/sbin",
    "/opt/homebrew/sbin",
)


class RabbitMqMissing(RuntimeError):
    """There is no RabbitMQ server on this machine."""


class RabbitMqNode:
    """A broker that belongs to one `with` block.

    Args:
        folder: Folder of data, log and configuration; made if it is missing.
        consumer_timeout_ms: The broker's delivery-ack time-out, checked every second; None keeps
            30 minutes.
        configuration: More lines of `rabbitmq.conf`; they take precedence.
        plugins: Plugins to enable.
        name: The node's name, without a host. A node finds the data of a node of the same name.
        user, password: The account that a new node is created with.

    Attributes:
        host: Always the loopback address.
        port: AMQP port, the same after a restart.
        url: `amqp://user:password@host:port/`, for any client.

    Raises:
        RabbitMqMissing: From the constructor: this machine has no RabbitMQ. The message has the
            command that installs it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        consumer_timeout_ms: int | None = None,
        configuration: str = "",
        plugins: Sequence[str] = (),
        name: str = "",
        user: str = "guest",
        password: str = "guest",  # noqa: S107  # RabbitMQ's own default
    ) -> None:
        self.folder = Path(folder).resolve()
        self.host = HOST
        self.port, self._dist_port, self._epmd_port = free_ports(3)
        self.url = f"amqp://{user}:{password}@{HOST}:{self.port}/"
        self.name = f"{name or f'private-{secrets.token_hex(4)}'}@localhost"
        self._account = (user, password)
        self._scripts = _find_scripts()
        self._consumer_timeout_ms = consumer_timeout_ms
        self._more_configuration = configuration
        self._plugins = plugins
        self._epmd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RabbitMqNode:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the node with its earlier data, and wait until it answers AMQP.

        Raises:
            RuntimeError: It ended or did not answer in time; the message has the end of its log.
        """
        self._write_configuration()
        atexit.register(self.stop)
        try:
            self._epmd = self._epmd or self._spawn(
                ["epmd", "-port", str(self._epmd_port), "-address", HOST], "epmd"
            )
            self._server = self._spawn([str(self._scripts / "rabbitmq-server")], "server")
            self._guard = _guard_over(self._server.pid, self._epmd.pid)
            self._wait_until_it_answers(self._server)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything at once; the data stay in the folder. Safe to call again."""
        atexit.unregister(self.stop)
        self.kill()
        if self._epmd is not None:
            _kill_group(self._epmd)
            self._epmd = None

    def kill(self) -> None:
        """Kill the node with SIGKILL. `start` starts it again with the data on its disk."""
        self._dismiss_guard()
        if self._server is not None:
            _kill_group(self._server)
            self._server = None

    @property
    def is_running(self) -> bool:
        """Whether the server's process runs."""
        return self._server is not None and self._server.poll() is None

    def shut_down(self) -> None:
        """End the node as an operator would; the data stay in the folder."""
        if self._server is not None:
            self._server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(STOP_SECONDS)
        self.stop()

    def restart(self) -> None:
        """End the node as an operator would, and start it again with the same data."""
        self._dismiss_guard()
        if self._server is not None:
            self._server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(STOP_SECONDS)
        self.kill()
        self.start()

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` on this node.

        Returns:
            The output of the command.

        Raises:
            RuntimeError: The command failed; the message has its output.
        """
        done = subprocess.run(
            [str(self._scripts / "rabbitmqctl"), "--quiet", "-n", self.name, *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=START_SECONDS,
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr or done.stdout}")
        return done.stdout

    def _write_configuration(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {
            "rabbitmq.conf": f"listeners.tcp.1 = {HOST}:{self.port}\n"
            "disk_free_limit.absolute = 1MB\n"  # the default would block publishers on a small disk
            "log.file.level = info\n"
            f"default_user = {self._account[0]}\ndefault_pass = {self._account[1]}\n"
            + self._more_configuration,
            "advanced.config": self._advanced_configuration(),
            "enabled_plugins": f"[{','.join(self._plugins)}].\n",
            "environment.conf": "",  # in place of /etc/rabbitmq/rabbitmq-env.conf
        }
        for name, text in files.items():
            (self.folder / name).touch(mode=0o600)  # the account is in one of them
            (self.folder / name).write_text(text, encoding="utf-8")
        cookie = self.folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.touch(mode=0o600)
            cookie.write_text(secrets.token_hex(16), encoding="ascii")
            cookie.chmod(0o400)

    def _advanced_configuration(self) -> str:
        if self._consumer_timeout_ms is None:
            return "[].\n"
        return (
            "[{rabbit, [{channel_tick_interval, 1000}, "
            f"{{consumer_timeout, {self._consumer_timeout_ms}}}]}}].\n"
        )

    def _environment(self) -> dict[str, str]:
        own = {
            "HOME": self.folder,  # Erlang reads its cookie there
            "ERL_EPMD_PORT": self._epmd_port,
            "ERL_EPMD_ADDRESS": HOST,
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_PORT": self.port,
            "RABBITMQ_DIST_PORT": self._dist_port,
            "RABBITMQ_CONF_ENV_FILE": self.folder / "environment.conf",
            "RABBITMQ_CONFIG_FILE": self.folder / "rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": self.folder / "advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": self.folder / "enabled_plugins",
            "RABBITMQ_MNESIA_BASE": self.folder / "data",
            "RABBITMQ_LOG_BASE": self.folder / "log",
            "RABBITMQ_PLUGINS_EXPAND_DIR": self.folder / "plugins",
            "RABBITMQ_GENERATED_CONFIG_DIR": self.folder / "generated",
            "RABBITMQ_FEATURE_FLAGS_FILE": self.folder / "feature_flags",
            "RABBITMQ_PID_FILE": self.folder / "server.pid",
            # One scheduler and no busy waiting: the node shares the machine with the tested
            # program.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} "
            "+S 1:1 +SDio 4 +sbwt none +sbwtdcpu none +sbwtdio none",
            # The script then becomes the Erlang machine instead of its parent shell.
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        kept = {
            name: value
            for name, value in inherited().items()
            if not name.startswith(("RABBITMQ_", "ERL_")) and name != "NOTIFY_SOCKET"
        }
        return kept | {name: str(value) for name, value in own.items()}

    def _spawn(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                command,
                env=self._environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the demo, which then stops the node
            )

    def _wait_until_it_answers(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise RuntimeError(f"RabbitMQ ended at its start:\n{self._last_words()}")
            if _speaks_amqp(self.port):
                return
            time.sleep(0.05)
        raise RuntimeError(
            f"RabbitMQ did not answer in {START_SECONDS:.0f} s:\n{self._last_words()}"
        )

    def _last_words(self) -> str:
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")[-3000:]

    def _dismiss_guard(self) -> None:
        if self._guard is not None:
            _kill_group(self._guard)
            if self._guard.stdin:
                self._guard.stdin.close()
            self._guard = None


def _find_scripts() -> Path:
    folders = [
        folder
        for pattern in _USUAL_FOLDERS
        for folder in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)
    ]
    if found := shutil.which("rabbitmq-server", path=_search_path()):
        folders.append(Path(found).resolve().parent)
    for folder in folders:
        # `rabbitmq-env` is next to the real scripts, but not next to a distribution's wrapper.
        if all((folder / name).exists() for name in ("rabbitmq-server", "rabbitmq-env")):
            return folder
    raise RabbitMqMissing(
        "RabbitMQ is not installed on this machine. On Debian or Ubuntu: "
        "apt-get install rabbitmq-server"
    )


def _search_path() -> str:
    return inherited().get("PATH", "") + ":/usr/sbin:/usr/local/sbin"


def _speaks_amqp(port: int) -> bool:
    """Whether an AMQP 0-9-1 greeting is answered with a method frame (`connection.start`)."""
    try:
        with socket.create_connection((HOST, port), timeout=2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"
    except OSError:
        return False


def _guard_over(*groups: int) -> subprocess.Popen[bytes]:
    """Start a shell that kills these process groups once this process has ended in any way.

    Its standard input then closes.
    """
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read _; for group; do kill -9 "-$group"; done', "guard"]
        + [str(group) for group in groups],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
