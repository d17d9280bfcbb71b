"""An API in this process, on real servers; and a stand-in for a worker that signs its webhooks."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from standardwebhooks import Webhook

import config
from api.app import create
from api.gate.administration import create_key
from api.serve import ApiServer
from api.services import Services
from local.rabbitmq_node import RabbitMqNode
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from utils.settings.values import derived_signing_secret

TOKEN = "an-internal-token-of-more-than-32-characters"
ORG = "org_one"


@dataclasses.dataclass(frozen=True, slots=True)
class Ground:
    """The servers that an API stands on.

    Attributes:
        database_url: A new database.
        s3: The S3 server.
        rabbitmq: The broker; None for an API whose broker is away.
        folder: A new folder.
    """

    database_url: str
    s3: S3Server
    rabbitmq: RabbitMqNode | None
    folder: Path


@dataclasses.dataclass
class World:
    """A running API.

    Attributes:
        app: The application.
        services: Its services.
        url: Its address.
        key: An admin key of the organisation `ORG`.
        settings: Its settings.
        server: Serves the application.
    """

    app: FastAPI
    services: Services
    url: str
    key: str
    settings: config.Settings
    server: ApiServer

    def stop(self) -> None:
        """Let the server end, as a signal does."""
        self.server.should_exit = True

    def client(
        self, key: str | None = None, headers_more: dict[str, str] | None = None
    ) -> httpx.Client:
        """A client with a key."""
        headers = {"Authorization": f"Bearer {key or self.key}"} | (headers_more or {})
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        """The answer to one request."""
        with self.client(key) as client:
            return client.get(path)

    # pylint: disable-next=keyword-arg-before-vararg  # most keys are of one organisation
    def new_key(self, org: str = ORG, *scopes: str) -> str:
        """A key of an organisation."""
        return create_key(self.services, org, "test", list(scopes) or ["admin"], None)

    def worker(self) -> FakeWorker:
        """A stand-in for a worker."""
        return FakeWorker(self.url)

    def upload(self, count: int = 1, key: str | None = None) -> list[str]:
        """Ids of new files."""
        with self.client(key) as client:
            parts = [
                ("file", (f"image-{index}.png", secrets.token_bytes(16), "image/png"))
                for index in range(count)
            ]
            answer = client.post("/v1/files", files=parts, data={"purpose": "fine-tune"})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        return [body["id"]] if count == 1 else [each["id"] for each in body["data"]]

    def order(self, key: str | None = None, **fields: Any) -> dict[str, Any]:
        """A new job of a style."""
        files = fields.pop("training_files", None) or self.upload(key=key)
        body = {"model": "sd15", "kind": "style", "training_files": files} | fields
        with self.client(key) as client:
            answer = client.post("/v1/fine_tuning/jobs", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def job(self, job_id: str, key: str | None = None) -> dict[str, Any]:
        """A job as a client sees it."""
        with self.client(key) as client:
            answer = client.get(f"/v1/fine_tuning/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


class FakeWorker:
    """Sends signed webhooks.

    Args:
        url: The API's address.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._webhook = Webhook(derived_signing_secret(TOKEN))

    def send(
        self,
        kind: str,
        body: dict[str, Any],
        *,
        webhook_id: str = "",
        token: str = TOKEN,
        at: datetime.datetime | None = None,
        change: Callable[[bytes], bytes] = lambda raw: raw,
        headers_more: dict[str, str] | None = None,
    ) -> httpx.Response:
        """Send news, and return the answer."""
        webhook_id = webhook_id or f"msg_{secrets.token_hex(8)}"
        at = at or datetime.datetime.now(datetime.UTC)
        raw = json.dumps(body).encode()
        headers = {
            "Authorization": f"Bearer {token}",
            "X-Request-Source": "training-server",
            "Content-Type": "application/json",
            "webhook-id": webhook_id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": self._webhook.sign(webhook_id, at, raw.decode()),
        } | (headers_more or {})
        method = "PATCH" if kind == "progress" else "POST"
        url = f"{self._url}/api/webhooks/training/{kind}"
        return httpx.request(method, url, content=change(raw), headers=headers, timeout=30)

    def progress(self, job: dict[str, Any], sequence: int, **progress: Any) -> dict[str, Any]:
        """Send progress of a style's job."""
        values = {
            "current_epoch": 1,
            "total_epochs": 10,
            "progress_percent": 10,
            "estimated_seconds": 90,
            "stage": "training",
        } | progress
        body = {
            "style_id": int(job["subject"]),
            "task_id": job["id"],
            "sequence": sequence,
            "progress": values,
        }
        answer = self.send("progress", body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def complete(self, job: dict[str, Any], sequence: int, **more: Any) -> httpx.Response:
        """Send the ending of a style's job that has completed."""
        url = f"s3://models/models/style_{job['subject']}/lora_weights.safetensors"
        body = {
            "style_id": int(job["subject"]),
            "model_url": url,
            "model_path": url,
            "metadata": {"training_epochs": 10, "lora_rank": 16, "lora_alpha": 32},
            "training_metric": {"loss": 0.1, "epochs": 10},
            "task_id": job["id"],
            "sequence": sequence,
        }
        return self.send("complete", body, **more)

    def failed(
        self, job: dict[str, Any], sequence: int, code: str = "GPU_OOM", **more: Any
    ) -> httpx.Response:
        """Send the ending of a style's job that has failed."""
        body = {
            "style_id": int(job["subject"]),
            "error_message": "the GPU ran out of memory",
            "error_code": code,
            "task_id": job["id"],
            "sequence": sequence,
            "attempts": 1,
            "retryable": True,
        }
        return self.send("failed", body, **more)


def settings_on(ground: Ground, port: int, **values: Any) -> config.Settings:
    """The settings of an API on its ground, with new buckets."""
    names = {}
    for setting in ("aws_storage_bucket_name", "model_bucket_name", "state_bucket_name"):
        names[setting] = f"api-{secrets.token_hex(6)}"
    given: dict[str, Any] = names | {
        "_env_file": None,
        "aws_endpoint_url_s3": ground.s3.endpoint,
        "aws_access_key_id": ACCESS_KEY_ID,
        "aws_secret_access_key": SECRET_ACCESS_KEY,
        "aws_s3_region_name": REGION,
        "rabbitmq_host": "127.0.0.1",
        "rabbitmq_port": ground.rabbitmq.port if ground.rabbitmq else 1,
        "training_queue": f"training-{secrets.token_hex(4)}",
        "internal_api_token": TOKEN,
        "api_database_url": ground.database_url,
        "api_port": port,
        "log_level": "WARNING",
    }
    settings = config.load_api(**(given | values))
    storage = settings.storage
    buckets = (
        storage.aws_storage_bucket_name,
        storage.model_bucket_name,
        storage.state_bucket_name,
    )
    existing = {each["Name"] for each in ground.s3.client().list_buckets()["Buckets"]}
    for name in dict.fromkeys(buckets):
        if name not in existing:
            ground.s3.create_bucket(name)
    return settings


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(ground: Ground, **values: Any) -> Iterator[World]:
    """An API that serves while the block runs.

    Args:
        values: Settings, in lower case.
    """
    port = int(values.pop("api_port", 0)) or free_port()
    settings = settings_on(ground, port, **values)
    with serving(settings) as world:
        yield world


@contextlib.contextmanager
def serving(settings: config.Settings) -> Iterator[World]:
    """An API with these settings that serves while the block runs."""
    app = create(settings)
    server = ApiServer(app, "127.0.0.1", settings.api.api_port, grace_seconds=1)
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        assert server.started, "the API did not start"
        services: Services = app.state.services
        key = create_key(services, ORG, "test", ["admin"], None)
        url = f"http://127.0.0.1:{settings.api.api_port}"
        yield World(app, services, url, key, settings, server)
    finally:
        server.should_exit = True
        thread.join(20)


def until(condition: Callable[[], Any], seconds: float = 20.0, every: float = 0.02) -> Any:
    """Wait until a condition holds, and return its value.

    Raises:
        AssertionError: It did not hold in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(every)
    raise AssertionError("the condition did not become true in time")
