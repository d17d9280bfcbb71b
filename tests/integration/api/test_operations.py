"""The API as it is deployed: from the files of its image, on PostgreSQL, and under gunicorn."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sandbox.postgres_node import PostgresNode
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from tests.integration.api.world import TOKEN, Ground, free_port, until

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(name="image")
def _image(tmp_path: Path) -> Path:
    """The files of the image's /app, and a Python that finds only the packages of the image."""
    app = tmp_path / "app"
    app.mkdir()
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line.startswith("!"):
            source, target = ROOT / line[1:], app / line[1:]
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
    stage = DOCKERFILE.partition(" AS api\n")[2].partition("\nFROM ")[0]
    removed = re.findall(r"^RUN rm -r ([\w ]+) &&", stage, flags=re.MULTILINE)
    for room in removed[0].split():
        shutil.rmtree(app / room)
    lock = (ROOT / "requirements-api.lock").read_text(encoding="utf-8")
    locked = {_normal(name) for name in re.findall(r"^([\w.-]+)(?:\[.*\])?==", lock, re.MULTILINE)}
    other = sorted(
        name
        for name, packages in importlib.metadata.packages_distributions().items()
        if not locked & {_normal(each) for each in packages}
    )
    assert "torch" in other and "fastapi" not in other
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(
        f"""
import sys
from importlib.machinery import PathFinder

class OfTheImage(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {other!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = OfTheImage
""",
        encoding="utf-8",
    )
    return app


@pytest.fixture(name="environment")
def _environment(ground: Ground, postgres: PostgresNode) -> dict[str, str]:
    """The settings of a server, with new buckets and a new database."""
    s3: S3Server = ground.s3
    names = [f"{name}-{os.urandom(4).hex()}" for name in ("media", "models", "state")]
    for name in names:
        s3.create_bucket(name)
    assert ground.rabbitmq
    return {
        "PATH": os.environ["PATH"],
        "PYTHONDONTWRITEBYTECODE": "1",
        "API_DATABASE_URL": postgres.create_database(f"api_{os.urandom(4).hex()}"),
        "API_PORT": str(free_port()),
        "API_KEY_PEPPER": "p" * 32,
        "INTERNAL_API_TOKEN": TOKEN,
        "RABBITMQ_HOST": "127.0.0.1",
        "RABBITMQ_PORT": str(ground.rabbitmq.port),
        "TRAINING_QUEUE": f"training-{os.urandom(4).hex()}",
        "AWS_ENDPOINT_URL_S3": s3.endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
        "AWS_S3_REGION_NAME": REGION,
        "AWS_STORAGE_BUCKET_NAME": names[0],
        "MODEL_BUCKET_NAME": names[1],
        "STATE_BUCKET_NAME": names[2],
    }


@pytest.fixture(name="database_url")
def _database_url(tmp_path: Path) -> str:
    """A database that no server of this file uses."""
    return f"sqlite:///{tmp_path / 'api.db'}"


@contextlib.contextmanager
def _started(
    command: list[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
            print(said)


def _answers(address: str, process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None, "the server has ended"
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(address, timeout=5).status_code == 200
    return False


def test_the_files_and_packages_of_the_image_migrate_serve_and_manage_keys(
    image: Path, environment: dict[str, str]
) -> None:
    environment["PYTHONPATH"] = str(image.parent / "python")
    python = [sys.executable, "main.py", "api"]
    together = [
        subprocess.Popen(  # pylint: disable=consider-using-with
            [*python, "migrate"], cwd=image, env=environment
        )
        for _ in range(2)
    ]
    assert [each.wait(60) for each in together] == [0, 0]
    made = subprocess.run(
        [*python, "keys", "create", "--org", "org_one", "--scope", "read"],
        cwd=image,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    address = f"http://127.0.0.1:{environment['API_PORT']}"
    with _started(python, image, environment) as process:
        until(lambda: _answers(f"{address}/ready", process), seconds=60)
        key = {"Authorization": f"Bearer {made.stdout.strip()}"}
        assert httpx.get(f"{address}/v1/jobs", headers=key).json()["data"] == []
        healthy = subprocess.run(
            [sys.executable, "deploy/health_check.py", address], cwd=image, check=False
        )
        assert healthy.returncode == 0
    assert process.returncode in (0, -signal.SIGTERM)


def test_a_part_of_the_readiness_is_asked_for(image: Path, environment: dict[str, str]) -> None:
    environment |= {"RABBITMQ_PORT": "1", "PYTHONPATH": str(image.parent / "python")}
    address = f"http://127.0.0.1:{environment['API_PORT']}"
    with _started([sys.executable, "main.py", "api"], image, environment) as process:
        until(lambda: _answers(f"{address}/health", process), seconds=60)
        assert httpx.get(f"{address}/ready").status_code == 503
        part = httpx.get(f"{address}/ready?check=database&check=storage")
        assert (part.status_code, set(part.json()["checks"])) == (200, {"database", "storage"})
        assert httpx.get(f"{address}/ready?check=weather").status_code == 400


def test_gunicorn_serves_with_two_processes(environment: dict[str, str]) -> None:
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    bind = f"127.0.0.1:{environment['API_PORT']}"
    command = [sys.executable, "-m", "gunicorn", "--workers", "2", "--bind", bind]
    command += ["-k", "uvicorn_worker.UvicornWorker", "api.app:create()"]
    with _started(command, ROOT, environment) as process:
        until(lambda: _answers(f"http://{bind}/ready", process), seconds=60)
    assert process.returncode in (0, -signal.SIGTERM)
