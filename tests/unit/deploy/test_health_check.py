"""The health check asks the address that the worker's settings name."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


class _Well(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # pylint: disable=invalid-name  # the base class's name
        """Answer 200 to every page."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *_: object) -> None:  # pylint: disable=arguments-differ
        """Log nothing."""


@pytest.fixture(name="port")
def _port() -> Iterator[int]:
    """The port of a healthy worker on 127.0.0.1."""
    with HTTPServer(("127.0.0.1", 0), _Well) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def _ask(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "health_check.py"), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_host_and_port_are_read_from_the_env_file(port: int, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f'http_host="0.0.0.0"\nHTTP_PORT={port}  # here\n', "utf-8")
    done = _ask(tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "/health"), done.stderr
    assert _ask(tmp_path, "", "ready").stdout.strip() == "/ready"


def test_the_environment_wins_over_the_env_file_unless_it_is_empty(
    port: int, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("HTTP_PORT=1\nHTTP_HOST=192.0.2.1\n", "utf-8")
    done = _ask(tmp_path, HTTP_PORT=str(port), HTTP_HOST="127.0.0.1")
    assert done.returncode == 0, done.stderr
    refused = _ask(tmp_path, HTTP_PORT="", HTTP_HOST="127.0.0.1")
    assert refused.returncode == 1 and "http://127.0.0.1:1/health" in refused.stderr


def test_an_address_wins_over_all_settings(port: int, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("HTTP_PORT=1\n", "utf-8")
    assert _ask(tmp_path, f"http://127.0.0.1:{port}/", HTTP_PORT="2").returncode == 0


def test_an_unreadable_env_file_is_ignored(port: int, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe\x00")
    assert _ask(tmp_path, HTTP_PORT=str(port)).returncode == 0


@pytest.mark.parametrize("arguments", [(), ("--quiet",)])
def test_the_script_asks_health_and_ready_and_then_prints_diagnostics(
    port: int, arguments: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "health-check"), *arguments],
        env={"PATH": os.environ["PATH"], "HTTP_PORT": str(port), "HTTP_HOST": "0.0.0.0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["/health", "/ready"]
    headings = [line for line in done.stdout.splitlines() if line.startswith("---")]
    assert headings == ([] if arguments else ["--- status", "--- GPU", "--- log"])
