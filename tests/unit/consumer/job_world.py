"""One worker and its surroundings in memory: the real pipeline, endings and records.

S3 is in memory, and a test controls the broker, the backend and the trainer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from config import Settings
from consumer.desk import Desk
from consumer.life.checkpoint_uploads import clear_up
from consumer.life.endings import Endings
from consumer.life.put_offs import PutOffs
from consumer.life.stop_signal import Shutdown, StopSignal
from consumer.life.sweeper import Sweeper
from consumer.pages.observer import Observer
from consumer.pipeline import Pipeline
from consumer.publishing.model_publisher import Published
from jobs.addresses import S3Location
from jobs.hold import decode
from jobs.kinds import Kinds
from jobs.record import JobRecord
from jobs.style import TrainingRun
from services.broker.settlement import Delivery, Publication, Queue
from services.records.job_records import JobRecords
from services.records.sweep import RecordSweep
from services.webhooks.webhook_service import (
    EndingAnswer,
    EndingOutcome,
    EndingWebhook,
    ProgressAnswer,
)
from tests.memory_s3 import MemoryS3
from tests.unit.jobs.message_samples import BUCKET, flat, make_settings
from utils.errors import MachineError
from utils.events import CheckpointSaved, Event, Finished, from_dict

STATE = "state-bucket"
TAKEN = EndingAnswer(EndingOutcome.DELIVERED, status=200)
AWAY = EndingAnswer(EndingOutcome.RETRY, status=503)
REFUSED = EndingAnswer(EndingOutcome.REJECTED, status=400, detail="no such style")
NOT_FOUND = EndingAnswer(EndingOutcome.RETRY_A_FEW, status=404, by_json=True)
ROUTER_404 = EndingAnswer(EndingOutcome.RETRY_A_FEW, status=404)
FORBIDDEN = EndingAnswer(EndingOutcome.RETRY_SLOWLY, status=403)


class Backend:
    """Stands in for `WebhookService`: gives the answers of a test, and keeps the requests."""

    def __init__(self) -> None:
        self.answers: list[EndingAnswer] = []
        self.endings: list[EndingWebhook] = []
        self.patience: list[float] = []
        self.reports: list[dict[str, Any]] = []
        self.on_ending: Callable[[], None] = lambda: None

    def origin_for(self, requested: str | None) -> str:
        return requested or "https://api.stylelicense.com"

    def send_progress(self, origin: str, body: Any) -> ProgressAnswer:
        del origin
        self.reports.append(body)
        return ProgressAnswer.DONE

    def deliver(
        self, origin: str, ending: EndingWebhook, *, for_seconds: float, **_: Any
    ) -> EndingAnswer:
        del origin
        self.patience.append(for_seconds)
        self.on_ending()
        self.endings.append(ending)
        return self.answers.pop(0) if self.answers else TAKEN


class Broker:
    """Takes publications, and confirms them unless a test forbids it."""

    def __init__(self) -> None:
        self.confirms = True
        self.published: list[Publication] = []
        self.on_publish: Callable[[], None] = lambda: None

    def publish(self, publication: Publication) -> Future[None]:
        confirmed: Future[None] = Future()
        if self.confirms:
            self.on_publish()
            self.published.append(publication)
            confirmed.set_result(None)
        else:
            confirmed.cancel()  # as when the worker ends before the broker confirms
        return confirmed

    def in_queue(self, queue: Queue) -> list[Publication]:
        return [one for one in self.published if one.queue is queue]


class Trainer:
    """Stands in for `TrainerProcess`: `does` defines a run."""

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.max_seconds: list[float] = []
        self.does: Callable[[Any, Callable[[Event], None], StopSignal], None] = (
            lambda run, tell, stop: None
        )

    def run(
        self,
        run: Any,
        on_event: Callable[[Event], None],
        stop: StopSignal,
        *,
        max_seconds: float,
        patience: Callable[[], float],
    ) -> Finished:
        del patience
        own = from_dict(TrainingRun, run.order)
        self.runs.append(own)
        self.max_seconds.append(max_seconds)
        self.does(own, on_event, stop)
        stop.check()
        return Finished(
            run.task_id,
            folder=own.work_folder,
            files=("lora_weights.safetensors",),
            done=100,
            seconds=1.0,
            facts={"epoch": 10, "loss": 0.1},
            summary={"pictures_used": 3, "pictures_left_out": 1},
        )


class Publisher:
    """Stands in for `ModelPublisher`."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self.repaired: list[str] = []
        self.confirmed: list[tuple[str, str]] = []
        self.ordered_at = ""
        self.superseded_by: str | None = None
        self.does: Callable[[], None] = lambda: None
        self.repairs: Callable[[], None] = lambda: None

    def publish(
        self, folder: Any, files: Any, place: Any, lease: Any, *_: Any, ordered_at: str, **__: Any
    ) -> Published:
        del folder, files
        self.does()
        self.published.append(lease.record.task_id)
        self.ordered_at = ordered_at
        url = f"s3://models/{place.models}lora_weights.safetensors"
        if self.superseded_by is None:
            return Published(url)
        return Published(url, self.superseded_by, f"s3://state/archive/{lease.record.task_id}")

    def confirm(self, place: Any, task_id: str, lease: Any) -> None:
        del place
        self.confirmed.append((task_id, str(lease.record.state)))

    def repair(self, place: Any, task_id: str, lease: Any) -> bool:
        del place, lease
        self.repairs()
        self.repaired.append(task_id)
        return False


class Folders:
    """A folder for each job, in the test's folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._count = 0

    @contextlib.contextmanager
    def job(self) -> Iterator[Path]:
        self._count += 1
        folder = self._root / f"job-{self._count}"
        folder.mkdir()
        yield folder


class World:
    """Everything around the pipeline of one worker; `worker` makes a further worker."""

    def __init__(self, root: Path, s3: MemoryS3 | None = None, **settings: Any) -> None:
        self.settings: Settings = make_settings(
            state_bucket_name=STATE, ending_retry_delays_seconds="60,300,1800,7200", **settings
        )
        self.root = root
        self.s3 = s3 or MemoryS3()
        if s3 is None:
            self.s3.now = datetime.datetime.now(datetime.UTC)
        self.backend = Backend()
        self.broker = Broker()
        self.trainer = Trainer()
        self.publisher = Publisher()
        self.shutdown = Shutdown(1.0)
        self.test_machine: Callable[[], object] = lambda: None
        self.unfit: list[MachineError] = []
        self.observer = Observer()
        root.mkdir(exist_ok=True)
        records = JobRecords(
            self.s3,
            STATE,
            owner=root.name,
            lease_seconds=self.settings.limits.lease_ttl_seconds,
        )
        put_offs = PutOffs(self.settings.limits.retry_delays_seconds, self.observer)
        self.endings = Endings(
            cast(Any, self.backend),
            records,
            publish=self.broker.publish,
            put_offs=put_offs,
            kinds=self.settings.kinds(),
            retry_delays=self.settings.limits.ending_retry_delays_seconds,
            deduplication_seconds=self.settings.limits.deduplication_window_seconds,
            stop=threading.Event(),
            observer=self.observer,
        )
        self.records = records
        self.pipeline = Pipeline(
            Desk(
                limits=self.settings.limits,
                state_bucket=STATE,
                kinds=self.settings.kinds(),
                s3=cast(Any, self.s3),
                state_s3=cast(Any, self.s3),
                webhooks=cast(Any, self.backend),
                records=records,
                endings=self.endings,
                put_offs=put_offs,
                publisher=cast(Any, self.publisher),
                trainer=cast(Any, self.trainer),
                folders=cast(Any, Folders(root)),
                shutdown=self.shutdown,
                # Tests replace it later.
                # pylint: disable-next=unnecessary-lambda
                test_machine=lambda: self.test_machine(),
                machine_fails=self.unfit.append,
                observer=self.observer,
            )
        )
        for name in "abc":
            self.s3.write(S3Location(BUCKET, f"{name}.jpg"), name.encode())

    def worker(self, name: str, **settings: Any) -> World:
        """Another worker on the same storage."""
        return World(self.root.parent / name, self.s3, **settings)

    def sweeper(self, kinds: Kinds | None = None) -> Sweeper:
        """The worker's sweep, which reaches its broker; of its kinds unless others are given."""
        s3 = self.s3
        sweep = RecordSweep(
            s3,
            STATE,
            lease_seconds=self.settings.limits.lease_ttl_seconds,
            clear_up=functools.partial(clear_up, s3, STATE, kinds=self.settings.kinds()),
        )
        return Sweeper(
            sweep,
            self.broker.publish,
            kinds or self.settings.kinds(),
            s3,
            STATE,
            every_seconds=self.settings.limits.lease_ttl_seconds,
            retention_days=self.settings.limits.record_retention_days,
            observer=self.observer,
        )

    def record(self, task_id: str = "task-1") -> JobRecord:
        """A record as it is stored on S3."""
        found = self.s3.objects[STATE, f"jobs/{task_id}.json"]
        return decode(JobRecord, found.body, task_id, found.metadata)

    def counted(self, name: str, **labels: str) -> float:
        """A metric's value."""
        value = self.observer.metrics.registry.get_sample_value(f"training_server_{name}", labels)
        return value or 0.0


def order(task_id: str | None = "task-1", **values: Any) -> bytes:
    """A valid message; with None, one without an id."""
    images = [f"s3://{BUCKET}/{name}.jpg" for name in "abc"]
    return json.dumps(
        flat(image_urls=images, **({"task_id": task_id} if task_id else {}), **values)
    ).encode()


def delivery(body: bytes | None = None, **how: Any) -> Delivery:
    """A message as the broker delivers it."""
    return Delivery(body=order() if body is None else body, **how)


def redelivery_of(publication: Publication) -> Delivery:
    """The delivery that a publication becomes."""
    return Delivery(
        body=publication.body,
        message_id=publication.message_id,
        headers=dict(publication.headers),
        queue=publication.queue,
    )


def parked_body(publication: Publication) -> dict[str, Any]:
    """The content of a publication to the endings' queue."""
    return dict(json.loads(publication.body))


def checkpoint(run: Any, tell: Callable[[Event], None], epoch: int = 10) -> None:
    """The trainer makes a checkpoint."""
    folder = Path(run.work_folder) / f"epoch-{epoch:04}"
    folder.mkdir()
    (folder / "lora.safetensors").write_bytes(b"weights")
    (folder / "manifest.json").write_bytes(b"{}")
    tell(
        CheckpointSaved(
            run.task_id, f"epoch-{epoch:04}", epoch, epoch * 10, str(folder), seconds=0.1
        )
    )


def replaced(one: Delivery, **values: Any) -> Delivery:
    """The same delivery with other facts."""
    return dataclasses.replace(one, **values)
