"""The platform around a worker: broker, storage, backend, a base model, an artist's photographs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pika
from mypy_boto3_s3 import S3Client
from pika.exceptions import ChannelClosedByBroker

from local.rabbitmq_node import RabbitMqNode
from sandbox.backend import SIGNING_SECRET, TOKEN, Backend
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from sandbox.worker_process import ROOT, WorkerProcess

SOON = 120.0


@dataclasses.dataclass
class World:
    """Everything that a worker talks to; each test has a queue and buckets of its own."""

    broker: RabbitMqNode
    s3_server: S3Server
    backend: Backend
    base_model: Path
    folder: Path
    photographs: tuple[str, ...] = ()
    queue: str = dataclasses.field(default_factory=lambda: f"training-{secrets.token_hex(4)}")
    media: str = dataclasses.field(default_factory=lambda: f"media-{secrets.token_hex(4)}")
    state: str = dataclasses.field(default_factory=lambda: f"state-{secrets.token_hex(4)}")

    def __post_init__(self) -> None:
        for bucket in (self.media, self.state):
            self.s3_server.create_bucket(bucket)
        # As the backend declares it.
        with self.channel() as channel:
            channel.queue_declare(self.queue, durable=True)

    def apart(self) -> World:
        """The same servers, and a queue and buckets of its own."""
        other = World(self.broker, self.s3_server, self.backend, self.base_model, self.folder)
        for address in self.photographs:
            content = self.read(self.media, address.split("/", 3)[3])
            other.photographs += (other.upload(address.rsplit("/", 1)[1], content),)
        return other

    @property
    def s3(self) -> S3Client:
        """Somebody else at the storage."""
        return self.s3_server.client()

    def settings(self, **changed: str) -> dict[str, str]:
        """A worker's whole environment."""
        return {
            "RABBITMQ_HOST": self.broker.host,
            "RABBITMQ_PORT": str(self.broker.port),
            "RABBITMQ_HEARTBEAT_SECONDS": "2",
            "TRAINING_QUEUE": self.queue,
            "AWS_ENDPOINT_URL_S3": self.s3_server.endpoint,
            "AWS_S3_REGION_NAME": REGION,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
            "AWS_STORAGE_BUCKET_NAME": self.media,
            "STATE_BUCKET_NAME": self.state,
            "BACKEND_API_URL": self.backend.url,
            "INTERNAL_API_TOKEN": TOKEN,
            "WEBHOOK_SIGNING_SECRET": SIGNING_SECRET,
            # Threads that wait for each other are slow on a busy machine, and the model is tiny.
            "OMP_NUM_THREADS": "1",
            "BASE_MODEL": str(self.base_model),
            "ALLOW_CPU": "true",
            "HTTP_PORT": "0",
            "RESOLUTION": "64",
            "LORA_RANK": "4",
            "LORA_ALPHA": "8",
            "PROGRESS_INTERVAL_SECONDS": "0.2",
            "CHECKPOINT_INTERVAL": "2",
            "LEASE_TTL_SECONDS": "5",
            "RETRY_DELAYS_SECONDS": "0.5,1,2",
            "ENDING_RETRY_DELAYS_SECONDS": "1",
            "WORK_DIR": str(self.folder / "work"),
        } | changed

    def worker(self, **changed: str) -> WorkerProcess:
        """A worker of this world, started by entering it."""
        return self.worker_of(ROOT, **changed)

    def worker_of(self, code: Path, launcher: Sequence[str] = (), **changed: str) -> WorkerProcess:
        """A worker of another release, whose program is in this folder."""
        log = self.folder / f"worker-{secrets.token_hex(3)}.log"
        return WorkerProcess(
            self.settings(**changed), folder=self.folder, log=log, code=code, launcher=launcher
        )

    def upload(self, name: str, content: bytes) -> str:
        """Put an object into the media bucket; its address."""
        key = f"training/{name}"
        self.s3.put_object(Bucket=self.media, Key=key, Body=content)
        return f"s3://{self.media}/{key}"

    def envelope(self, style_id: int = 123, **changed: Any) -> dict[str, Any]:
        """A message as the backend writes it."""
        parameters = {"epochs": 2} | changed.pop("parameters", {})
        data = {
            "style_id": style_id,
            "images": list(self.photographs[:3]),
            "captions": ["a red square", None, "a harbour"],
            "parameters": parameters,
        }
        return {
            "task_id": f"task-{secrets.token_hex(6)}",
            "type": "model_training",
            "data": data | changed,
            "webhook_url": f"{self.backend.url}/api/webhooks/training/{style_id}/status",
            "created_at": "2026-01-20T10:00:00.000Z",
        }

    def publish(self, message: dict[str, Any] | bytes, **properties: Any) -> None:
        """Publish as the backend does."""
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        with self.channel() as channel:
            channel.basic_publish(
                "",
                self.queue,
                body,
                pika.BasicProperties(
                    content_type="application/json", delivery_mode=2, **properties
                ),
                mandatory=True,
            )

    @contextlib.contextmanager
    def channel(self) -> Iterator[Any]:
        """A channel of the backend's own, with confirms."""
        with pika.BlockingConnection(pika.URLParameters(self.broker.url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            yield channel

    def take(self, queue: str) -> tuple[Any, bytes] | None:
        """Take one message off a queue: properties and body; None also where it is not there."""
        with contextlib.suppress(ChannelClosedByBroker), self.channel() as channel:
            _, properties, body = channel.basic_get(queue, auto_ack=True)
            return None if properties is None else (properties, body)
        return None

    def waiting(self, queue: str) -> int:
        """Messages in the queue, those in somebody's hands too."""
        listed = self.broker.ctl("list_queues", "--no-table-headers", "name", "messages")
        return int(dict(line.split("\t") for line in listed.splitlines())[queue])

    def ending(self, task_id: str, timeout: float = SOON) -> tuple[str, dict[str, Any]]:
        """Kind and body of the ending that the backend took."""
        request = self.backend.wait_for_ending(task_id, timeout)
        return request.path.rsplit("/", 1)[1], request.body

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Keys under a prefix."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def read(self, bucket: str, key: str) -> bytes:
        """One object."""
        return self.s3.get_object(Bucket=bucket, Key=key)["Body"].read()

    def download_model(self, style_id: int) -> Path:
        """The style's folder, as the inference server fetches it."""
        target = self.folder / f"style-{style_id}-{secrets.token_hex(3)}"
        target.mkdir()
        prefix = f"models/style_{style_id}/"
        for key in self.keys(self.media, prefix):
            (target / key.removeprefix(prefix)).write_bytes(self.read(self.media, key))
        return target

    def record(self, task_id: str) -> dict[str, Any]:
        """The job record."""
        record: dict[str, Any] = json.loads(self.read(self.state, f"jobs/{task_id}.json"))
        return record


def log_lines(worker: WorkerProcess, event: str | None = None) -> list[dict[str, Any]]:
    """The worker's log lines, all or those of one event."""
    lines = []
    for line in worker.log.read_text(encoding="utf-8").splitlines():
        if line.startswith("{"):
            values = json.loads(line)
            if event in (None, values["event"]):
                lines.append(values)
    return lines


def until(condition: Callable[[], Any], seconds: float = SOON) -> Any:
    """The condition's first true value.

    Raises:
        AssertionError: There was none in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"did not happen within {seconds} s")
