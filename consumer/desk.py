"""Everything that the pipeline of one worker works with, and how it is put together."""

from __future__ import annotations

import dataclasses
import os
import socket
import uuid
from collections.abc import Callable

from consumer.life.endings import Endings
from consumer.life.put_offs import PutOffs
from consumer.life.stop_signal import Shutdown
from consumer.life.work_folder import WorkFolder
from consumer.pages.observer import Observer
from consumer.publishing.model_publisher import ModelPublisher
from consumer.trainer.trainer_process import TrainerProcess
from jobs.kinds import Kinds
from services.broker.outbox import Outbox
from services.records.job_records import JobRecords
from services.records.turns import Turns
from services.s3.s3_service import S3Service, open_store
from services.webhooks.webhook_service import WebhookService, open_webhooks
from utils.errors import MachineError
from utils.metrics import Metrics
from utils.settings.groups import JobLimits, WebhookSettings
from utils.settings.storage import StorageSettings


@dataclasses.dataclass(frozen=True, slots=True)
class Desk:
    """Everything that the pipeline works with.

    Attributes:
        test_machine: Raises `GpuBroken` if this machine cannot train.
        machine_fails: Reports that this machine cannot train, which stops the worker.
    """

    limits: JobLimits
    kinds: Kinds
    state_bucket: str
    s3: S3Service
    state_s3: S3Service
    webhooks: WebhookService
    records: JobRecords
    endings: Endings
    put_offs: PutOffs
    publisher: ModelPublisher
    trainer: TrainerProcess
    folders: WorkFolder
    shutdown: Shutdown
    test_machine: Callable[[], object]
    machine_fails: Callable[[MachineError], None]
    observer: Observer


# pylint: disable-next=too-many-locals  # one for each part
def open_desk(
    *,
    limits: JobLimits,
    storage: StorageSettings,
    webhooks: WebhookSettings,
    kinds: Kinds,
    state_s3: S3Service,
    trainer: TrainerProcess,
    folders: WorkFolder,
    shutdown: Shutdown,
    test_machine: Callable[[], object],
    machine_fails: Callable[[MachineError], None],
    observer: Observer,
    outbox: Outbox,
) -> Desk:
    """Open the stores, the records, the webhooks and the publisher of a worker.

    Args:
        outbox: Takes the messages that the worker publishes.

    Raises:
        ConfigurationError: A store or the webhooks cannot be opened with these settings.
    """
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    bucket, lease_seconds = storage.state_bucket_name, limits.lease_ttl_seconds
    s3, records_s3 = _stores(storage, state_s3, lease_seconds, observer.metrics)
    records = JobRecords(records_s3, bucket, owner=owner, lease_seconds=lease_seconds)
    service = open_webhooks(
        webhooks, metrics=observer.metrics, trace_headers=observer.tracing.headers
    )
    put_offs = PutOffs(limits.retry_delays_seconds, observer)
    return Desk(
        limits=limits,
        kinds=kinds,
        state_bucket=bucket,
        s3=s3,
        state_s3=state_s3,
        webhooks=service,
        records=records,
        endings=Endings(
            service,
            records,
            publish=outbox.put,
            put_offs=put_offs,
            kinds=kinds,
            retry_delays=limits.ending_retry_delays_seconds,
            deduplication_seconds=limits.deduplication_window_seconds,
            stop=shutdown.event,
            observer=observer,
        ),
        put_offs=put_offs,
        publisher=ModelPublisher(
            s3,
            state_s3,
            model_bucket=storage.model_bucket_name,
            state_bucket=bucket,
            url_scheme=storage.model_url_scheme,
            turns=Turns(records_s3, bucket, owner=owner, lease_seconds=lease_seconds),
        ),
        trainer=trainer,
        folders=folders,
        shutdown=shutdown,
        test_machine=test_machine,
        machine_fails=machine_fails,
        observer=observer,
    )


def _stores(
    storage: StorageSettings, state_s3: S3Service, lease_seconds: float, metrics: Metrics
) -> tuple[S3Service, S3Service]:
    """The store of inputs and models, and the store of the records."""
    # If both are one store, they are one object, so that the publisher can copy inside the store.
    s3 = state_s3
    if storage.state_store() != storage.main_store():
        s3 = open_store(storage.main_store(), metrics=metrics)
    # A request for a record that fails is repeated well within the lease.
    patience = min(10.0, lease_seconds / 8)
    return s3, open_store(storage.state_store(), attempts=2, patience=patience, metrics=metrics)
