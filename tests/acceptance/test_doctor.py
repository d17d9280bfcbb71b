"""`python main.py doctor`: success, or each problem with its remedy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import config
from cli.doctor.command import CHECKS, examine, is_healthy
from cli.doctor.findings import Finding, Verdict
from config import Settings
from sandbox.backend import SIGNING_SECRET, TOKEN, Backend
from sandbox.s3_server import SECRET_ACCESS_KEY
from sandbox.worker_process import ROOT
from tests.acceptance.world import World
from tests.integration.services.s3_proxy import Fault, S3Proxy, always


@pytest.fixture(name="sound")
def _sound(apart: World) -> Iterator[World]:
    """A world in which nothing is broken; a test may break the backend."""
    with Backend() as backend:
        apart.backend = backend
        yield apart


def _doctor(
    *arguments: str, environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "doctor", *arguments],
        env=kept | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def _failures(world: World, concerned: str, **changed: str) -> list[Finding]:
    """The problems that one check finds, in this process."""
    values: dict[str, Any] = {
        name.lower(): value for name, value in world.settings(**changed).items()
    }
    settings: Settings = config.load(_env_file=None, **values)
    findings = examine(settings, tuple(check for check in CHECKS if check[0] == concerned))
    failures = [each for each in findings if each.verdict is Verdict.FAIL]
    assert is_healthy(findings) is not bool(failures)
    return failures


def test_without_a_problem_the_doctor_reports_success_and_leaves_nothing_behind(
    sound: World, tmp_path: Path
) -> None:
    sound.publish(b"a job that waits")
    before = sound.keys(sound.media)
    done = _doctor("--all", environment=sound.settings() | {"COLUMNS": "160"}, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("0 failed: a worker can be started.")
    for said in ("RabbitMQ 3.", "classic; 1 waiting message", "rabbitmqctl"):
        assert said in done.stdout
    for checked in ("settings", "broker", "bucket", "clock", "backend", "GPU", "RAM", "disk"):
        assert f"  {checked}" in done.stdout
    assert done.stderr == ""
    assert sound.keys(sound.media) == before
    assert sound.keys(sound.state) == []
    taken = sound.take(sound.queue)
    assert taken and taken[1] == b"a job that waits"
    assert sound.take(f"{sound.queue}.dead") is None


def test_the_report_begins_with_findings_and_fits_a_terminal_of_80_columns(
    sound: World, tmp_path: Path
) -> None:
    done = _doctor(environment=sound.settings() | {"COLUMNS": "80"}, folder=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok") and "s3:PutObject" not in done.stdout
    assert max(map(len, lines)) <= 80
    well = [line for line in lines if line.startswith("ok ")]
    assert len(lines) < len(well) + 25, done.stdout


def test_the_policy_is_printed_without_anything_else(sound: World, tmp_path: Path) -> None:
    environment = sound.settings(RABBITMQ_PORT="1")  # nothing is tested
    done = _doctor("--policy", environment=environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    policy = json.loads(done.stdout)
    assert policy["Version"] == "2012-10-17" and "s3:PutObject" in done.stdout


def test_all_problems_are_reported_together_with_their_remedies_and_without_a_secret(
    sound: World, tmp_path: Path
) -> None:
    wrong = {
        "RABBITMQ_PASS": "wrong-password",
        "STATE_BUCKET_NAME": "no-such-bucket",
        "INTERNAL_API_TOKEN": "another-token-of-more-than-32-characters",
        # A secret in an unusual place: settings are shown.
        "BASE_MODEL": str(tmp_path / "another-token-of-more-than-32-characters"),
        "ALLOW_CPU": "false",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    done = _doctor("--json", environment=sound.settings(**wrong), folder=tmp_path)
    assert done.returncode == 1, done.stderr
    diagnosis = json.loads(done.stdout)
    assert diagnosis["healthy"] is False
    assert diagnosis["iam_policy"]["Version"] == "2012-10-17"
    remedies = {
        each["check"]: each["remedy"] + each["command"]
        for each in diagnosis["findings"]
        if each["verdict"] == "fail"
    }
    for check, remedy in (
        ("broker 127.0.0.1", "RABBITMQ_PASS"),
        ("bucket no-such-bucket", "STATE_BUCKET_NAME"),
        (f"backend {sound.backend.url}", "INTERNAL_API_TOKEN"),
        ("base model", "BASE_MODEL"),
        ("GPU", "ALLOW_CPU"),
    ):
        assert remedy in remedies.pop(check)
    assert not remedies
    secrets = (wrong["RABBITMQ_PASS"], wrong["INTERNAL_API_TOKEN"], TOKEN, SIGNING_SECRET)
    for secret in (*secrets, SECRET_ACCESS_KEY):
        assert secret not in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_all_wrong_settings_are_named_before_anything_is_tested(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    wrong = {"INTERNAL_API_TOKEN": "short-but-secret", "EPOCHS": "many"}
    done = _doctor(*arguments, environment=wrong, folder=tmp_path)
    assert done.returncode == 2
    for name in ("INTERNAL_API_TOKEN", "EPOCHS", "AWS_STORAGE_BUCKET_NAME", "BACKEND_API_URL"):
        assert name in done.stdout
    assert "short-but-secret" not in done.stdout + done.stderr
    if arguments:
        assert json.loads(done.stdout)["healthy"] is False


@pytest.mark.parametrize(
    ("concerned", "changed", "remedy"),
    [
        ("broker", {"RABBITMQ_PORT": "1"}, "RABBITMQ_PORT"),
        ("broker", {"RABBITMQ_PASS": "wrong-password"}, "RABBITMQ_PASS"),
        ("storage", {"STATE_BUCKET_NAME": "no-such-bucket"}, "create the bucket"),
        ("storage", {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}, "AWS_ENDPOINT_URL_S3"),
        ("backend", {"BACKEND_API_URL": "http://127.0.0.1:1"}, "BACKEND_API_URL"),
        ("backend", {"INTERNAL_API_TOKEN": "w" * 40}, "INTERNAL_API_TOKEN"),
        ("backend", {"WEBHOOK_SIGNING_SECRET": "whsec_" + "YQ" * 20}, "WEBHOOK_SIGNING_SECRET"),
        ("base model", {"BASE_MODEL": "/no/such/folder"}, "BASE_MODEL"),
        ("disk", {"WORK_DIR": "/proc/nowhere"}, "WORK_DIR"),
    ],
)
def test_each_problem_fails_with_its_remedy(
    sound: World, concerned: str, changed: dict[str, str], remedy: str
) -> None:
    assert not _failures(sound, concerned)
    failures = _failures(sound, concerned, **changed)
    assert failures
    assert all(remedy in each.remedy for each in failures)


def test_a_missing_work_folder_is_not_made(sound: World, tmp_path: Path) -> None:
    """It would belong to the user who runs the doctor."""
    assert not _failures(sound, "disk", WORK_DIR=str(tmp_path / "new" / "work"))
    assert not list(tmp_path.iterdir())


def test_a_queue_declared_differently_fails(sound: World) -> None:
    with sound.channel() as channel:
        channel.queue_delete(sound.queue)
        channel.queue_declare(sound.queue, durable=False)
    (failure,) = _failures(sound, "broker")
    assert "not durable" in failure.detail and "Delete it while it is empty" in failure.remedy


def test_a_store_that_ignores_conditions_fails(sound: World) -> None:
    with S3Proxy(sound.s3_server.endpoint) as proxy:
        proxy.fault = always(Fault(careless=True))
        failures = _failures(sound, "storage", AWS_ENDPOINT_URL_S3=proxy.endpoint)
    (failure,) = failures
    assert failure.check == f"conditional writes in {sound.state}"
    assert "exactly one worker" in failure.remedy and "STATE_BUCKET_NAME" in failure.remedy


def test_a_damaged_base_model_fails(sound: World, tmp_path: Path) -> None:
    model = Path(shutil.copytree(sound.base_model, tmp_path / "model"))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    (failure,) = _failures(sound, "base model", BASE_MODEL=str(model))
    assert "is truncated" in failure.detail and "Download the model again" in failure.remedy
