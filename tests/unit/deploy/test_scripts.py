"""scripts/build, scripts/run and scripts/health-check, with a stand-in for the command `docker`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FAKE = '#!/bin/sh\necho "$@" >>"$CALLS"\n'


@pytest.fixture(name="copy")
def _copy(tmp_path: Path) -> Path:
    """A checkout with the scripts and the files that they need."""
    (tmp_path / "scripts").mkdir()
    for name in ("build", "run", "health-check"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    for name in (
        "Dockerfile",
        "requirements.lock",
        "requirements-front.lock",
        "requirements-api.lock",
        "requirements-llm.lock",
        "requirements-cuda.lock",
    ):
        (tmp_path / name).touch()
    (tmp_path / "requirements-build.lock").touch()
    (tmp_path / ".env").touch()
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "basename", "sed", "mkdir", "id", "chown"):
        program = shutil.which(name)
        assert program
        (tmp_path / "bin" / name).symlink_to(program)
    python = tmp_path / "bin" / "python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return tmp_path


def _fake_docker(copy: Path, text: str = FAKE) -> None:
    docker = copy / "bin" / "docker"
    docker.write_text(text, encoding="utf-8")
    docker.chmod(0o755)


def _run(copy: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [copy / "scripts" / name, *arguments],
        env={"PATH": str(copy / "bin"), "CALLS": str(copy / "calls"), "HOME": os.environ["HOME"]},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def _calls(copy: Path) -> list[str]:
    return (copy / "calls").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ["build", "run", "health-check"])
def test_help_describes_the_options_and_does_nothing(copy: Path, name: str) -> None:
    _fake_docker(copy)
    done = _run(copy, name, "--help")
    assert done.returncode == 0 and f"scripts/{name} [" in done.stdout
    assert "set -euo" not in done.stdout and not (copy / "calls").exists()


def test_build_names_a_missing_docker(copy: Path) -> None:
    done = _run(copy, "build")
    assert done.returncode == 1 and "docker is not installed" in done.stderr


def test_build_names_a_daemon_that_does_not_answer(copy: Path) -> None:
    _fake_docker(copy, '#!/bin/sh\n[ "$1" != info ]\n')
    done = _run(copy, "build")
    assert done.returncode == 1 and "daemon does not answer" in done.stderr


def test_build_names_a_missing_file(copy: Path) -> None:
    _fake_docker(copy)
    (copy / "requirements-cuda.lock").unlink()
    done = _run(copy, "build")
    assert done.returncode == 1 and "requirements-cuda.lock is missing" in done.stderr


def test_build_reports_success_and_failure(copy: Path) -> None:
    _fake_docker(copy)
    done = _run(copy, "build", "mine:1", "--target", "worker-with-model")
    assert done.returncode == 0 and "built mine:1" in done.stdout
    assert _calls(copy)[-1] == "build --tag mine:1 --target worker-with-model ."
    _fake_docker(copy, '#!/bin/sh\n[ "$1" != build ]\n')
    failed = _run(copy, "build")
    assert failed.returncode == 1 and "failed" in failed.stderr


def test_run_without_an_env_file_names_the_remedy(copy: Path) -> None:
    _fake_docker(copy)
    (copy / ".env").unlink()
    done = _run(copy, "run")
    assert done.returncode == 2 and "Copy .env.example" in done.stderr


def test_run_in_the_foreground_removes_the_container_and_limits_it(copy: Path) -> None:
    _fake_docker(copy)
    assert _run(copy, "run", "mine:1", "doctor").returncode == 0
    (call,) = _calls(copy)
    assert call.startswith("run --rm ") and call.endswith(" mine:1 doctor")
    assert "--read-only" in call and "--shm-size 8g" in call and "--memory 16g" in call


def test_run_in_the_background_names_the_container_and_the_next_commands(copy: Path) -> None:
    _fake_docker(copy)
    done = _run(copy, "run", "--background")
    (call,) = _calls(copy)
    assert "--detach --restart unless-stopped --name training-server" in call
    assert "docker logs" in done.stdout and "docker stop" in done.stdout


def test_run_creates_the_data_folders(copy: Path) -> None:
    _fake_docker(copy)
    assert _run(copy, "run", "--data", str(copy / "data")).returncode == 0
    assert (copy / "data" / "models").is_dir() and (copy / "data" / "work").is_dir()
    assert f"--volume {copy}/data/models:/models" in _calls(copy)[0]


def test_run_mounts_a_settings_file_and_passes_it_to_the_worker(copy: Path) -> None:
    _fake_docker(copy)
    (copy / "mine.json").write_text('{"epochs": 200}', encoding="utf-8")
    assert _run(copy, "run", "--config", "mine.json").returncode == 0
    (call,) = _calls(copy)
    assert f"--volume {copy}/mine.json:/config/mine.json:ro" in call
    assert call.endswith("training-server:local worker --config /config/mine.json")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("missing.json", None, "does not exist"),
        ("broken.json", "{", "not valid JSON"),
        ("settings.yaml", "", "must end in .toml or .json"),
    ],
)
def test_run_refuses_a_settings_file_that_cannot_be_read(
    copy: Path, name: str, text: str | None, problem: str
) -> None:
    _fake_docker(copy)
    if text is not None:
        (copy / name).write_text(text, encoding="utf-8")
    done = _run(copy, "run", "--config", name)
    assert done.returncode == 2 and problem in done.stderr


def test_an_unknown_option_is_refused(copy: Path) -> None:
    for name in ("build", "run", "health-check"):
        done = _run(copy, name, "--backround")
        assert done.returncode in (1, 2) and "--help" in done.stderr
