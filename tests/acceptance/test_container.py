"""The image's programs, run without the image: entry point, health check, stand-in backend."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
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
from services.webhooks.webhook_service import EndingOutcome, EndingWebhook, WebhookService
from tests.acceptance.world import World, until
from training.style.families.fetch_base_model import fetch

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
# Root may write anywhere unless these capabilities are dropped.
UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-fowner") if os.geteuid() == 0 else ()


@pytest.fixture(scope="module", name="image")
def _image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image's /app, read-only: files that `.dockerignore` lets in and the Dockerfile keeps."""
    app = tmp_path_factory.mktemp("image") / "app"
    app.mkdir()
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line.startswith("!"):
            source, target = ROOT / line[1:], app / line[1:]
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
    for room in ("sandbox", "api"):
        shutil.rmtree(app / room)
    for path in (app, *app.rglob("*")):
        path.chmod(path.stat().st_mode & 0o555)
    yield app
    for path in (app, *app.rglob("*")):  # so that pytest can remove it
        path.chmod(path.stat().st_mode | 0o200)


def _entrypoint(
    environment: dict[str, str], *arguments: str, app: Path = ROOT
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*UNPRIVILEGED, str(app / "deploy" / "entrypoint"), *arguments],
        env={"PYTHONDONTWRITEBYTECODE": "1", **environment, "PATH": PATH},
        cwd=app,
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


def test_the_images_files_are_enough_for_a_job_and_stay_unchanged(
    apart: World, image: Path, tmp_path: Path
) -> None:
    before = sorted(image.rglob("*"))
    port = str(_free_port())
    settings = apart.settings(
        HTTP_PORT=port,
        IMAGE_BUCKETS=f"{apart.media},a-bucket-that-is-missing",
        HOME="/nonexistent",
        HF_HOME=str(tmp_path / "models"),
        MPLCONFIGDIR=str(tmp_path / "matplotlib"),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    message = apart.envelope(style_id=71)
    with _entrypoint(settings, "worker", app=image) as started:
        try:
            healthy = until(lambda: _ask(HTTP_PORT=port).returncode == 0 or started.poll())
            assert healthy is True
            assert json.loads(_ask(HTTP_PORT=port).stdout)["status"]
            until(lambda: _ask(f"http://127.0.0.1:{port}", "ready").returncode == 0)
            apart.publish(message)
            assert apart.ending(message["task_id"])[0] == "complete"
        finally:
            started.send_signal(signal.SIGTERM)
        said, _ = started.communicate(timeout=60)
    assert started.returncode == 0, said
    # The doctor reported the problem and did not stop the worker.
    assert "fix what failed" in said and "worker_stopped" in said
    assert _ask(HTTP_PORT=port).returncode == 1
    assert sorted(image.rglob("*")) == before


def test_the_commands_image_lists_jobs_without_the_training_files(
    apart: World, image: Path, tmp_path: Path
) -> None:
    stage = DOCKERFILE.partition("FROM front AS commands")[2].partition("FROM ")[0]
    (removed,) = re.findall("^RUN rm -r (.*)$", stage, flags=re.MULTILINE)

    def without(folder: str, _: list[str]) -> list[str]:
        return removed.split() if folder == str(image) else []

    app = Path(shutil.copytree(image, tmp_path / "commands", ignore=without))
    assert not (app / "training").exists()
    listed = subprocess.run(
        [sys.executable, "main.py", "jobs", "--json"],
        env=apart.settings() | {"PATH": PATH, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=app,
        capture_output=True,
        text=True,
        check=False,
    )
    assert listed.returncode == 0, listed.stderr
    assert json.loads(listed.stdout) == {"jobs": [], "more": 0}


def test_an_unprivileged_user_cannot_write_to_the_images_files(image: Path) -> None:
    touch = subprocess.run(
        [*UNPRIVILEGED, "touch", image / "new"], capture_output=True, check=False
    )
    assert touch.returncode != 0 and b"denied" in touch.stderr


@pytest.mark.parametrize("option", [("--config", "{file}"), ("--config={file}",)])
def test_wrong_settings_end_the_container_with_2_before_the_worker_starts(
    option: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "settings of mine.toml"
    file.write_text('epochs = "many"\n', encoding="utf-8")
    arguments = ["worker", *(each.format(file=file) for each in option)]
    with _entrypoint({}, *arguments) as started:
        said, _ = started.communicate(timeout=60)
    assert started.returncode == 2 and "EPOCHS" in said and "fix what failed" in said
    assert "worker_starting" not in said


def test_a_worker_for_one_message_starts_without_the_doctor() -> None:
    with _entrypoint({}, "worker", "--once") as started:
        said, _ = started.communicate(timeout=60)
    assert started.returncode == 2 and "BACKEND_API_URL" in said
    assert "fix what failed" not in said


def test_a_stop_during_the_doctor_is_obeyed_at_once(apart: World) -> None:
    with _entrypoint(apart.settings()) as started:
        with pytest.raises(subprocess.TimeoutExpired):
            started.wait(0.5)
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 0
        assert started.stdout and "worker_starting" not in started.stdout.read()


def test_other_commands_are_passed_through() -> None:
    with _entrypoint({}, "redrive", "--help") as started:
        said, _ = started.communicate(timeout=60)
    assert started.returncode == 0 and "dead queue" in said


class _Ill(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # pylint: disable=invalid-name
        """Answer like a worker that needs a restart."""
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b'{"problem": "the thread stands still"}')

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(name="ill")
def _ill() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Ill) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        yield server.server_port
        server.shutdown()


def test_a_worker_that_answers_503_is_unhealthy(ill: int) -> None:
    asked = _ask(HTTP_PORT=str(ill))
    assert asked.returncode == 1 and "stands still" in asked.stdout


def test_the_stand_in_backend_accepts_a_signed_webhook_and_refuses_a_forged_one(
    tmp_path: Path,
) -> None:
    (copied,) = re.findall("^COPY (sandbox/.*) sandbox/$", DOCKERFILE, flags=re.MULTILINE)
    (tmp_path / "sandbox").mkdir()
    for name in copied.split():  # the stage of the Dockerfile has only these files
        shutil.copy(ROOT / name, tmp_path / name)
    port = str(_free_port())
    with subprocess.Popen(
        [sys.executable, "-m", "sandbox.backend_server", "127.0.0.1", port],
        cwd=tmp_path,
        env={"PATH": PATH, "WEBHOOK_SIGNING_SECRET": SIGNING_SECRET, "INTERNAL_API_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout and "listens" in server.stdout.readline()
            forged = _tell(f"http://127.0.0.1:{port}", "whsec_" + "a" * 40)
            assert forged is not EndingOutcome.DELIVERED
            told = _tell(f"http://127.0.0.1:{port}", SIGNING_SECRET)
            assert told is EndingOutcome.DELIVERED
            assert "POST /api/webhooks/training/failed 200" in server.stdout.readline()
        finally:
            server.terminate()


def _tell(url: str, secret: str) -> EndingOutcome:
    webhooks = WebhookService(
        backend_url=url, allowed_origins=(), token=TOKEN, signing_secrets=(secret,)
    )
    body = {"style_id": 7, "error_message": "it broke", "error_code": "GPU_OOM"}
    ending = EndingWebhook("failed", "msg_1", body)
    return webhooks.deliver(url, ending, for_seconds=0, stop=threading.Event()).outcome


def test_a_base_model_is_copied_into_a_folder_completely(base_model: Path, tmp_path: Path) -> None:
    fetch(str(base_model), None, tmp_path / "model")
    names = {path.relative_to(base_model) for path in base_model.rglob("*") if path.is_file()}
    assert names and all((tmp_path / "model" / name).is_file() for name in names)
