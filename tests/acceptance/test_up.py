"""`main.py up` on this machine: a job survives SIGKILL to all of it, and Ctrl-C ends it cleanly."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from config import setting_names
from local.processes import free_ports
from sandbox.photographs import photographs
from sandbox.worker_process import ROOT
from tests.acceptance.world import until

EPOCHS = 60
README = re.findall(
    r"^(?:API=|curl ).*(?:\n    .*)*",
    (ROOT / "README.md").read_text(encoding="utf-8").partition("## Run it on one machine")[2],
    re.MULTILINE,
)
"""The commands that README orders a style with: the address, upload, order, status, download."""


class Up:
    """One `main.py up`."""

    def __init__(self, folder: Path, port: int) -> None:
        self.log = folder / f"up-{secrets.token_hex(3)}.log"
        self.url = f"http://127.0.0.1:{port}"
        environment = {n: v for n, v in os.environ.items() if n.upper() not in setting_names()}
        environment |= {
            "API_PORT": str(port),
            "LEASE_TTL_SECONDS": "5",
            "PROGRESS_INTERVAL_SECONDS": "0.5",
            "STYLE_CHECKPOINT_INTERVAL": "2",
            "STYLE_EPOCHS": str(EPOCHS),
        }
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(  # pylint: disable=consider-using-with
                [sys.executable, str(ROOT / "main.py"), "up", "--stand-in", "--data", "data"],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def key(self) -> str:
        """The key, once everything runs."""

        def shown() -> Any:
            assert self.process.poll() is None, self.said
            return re.findall(r"Ctrl-C stops", self.said) and re.findall(r"Key: +(\S+)", self.said)

        return str(until(shown, 240)[-1])

    def processes(self) -> list[psutil.Process]:
        """All processes of this `up`, itself included."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def job(self, job: str, part: str = "") -> dict[str, Any]:
        """A job, or a part of it."""
        path = f"$API/v1/fine_tuning/jobs/{job}{part}"
        return self.run(f'curl -sS "{path}" -H "Authorization: Bearer $KEY"')

    def order(self, folder: Path) -> str:
        """Order a style with the commands of README; the job's id."""
        for name, each in zip(("one", "two", "three"), photographs(), strict=False):
            (folder / f"{name}.jpg").write_bytes(each.content)
        _, upload, order, _, _ = README
        for file in self.run(upload)["data"]:
            order = order.replace("file-…", file["id"], 1)
        return str(self.run(order)["id"])

    def run(self, command: str) -> dict[str, Any]:
        """Run a command with the address and the key; its output is JSON."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.log.parent,
            env=os.environ | {"API": self.url, "KEY": self.key()},
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(json.loads(done.stdout or "{}"))


@contextlib.contextmanager
def _up(folder: Path, port: int) -> Iterator[Up]:
    up = Up(folder, port)
    try:
        yield up
    finally:
        _kill_all(up)


def _kill_all(up: Up) -> None:
    """SIGKILL to all of it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in up.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    up.process.wait()


@pytest.mark.timeout(900)
def test_a_job_survives_sigkill_to_all_of_it_and_a_second_up_is_refused(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with _up(tmp_path, port) as first:
        key = first.key()
        job = first.order(tmp_path)
        until(lambda: first.job(job, "/checkpoints")["data"], 240)
        second = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), "up", "--stand-in", "--data", "data"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 2 and "It runs already: http://127.0.0.1" in second.stderr
        _kill_all(first)
    with _up(tmp_path, port) as again:
        assert again.key() == key
        assert again.job(job)["status"] != "succeeded"
        until(lambda: again.job(job)["status"] == "succeeded", 400)
        _assert_downloaded(again, job)
        running = again.processes()
        again.process.send_signal(signal.SIGINT)
        assert again.process.wait(150) == 130
        assert "Stopped." in again.said
        assert not psutil.wait_procs(running, timeout=10)[1]


def _assert_downloaded(up: Up, job: str) -> None:
    """The last commands of README show the job and download its model."""
    address, _, _, status, download = README
    assert address == "API=http://127.0.0.1:8000 KEY=sk-…"
    shown = up.run(status.replace("JOB", job))
    up.run(download.replace("MODEL", shown["fine_tuned_model"]))
    weights = (up.log.parent / "lora_weights.safetensors").read_bytes()
    header = weights[8 : 8 + int.from_bytes(weights[:8], "little")]
    assert "__metadata__" in json.loads(header), weights[:400]


def test_without_a_base_model_that_can_train_it_refuses_and_names_the_way_to_one(
    tmp_path: Path,
) -> None:
    environment = {n: v for n, v in os.environ.items() if n.upper() not in setting_names()}
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "up", "--data", "data"],
        cwd=tmp_path,
        env=environment | {"BASE_MODEL": "./missing"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert str(tmp_path / "missing") in done.stderr and "Set BASE_MODEL" in done.stderr
    assert "main.py up --stand-in" in done.stderr
    assert not (tmp_path / "data" / "rabbitmq").exists()


def test_the_endpoint_of_the_api_needs_the_key(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with _up(tmp_path, port) as one:
        one.key()
        models = f"{one.url}/v1/models"
        with pytest.raises(urllib.error.HTTPError, match="401"), urllib.request.urlopen(models):
            pass
        mode = (tmp_path / "data" / "secrets.json").stat().st_mode
        assert mode & 0o077 == 0
