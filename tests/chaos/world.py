"""Everything around the workers: broker, storage, backend, and the proxies that break them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pika
from pika.exceptions import AMQPError, ChannelClosedByBroker

from jobs.message import derive_task_id
from local.rabbitmq_node import RabbitMqNode
from sandbox.backend import SIGNING_SECRET, TOKEN, Backend
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from services.broker.settlement import Queue
from services.broker.topology import declaration
from tests.chaos.destined_s3 import DestinedS3
from tests.chaos.hits import Hits
from tests.chaos.tcp_proxy import TcpProxy
from tests.chaos.timing import (
    ACK_TIMEOUT_MS,
    CHECKPOINT_INTERVAL,
    ENDING_DELAYS,
    GRACE_SECONDS,
    LLM,
    LLM_BASE,
    LONGEST_FREEZE_IN_LEASES,
    MAX_JOB_BYTES,
    MEDIA,
    QUEUE,
    QUEUES,
    RETRY_DELAYS,
    STATE,
    STYLE,
    WINDOW_SECONDS,
)
from tests.chaos.windows import BackendMood, FaultyS3
from tests.chaos.with_api.ground import ApiGround
from tests.chaos.with_api.recorder import Recorder

PUBLISH_SECONDS = 90.0
SECRETS = (TOKEN, SIGNING_SECRET, SIGNING_SECRET.removeprefix("whsec_"), SECRET_ACCESS_KEY)


Message = tuple[dict[str, Any], bytes]
"""Headers, the message id among them, and body."""
MESSAGE_ID = "message-id"


@dataclasses.dataclass
class Ways:
    """One worker's way to each service."""

    broker: TcpProxy
    s3: FaultyS3


_DAMAGED: dict[str, Any] = {
    "state": "damaged",
    "delivery": "none",
    "ending": None,
    "attempts": 0,
    "checkpoints": [],
    "hold": {"claim": 0, "revision": 0},
}
"""Stands for a record that cannot be read."""


class World:  # pylint: disable=too-many-public-methods  # one for each observation
    """Servers and proxies; made by `running`.

    Attributes:
        folder: The run's folder.
        ways: Each worker's own proxies.
        mood: The backend's answers.
        elsewhere: The host that progress is redirected to; it must never get a request.
        broker_turn: Lock for restarting the broker, or for work that needs it running.
        hits: Counts the hits of faults.
        destined: The S3 faults of jobs' destinies.
        sweep_allowed: Records that the sweep may publish; the others must need no sweep.
        queue_type: Type of the training queue.
        api: The API with its database; None in a run without one.
        kinds: The kinds of jobs.
    """

    api: ApiGround | None = None
    kinds: tuple[str, ...] = (STYLE,)

    def __init__(
        self,
        broker: RabbitMqNode,
        s3_server: S3Server,
        backend: Backend,
        elsewhere: Backend,
        *,
        queue_type: str,
        lease: float,
        hits: Hits,
        folder: Path,
    ) -> None:
        self.lease = lease
        self.sweep_allowed: set[str] = set()
        self.folder = folder
        self._sweep_file = folder / "sweep-allowed"
        self.hits = hits
        self.broker, self.s3_server = broker, s3_server
        self.backend, self.elsewhere = backend, elsewhere
        self.mood = BackendMood(hits)
        self.ways: list[Ways] = []
        self.backend_way: TcpProxy
        self.broker_turn = threading.Lock()
        self.s3 = s3_server.client()  # a client of the storage without faults
        self.destined = DestinedS3(self.s3, lease)
        self._records: dict[str, tuple[str, dict[str, Any]]] = {}  # by key, with the ETag
        self.queue_type = queue_type
        self._arguments = {"x-queue-type": "quorum"} if queue_type == "quorum" else {}

    @classmethod
    @contextlib.contextmanager
    def running(  # pylint: disable=too-many-locals  # one for each part
        cls,
        folder: Path,
        *,
        workers: int,
        queue_type: str,
        lease: float,
        hits: Hits,
        api: tuple[str, ...] | None = None,
        kinds: tuple[str, ...] = (STYLE,),
    ) -> Iterator[World]:
        """All servers, for as long as the block runs.

        Args:
            api: More arguments of the API's processes; None for a run without an API.
            kinds: The kinds of jobs.
        """
        recorder = None if api is None else Recorder()
        with (
            RabbitMqNode(folder / "broker", consumer_timeout_ms=ACK_TIMEOUT_MS) as broker,
            S3Server() as s3_server,
            recorder or Backend() as backend,
            Backend() as elsewhere,
            contextlib.ExitStack() as stack,
        ):
            world = cls(
                *(broker, s3_server, backend, elsewhere),
                queue_type=queue_type,
                lease=lease,
                hits=hits,
                folder=folder,
            )
            backend.answer = world.mood
            world.kinds = kinds
            port = int(backend.url.rsplit(":", 1)[1])
            world.backend_way = stack.enter_context(TcpProxy("127.0.0.1", port))
            for _ in range(workers + (api is not None)):  # the last way is that of the API
                world.ways.append(
                    Ways(
                        stack.enter_context(TcpProxy(broker.host, broker.port, amqp=True)),
                        stack.enter_context(
                            FaultyS3(s3_server.endpoint, hits, world.destined.fault)
                        ),
                    )
                )
            for bucket in (MEDIA, STATE):
                s3_server.create_bucket(bucket)
            world.declare()
            if api is not None and recorder is not None:
                backend.answer = recorder.through(world.mood)
                ground = ApiGround.running(recorder, folder, world.settings(workers), api)
                world.api = stack.enter_context(ground)
            yield world

    def never_claimed(self) -> set[str]:
        """Jobs that were cancelled over the API; those without a record were never claimed."""
        return self.api.never_claimed() if self.api else set()

    def with_the_api(self) -> set[str]:
        """Jobs whose messages the API has not given to the broker, or will not."""
        if self.api is None:
            return set()
        return {row.job_id for row in self.api.rows() if not row.admitted or row.status != "queued"}

    def settings(self, slot: int | None) -> dict[str, str]:
        """The whole environment of a worker; with None, that of an operator, whom no fault hits."""
        port, endpoint = self.broker.port, self.s3_server.endpoint
        if slot is not None:
            port, endpoint = self.ways[slot].broker.port, self.ways[slot].s3.endpoint
        of_kinds = {"KINDS": ",".join(self.kinds)}
        if LLM in self.kinds:
            of_kinds["LLM_BASE_MODELS"] = f"{LLM_BASE}={self.folder.absolute()}"
        return (of_kinds if len(self.kinds) > 1 else {}) | {
            "RABBITMQ_HOST": "127.0.0.1",
            "RABBITMQ_PORT": str(port),
            "RABBITMQ_HEARTBEAT_SECONDS": "3",
            "TRAINING_QUEUE": QUEUE,
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_S3_REGION_NAME": REGION,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
            "AWS_STORAGE_BUCKET_NAME": MEDIA,
            "STATE_BUCKET_NAME": STATE,
            "BACKEND_API_URL": self.backend_url,
            "INTERNAL_API_TOKEN": TOKEN,
            "WEBHOOK_SIGNING_SECRET": SIGNING_SECRET,
            "ALLOW_CPU": "true",
            "HTTP_PORT": "0",
            "OMP_NUM_THREADS": "1",
            "RESOLUTION": "64",
            "LORA_RANK": "4",
            "MIN_IMAGES": "1",
            "MAX_JOB_BYTES": str(MAX_JOB_BYTES),
            "PROGRESS_INTERVAL_SECONDS": "0.5",
            "CHECKPOINT_INTERVAL": str(CHECKPOINT_INTERVAL),
            "LEASE_TTL_SECONDS": str(self.lease),
            "RETRY_DELAYS_SECONDS": ",".join(map(str, RETRY_DELAYS)),
            "ENDING_RETRY_DELAYS_SECONDS": ",".join(map(str, ENDING_DELAYS)),
            "DEDUPLICATION_WINDOW_SECONDS": str(WINDOW_SECONDS),
            # Longer than a suspension: the lost lease must stop a worker that continues.
            "STALL_SECONDS": str(self.lease * (LONGEST_FREEZE_IN_LEASES + 0.5)),
            "SHUTDOWN_GRACE_SECONDS": str(GRACE_SECONDS),
        }

    @property
    def backend_url(self) -> str:
        """The backend's origin, as the workers know it."""
        return f"http://127.0.0.1:{self.backend_way.port}"

    def declare(self) -> None:
        """The training queues, as the platform declares them. A worker may have been faster."""
        for kind in self.kinds:
            with self._channel() as channel, contextlib.suppress(ChannelClosedByBroker):
                channel.queue_declare(QUEUES[kind], durable=True, arguments=self._arguments)

    def declare_own_queues(self, queue_type: str | None = None) -> None:
        """Declare the worker's own queues, as classic ones unless a type is given.

        Existing queues stay as they are.
        """
        own = [declaration(QUEUE, queue) for queue in (Queue.ENDINGS, Queue.DEAD)]
        for queue, delays in ((Queue.TRAINING, RETRY_DELAYS), (Queue.ENDINGS, ENDING_DELAYS)):
            own += [declaration(QUEUE, queue, delay) for delay in (*delays, self.lease)]
        for one in own:
            with self._channel() as channel, contextlib.suppress(ChannelClosedByBroker):
                arguments = one.variants(queue_type)[0]
                channel.queue_declare(one.name, durable=True, arguments=arguments)

    def delete_own_queues(self) -> None:
        """Delete the worker's own queues that are empty; workers make them again."""
        for name in self.queues():
            if name not in QUEUES.values():
                with self._channel() as channel, contextlib.suppress(ChannelClosedByBroker):
                    channel.queue_delete(name, if_empty=True)

    def publish(
        self,
        body: bytes,
        times: int = 1,
        headers: dict[str, Any] | None = None,
        *,
        kind: str = STYLE,
    ) -> None:
        """Publish, once or more often in a row, until the broker has confirmed it."""
        properties = pika.BasicProperties(
            content_type="application/json", delivery_mode=2, headers=headers
        )
        deadline = time.monotonic() + PUBLISH_SECONDS
        while True:
            try:
                with self._channel() as channel:
                    while times:
                        channel.basic_publish("", QUEUES[kind], body, properties, mandatory=True)
                        times -= 1
                return
            except (AMQPError, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)
                with contextlib.suppress(AMQPError, OSError):
                    self.declare()

    def delete_queue(self, name: str) -> tuple[list[Message], bool]:
        """Delete a queue with all that it holds.

        Returns:
            Its ready messages, and whether these are all. For the training queue this is unknown:
            workers hold some of its messages.
        """
        held = [] if name == QUEUE else self.take_all(name)
        with self._channel() as channel, contextlib.suppress(ChannelClosedByBroker):
            # A message may arrive meanwhile; quorum queues cannot be deleted only if empty.
            gone = channel.queue_delete(name).method.message_count
            return held, name != QUEUE and not gone
        return held, name != QUEUE  # it was not there

    def waiting(self) -> dict[str, int]:
        """The number of ready messages per queue, by name; missing queues are left out."""
        counts = {}
        for name in self.queues():
            with self._channel() as channel, contextlib.suppress(ChannelClosedByBroker):
                counts[name] = channel.queue_declare(name, passive=True).method.message_count
        return counts

    def queues(self) -> list[str]:
        """The names of all possible queues."""
        training = [QUEUES[kind] for kind in self.kinds]
        delays = [f"{q}.delay.{_ms(s)}" for q in training for s in (*RETRY_DELAYS, self.lease)]
        delays += [f"{QUEUE}.endings.delay.{_ms(s)}" for s in (*ENDING_DELAYS, self.lease)]
        return [*training, f"{QUEUE}.endings", f"{QUEUE}.dead", *dict.fromkeys(delays)]

    def take_all(self, name: str) -> list[Message]:
        """Take a queue's ready messages; none if the queue does not exist."""
        found: list[Message] = []
        with self._channel() as channel, contextlib.suppress(ChannelClosedByBroker):
            while True:
                _, properties, body = channel.basic_get(name, auto_ack=True)
                if properties is None:
                    break
                headers = dict(properties.headers or {})
                if properties.message_id:
                    headers[MESSAGE_ID] = properties.message_id
                found.append((headers, body))
        return found

    def records(self) -> dict[str, dict[str, Any]]:
        """All job records, by task id."""
        for listed in self._listed(STATE, "jobs/"):
            key, etag = listed["Key"], listed["ETag"]
            if key.endswith(".json") and self._records.get(key, ("", {}))[0] != etag:
                answer = self.s3.get_object(Bucket=STATE, Key=key)
                try:
                    record = json.loads(answer["Body"].read())
                except ValueError:
                    record = _DAMAGED | {"task_id": key.removeprefix("jobs/").removesuffix(".json")}
                self._records[key] = (answer["ETag"], record)
        return {record["task_id"]: record for _, record in tuple(self._records.values())}

    def damage_record(self, task_id: str) -> None:
        """Replace a record by its first half."""
        key = f"jobs/{task_id}.json"
        body = self.s3.get_object(Bucket=STATE, Key=key)["Body"].read()
        self.s3.put_object(Bucket=STATE, Key=key, Body=body[: len(body) // 2])

    def settled(self) -> set[str]:
        """The ids of the jobs that a worker has marked as having nothing left to do."""
        marks = [key for key in self.keys(STATE, "jobs/") if key.endswith(".settled")]
        return {mark.removeprefix("jobs/").removesuffix(".settled") for mark in marks}

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Keys under a prefix."""
        return [listed["Key"] for listed in self._listed(bucket, prefix)]

    def _listed(self, bucket: str, prefix: str) -> list[dict[str, Any]]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [dict(found) for page in pages for found in page.get("Contents", ())]

    def spoil(self, prefix: str, *, delete: bool) -> None:
        """Delete one of the files of a checkpoint, or change its content, if it is there."""
        key = f"{prefix}optimizer.safetensors"
        with contextlib.suppress(self.s3.exceptions.ClientError):  # its job has just ended
            mark = self.s3.head_object(Bucket=STATE, Key=key)["Metadata"]
            if delete:
                self.s3.delete_object(Bucket=STATE, Key=key)
            else:
                self.s3.put_object(Bucket=STATE, Key=key, Body=b"damaged", Metadata=mark)

    def allow_sweep(self, records: Collection[str]) -> None:
        """Let the workers' sweeps publish these records; `*` stands for all."""
        with self._sweep_file.open("a", encoding="utf-8") as file:
            file.write("".join(f"{name}\n" for name in sorted(records)))
        self.sweep_allowed.update(records)

    def publish_to(self, queue: str, message: Message) -> None:
        """Publish a message with its headers to any queue, until the broker has confirmed it."""
        headers, body = message
        properties = pika.BasicProperties(
            content_type="application/json", delivery_mode=2, headers=headers
        )
        deadline = time.monotonic() + PUBLISH_SECONDS
        while True:
            try:
                with self._channel() as channel, contextlib.suppress(ChannelClosedByBroker):
                    # A worker may have been faster, and its queue has the worker's arguments.
                    channel.queue_declare(queue, durable=True, arguments=self._arguments)
                with self._channel() as channel:
                    channel.basic_publish("", queue, body, properties, mandatory=True)
                return
            except (AMQPError, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)

    def calm(self) -> None:
        """End all faults."""
        self.mood.calm()
        self.backend_way.calm()
        if self.api:
            self.api.database_way.calm()
            self.api.recorder.late_until = 0.0
        for way in self.ways:
            way.broker.calm()
            way.s3.calm()

    @contextlib.contextmanager
    def _channel(self) -> Iterator[Any]:
        parameters = pika.URLParameters(self.broker.url)
        parameters.heartbeat = 0
        parameters.socket_timeout = parameters.blocked_connection_timeout = 5
        connection = pika.BlockingConnection(parameters)
        try:
            channel = connection.channel()
            channel.confirm_delivery()
            yield channel
        finally:
            if connection.is_open:
                connection.close()


def task_of(message: Message) -> str:
    """The record that a message of a worker's queue is about."""
    headers, body = message
    try:
        values = json.loads(body)
    except ValueError:
        values = {}
    named = values.get("task_id") if isinstance(values, dict) else None
    return str(named or headers.get(MESSAGE_ID) or derive_task_id(body))


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
