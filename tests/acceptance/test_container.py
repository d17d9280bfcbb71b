"""What the image runs, run without it: entry point, health check, the stand-in backend."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.backend import SIGNING_SECRET, TOKEN
from sandbox.worker_process import ROOT
from services.webhook_service import Ending, EndingOutcome, WebhookService
from tests.acceptance.world import World, until
from training.fetch_base_model import fetch

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def _entrypoint(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(ROOT / "deploy" / "entrypoint"), *arguments],
        env={**environment, "PATH": PATH},
        cwd=ROOT,  # as the image's /app
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _ask(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "health_check.py"), *arguments],
        env={"PATH": PATH, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_backend_that_is_down_is_told_and_the_worker_starts_all_the_same(apart: World) -> None:
    port = str(_free_port())
    settings = apart.settings(HTTP_PORT=port, BACKEND_API_URL="http://127.0.0.1:1")
    with _entrypoint(settings, "worker") as started:
        try:
            healthy = until(lambda: _ask(HTTP_PORT=port).returncode == 0 or started.poll())
            assert healthy is True
            assert json.loads(_ask(HTTP_PORT=port).stdout)["status"]
            until(lambda: _ask(f"http://127.0.0.1:{port}", "ready").returncode == 0)
        finally:
            started.send_signal(signal.SIGTERM)
        said, _ = started.communicate(timeout=60)
    assert started.returncode == 0, said
    assert "mend what failed" in said and "worker_stopped" in said
    assert _ask(HTTP_PORT=port).returncode == 1


def test_wrong_settings_end_it_with_2_and_nothing_is_started() -> None:
    with _entrypoint({"EPOCHS": "many"}) as started:
        said, _ = started.communicate(timeout=60)
    assert started.returncode == 2 and "EPOCHS" in said and "worker_starting" not in said


def test_a_stop_during_the_check_is_obeyed_at_once(apart: World) -> None:
    with _entrypoint(apart.settings()) as started:
        with pytest.raises(subprocess.TimeoutExpired):
            started.wait(0.5)
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 0
        assert started.stdout and "worker_starting" not in started.stdout.read()


def test_other_commands_are_handed_through() -> None:
    with _entrypoint({}, "redrive", "--help") as started:
        said, _ = started.communicate(timeout=60)
    assert started.returncode == 0 and "dead queue" in said


class _Ill(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # pylint: disable=invalid-name
        """Answer as a worker that should be started anew."""
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b'{"problem": "the thread stands still"}')

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(name="ill")
def _ill() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Ill) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        yield server.server_port
        server.shutdown()


def test_a_worker_that_says_that_it_is_ill_is_unhealthy(ill: int) -> None:
    asked = _ask(HTTP_PORT=str(ill))
    assert asked.returncode == 1 and "stands still" in asked.stdout


def test_the_stand_in_backend_takes_a_signed_webhook() -> None:
    port = str(_free_port())
    with subprocess.Popen(
        [sys.executable, "-m", "sandbox.backend_server", "127.0.0.1", port],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout and "listens" in server.stdout.readline()
            url = f"http://127.0.0.1:{port}"
            webhooks = WebhookService(
                backend_url=url, allowed_origins=(), token=TOKEN, signing_secrets=(SIGNING_SECRET,)
            )
            body = {"style_id": 7, "error_message": "it broke", "error_code": "GPU_OOM"}
            answer = webhooks.deliver(
                url, Ending("failed", "msg_1", body), for_seconds=0, stop=threading.Event()
            )
            assert answer.outcome is EndingOutcome.DELIVERED
            assert "POST /api/webhooks/training/failed 200" in server.stdout.readline()
        finally:
            server.terminate()


def test_a_base_model_is_put_into_a_folder_whole(base_model: Path, tmp_path: Path) -> None:
    fetch(str(base_model), None, tmp_path / "model")
    names = {path.relative_to(base_model) for path in base_model.rglob("*") if path.is_file()}
    assert names and all((tmp_path / "model" / name).is_file() for name in names)
