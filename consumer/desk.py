"""The front desk, put together: services, records, trainer, pipeline and consumer of one worker."""

from __future__ import annotations

import functools
import os
import socket
import sys
import uuid
from collections.abc import Callable, Sequence

from config import Settings
from consumer.checkpoint_uploads import clear_up
from consumer.endings import Endings
from consumer.machine import Machine, require_fit
from consumer.model_publisher import ModelPublisher
from consumer.pipeline import Desk, Pipeline
from consumer.stop_signal import Shutdown
from consumer.sweeper import Sweeper
from consumer.trainer_process import TrainerProcess
from consumer.training_consumer import TrainingConsumer
from consumer.work_folder import WorkFolder
from services.condition_probe import probe
from services.job_records import JobRecords
from services.record_sweep import RecordSweep
from services.s3_service import S3Service
from services.style_turn import StyleTurns
from services.webhook_service import WebhookService
from utils.errors import MachineError, StorageError
from utils.gpu_monitor import GpuMonitor
from utils.logger import get_logger

log = get_logger(__name__)

TRAINER = (sys.executable, "-m", "training")


def run_worker(
    settings: Settings, shutdown: Shutdown, *, trainer_command: Sequence[str] = TRAINER
) -> None:
    """Take jobs until the shutdown.

    Args:
        settings: All of them.
        shutdown: Ends the worker, after the job in hand has been saved.
        trainer_command: Starts the trainer process.

    Raises:
        ConfigurationError: A folder or a service cannot be set up as the settings say.
        MachineError: This machine cannot train; the job in hand went back.
        BrokerRefused: RabbitMQ refuses the worker, and waiting will not help.
    """
    machine = require_fit(settings.trainer_environment(), allow_cpu=settings.allow_cpu)
    _say_hello(settings, machine)
    s3 = open_s3(settings)
    _say_what_s3_promises(s3, settings.state_bucket_name)
    trainer = TrainerProcess(
        settings.trainer_options(),
        settings.trainer_environment(),
        stall_seconds=settings.stall_seconds,
        command=trainer_command,
    )
    failures: list[MachineError] = []

    def machine_fails(error: MachineError) -> None:
        failures.append(error)
        shutdown.request()

    folders = WorkFolder(settings.work_dir)
    monitor = GpuMonitor()
    try:
        trainer.start()  # the base model loads while the first message is waited for
        monitor.start()
        desk = _desk(settings, s3, trainer, folders, shutdown, machine_fails)
        consumer = TrainingConsumer(
            settings,
            handle=Pipeline(desk).handle,
            handle_ending=desk.endings.handle,
            stop=shutdown.event,
        )
        sweep = RecordSweep(
            s3,
            settings.state_bucket_name,
            lease_seconds=settings.lease_ttl_seconds,
            clear_up=functools.partial(clear_up, s3, settings.state_bucket_name),
        )
        with Sweeper(sweep, consumer.publish, settings):
            consumer.run()
    finally:
        # In this order: the consumer has returned what it held; the child ends before its folder
        # goes.
        trainer.close()
        monitor.stop()
        folders.close()
    if failures:
        raise failures[0]
    log.info("worker_stopped")


def _desk(
    settings: Settings,
    s3: S3Service,
    trainer: TrainerProcess,
    folders: WorkFolder,
    shutdown: Shutdown,
    machine_fails: Callable[[MachineError], None],
) -> Desk:
    """Everything that the pipeline works with."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    bucket, lease_seconds = settings.state_bucket_name, settings.lease_ttl_seconds
    records_s3 = _s3_for_records(settings)
    records = JobRecords(records_s3, bucket, owner=owner, lease_seconds=lease_seconds)
    webhooks = open_webhooks(settings)
    return Desk(
        settings=settings,
        s3=s3,
        webhooks=webhooks,
        records=records,
        endings=Endings(
            webhooks,
            records,
            retry_delays=settings.ending_retry_delays_seconds,
            deduplication_seconds=settings.deduplication_window_seconds,
            stop=shutdown.event,
        ),
        publisher=ModelPublisher(
            s3,
            model_bucket=settings.model_bucket_name,
            state_bucket=bucket,
            url_scheme=settings.model_url_scheme,
            turns=StyleTurns(records_s3, bucket, owner=owner, lease_seconds=lease_seconds),
        ),
        trainer=trainer,
        folders=folders,
        shutdown=shutdown,
        machine_fails=machine_fails,
    )


def open_webhooks(settings: Settings) -> WebhookService:
    """The backend's ear, as the settings say."""
    return WebhookService(
        backend_url=settings.backend_api_url,
        allowed_origins=settings.webhook_allowed_origins,
        token=settings.internal_api_token.get_secret_value(),
        signing_secrets=settings.signing_secrets(),
    )


def open_s3(settings: Settings, *, attempts: int = 3, patience: float = 20.0) -> S3Service:
    """S3, as the settings say.

    Args:
        settings: Region, address, keys.
        attempts: How often, in all, a request is made that fails for a passing reason.
        patience: Seconds to wait for a connection, and for the next bytes.

    Raises:
        ConfigurationError: No client can be made of them.
    """
    secret = settings.aws_secret_access_key
    return S3Service(
        region=settings.aws_s3_region_name,
        endpoint_url=settings.aws_endpoint_url_s3,
        access_key_id=settings.aws_access_key_id,
        secret_access_key=secret.get_secret_value() if secret else None,
        connect_timeout=min(5.0, patience),
        read_timeout=patience,
        attempts=attempts,
    )


def _s3_for_records(settings: Settings) -> S3Service:
    """A request for a record must fail, and be made again, well within the lease."""
    return open_s3(settings, attempts=2, patience=min(10.0, settings.lease_ttl_seconds / 8))


def _say_hello(settings: Settings, machine: Machine) -> None:
    log.info(
        "worker_starting",
        device=machine.device,
        queue=settings.training_queue,
        base_model=settings.base_model,
        mixed_precision=settings.mixed_precision if machine.cuda else "no",
    )
    if not machine.cuda:
        log.warning("training_on_cpu", reason="no CUDA, and ALLOW_CPU=true: fp32 and slow")


def _say_what_s3_promises(s3: S3Service, bucket: str) -> None:
    """A store that ignores conditional writes is usable by one worker; S3 may also be down now."""
    try:
        support = probe(s3, bucket)
    except StorageError as error:
        log.error("state_bucket_unusable", bucket=bucket, reason=str(error))
        return
    if support.complete:
        log.info("state_bucket_tested", bucket=bucket, result=support.explain())
    else:
        log.error("state_bucket_unsafe", bucket=bucket, reason=support.explain())
