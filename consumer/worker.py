"""The front desk, put together: services, records, trainer, pipeline and consumer of one worker."""

from __future__ import annotations

import functools
import os
import socket
import sys
import uuid
from collections.abc import Callable, Sequence

from config import Settings
from consumer.kinds import configured_kinds
from consumer.life.checkpoint_uploads import clear_up
from consumer.life.endings import Endings
from consumer.life.put_offs import PutOffs
from consumer.life.state_guard import StateGuard
from consumer.life.stop_signal import Shutdown
from consumer.life.sweeper import Sweeper
from consumer.life.work_folder import WorkFolder
from consumer.pages.condition import Condition
from consumer.pages.http_pages import HttpPages
from consumer.pages.observer import Observer
from consumer.pages.surroundings import PATIENCE_SECONDS, Surroundings
from consumer.pipeline import Desk, Pipeline
from consumer.publishing.model_publisher import ModelPublisher
from consumer.trainer.machine import Machine, require_fit
from consumer.trainer.trainer_process import TrainerProcess
from consumer.training_consumer import training_consumer
from services.broker.outbox import Outbox
from services.records.job_records import JobRecords
from services.records.style_turn import StyleTurns
from services.records.sweep import RecordSweep
from services.s3.s3_service import S3Service
from services.telemetry.tracing import open_tracing
from services.webhooks.webhook_service import WebhookService
from utils.errors import MachineError
from utils.gpu_monitor import GpuMonitor
from utils.logger import get_logger
from utils.metrics import Metrics
from utils.settings.storage import Store
from utils.settings.values import not_pinned

log = get_logger(__name__)

TRAINER = (sys.executable, "-m", "training")
GPU_SAMPLE_SECONDS = 5.0
LAST_WORDS_SECONDS = 1.0  # for the last spans and reports, at the end of a shutdown's grace


def run_worker(
    settings: Settings,
    shutdown: Shutdown,
    *,
    trainer_command: Sequence[str] = TRAINER,
    once_idle: float | None = None,
) -> None:
    """Take jobs until the shutdown.

    Args:
        settings: All of them.
        shutdown: Ends the worker, after the job in hand has been saved.
        trainer_command: Starts the trainer process.
        once_idle: End after one training message, or after so many seconds without one.

    Raises:
        ConfigurationError: A folder, a port or a service cannot be set up as the settings say, or
            the state bucket does not honour conditional writes.
        MachineError: This machine cannot train; the job in hand went back.
        BrokerRefused: RabbitMQ refuses the worker, and waiting will not help.
    """
    secrets = settings.secrets()
    otlp_headers = settings.otel_exporter_otlp_headers
    tracing = open_tracing(
        settings.otel_exporter_otlp_endpoint,
        headers=otlp_headers.get_secret_value() if otlp_headers else "",
        service=settings.otel_service_name,
        secrets=secrets,
    )
    observer = Observer(tracing=tracing)
    condition = Condition(settings, observer, shutdown.event)
    # First of all, so that a platform's probes are answered while the GPU is tested.
    with HttpPages(settings.http_host, settings.http_port, condition, observer.metrics):
        machine = require_fit(settings.trainer_environment(), allow_cpu=settings.allow_cpu)
        _say_hello(settings, machine, observer)
        condition.machine_tested(machine)
        try:
            _serve(settings, shutdown, trainer_command, observer, condition, once_idle)
        finally:
            tracing.close(LAST_WORDS_SECONDS)
    log.info("worker_stopped")


def _serve(
    settings: Settings,
    shutdown: Shutdown,
    trainer_command: Sequence[str],
    observer: Observer,
    condition: Condition,
    once_idle: float | None,
) -> None:
    """Take jobs on a machine that is fit, until the shutdown."""
    state_s3 = open_state_s3(settings, metrics=observer.metrics)
    guard = StateGuard(
        state_s3,
        settings.state_bucket_name,
        allow_unguarded=settings.allow_unguarded_state,
        report=condition.state_tested,
    )
    guard.test()  # a wrong store is refused before anything is loaded
    folders = WorkFolder(settings.work_dir)
    trainer = TrainerProcess(
        settings.trainer_options(),
        settings.trainer_environment() | {"TMPDIR": str(folders.temporary)},
        stall_seconds=settings.stall_seconds,
        command=trainer_command,
        metrics=observer.metrics,
        secrets=settings.secrets(),
        confinement=settings.trainer_confinement(folders.path),
    )
    condition.has_trainer(trainer)
    failures: list[MachineError] = []

    def machine_fails(error: MachineError) -> None:
        failures.append(error)
        condition.machine_failed(str(error))
        shutdown.request()

    monitor = GpuMonitor(sample_seconds=GPU_SAMPLE_SECONDS, observe=observer.gpus)
    try:
        trainer.start()  # the base model loads while the first message is waited for
        monitor.start()
        outbox = Outbox()
        desk = _desk(
            settings, state_s3, trainer, folders, shutdown, machine_fails, observer, outbox
        )
        with _surroundings(settings, folders, condition, observer):
            # S3 may be down when the worker starts: then it takes no job before it was tested.
            if guard.wait(shutdown.event, at_most=once_idle):
                _take_jobs(settings, desk, condition, outbox, once_idle)
    finally:
        # In this order: the consumer has returned what it held; the child ends before its folder
        # goes.
        trainer.close()
        monitor.stop()
        folders.close()
    if failures:
        raise failures[0]


def _take_jobs(
    settings: Settings,
    desk: Desk,
    condition: Condition,
    outbox: Outbox,
    once_idle: float | None,
) -> None:
    """Consume until the shutdown."""
    s3, observer = desk.state_s3, desk.observer
    consumer = training_consumer(
        settings,
        handle=Pipeline(desk).handle,
        handle_ending=desk.endings.handle,
        stop=desk.shutdown.event,
        observer=observer,
        once_idle=once_idle,
        outbox=outbox,
    )
    condition.has_broker(consumer)
    sweep = RecordSweep(
        s3,
        settings.state_bucket_name,
        lease_seconds=settings.lease_ttl_seconds,
        clear_up=functools.partial(clear_up, s3, settings.state_bucket_name),
        may_wait=observer.queues.may_hold_messages,
    )
    with Sweeper(sweep, consumer.publish, settings, desk.kinds, s3, observer):
        consumer.run()


def _surroundings(
    settings: Settings, folders: WorkFolder, condition: Condition, observer: Observer
) -> Surroundings:
    """Whoever looks at S3 and the disks."""
    watched = {"work": folders.path}
    if settings.hf_home:
        watched["models"] = settings.hf_home
    s3 = open_s3(settings, attempts=1, patience=PATIENCE_SECONDS)
    one_store = settings.state_store() == settings.main_store()
    return Surroundings(
        settings,
        s3,
        s3 if one_store else open_state_s3(settings, attempts=1, patience=PATIENCE_SECONDS),
        watched,
        condition,
        observer.metrics,
    )


def _desk(
    settings: Settings,
    state_s3: S3Service,
    trainer: TrainerProcess,
    folders: WorkFolder,
    shutdown: Shutdown,
    machine_fails: Callable[[MachineError], None],
    observer: Observer,
    outbox: Outbox,
) -> Desk:
    """Everything that the pipeline works with."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    records_s3 = _s3_for_records(settings, observer.metrics)
    records = JobRecords(
        records_s3,
        settings.state_bucket_name,
        owner=owner,
        lease_seconds=settings.lease_ttl_seconds,
    )
    webhooks = open_webhooks(settings, observer)
    # The same object tells the publisher that it can copy inside the storage.
    s3 = state_s3
    if settings.state_store() != settings.main_store():
        s3 = open_s3(settings, metrics=observer.metrics)
    put_offs = PutOffs(settings.retry_delays_seconds, observer)
    kinds = configured_kinds(settings)
    return Desk(
        settings=settings,
        kinds=kinds,
        s3=s3,
        state_s3=state_s3,
        webhooks=webhooks,
        records=records,
        endings=Endings(
            webhooks,
            records,
            publish=outbox.put,
            put_offs=put_offs,
            kinds=kinds,
            retry_delays=settings.ending_retry_delays_seconds,
            deduplication_seconds=settings.deduplication_window_seconds,
            stop=shutdown.event,
            observer=observer,
        ),
        put_offs=put_offs,
        publisher=ModelPublisher(
            s3,
            state_s3,
            model_bucket=settings.model_bucket_name,
            state_bucket=settings.state_bucket_name,
            url_scheme=settings.model_url_scheme,
            turns=StyleTurns(
                records_s3,
                settings.state_bucket_name,
                owner=owner,
                lease_seconds=settings.lease_ttl_seconds,
            ),
        ),
        trainer=trainer,
        folders=folders,
        shutdown=shutdown,
        machine_fails=machine_fails,
        observer=observer,
    )


def open_webhooks(settings: Settings, observer: Observer | None = None) -> WebhookService:
    """The backend's ear, as the settings say."""
    observer = observer or Observer()
    return WebhookService(
        backend_url=settings.backend_api_url,
        allowed_origins=settings.webhook_allowed_origins,
        token=settings.internal_api_token.get_secret_value(),
        signing_secrets=settings.signing_secrets(),
        ca_file=settings.webhook_ca_file,
        proxy=settings.webhook_proxy.get_secret_value() if settings.webhook_proxy else None,
        metrics=observer.metrics,
        trace_headers=observer.tracing.headers,
    )


def open_s3(
    settings: Settings,
    *,
    attempts: int = 3,
    patience: float = 20.0,
    metrics: Metrics | None = None,
) -> S3Service:
    """The store of images and models, as the settings say.

    Args:
        settings: Region, address, keys.
        attempts: How often, in all, a request is made that fails for a passing reason.
        patience: Seconds to wait for a connection, and for the next bytes.
        metrics: Where requests are counted.

    Raises:
        ConfigurationError: No client can be made of them.
    """
    return _open(settings.main_store(), attempts, patience, metrics)


def open_state_s3(
    settings: Settings,
    *,
    attempts: int = 3,
    patience: float = 20.0,
    metrics: Metrics | None = None,
) -> S3Service:
    """The store of the state bucket; arguments and errors as for `open_s3`."""
    return _open(settings.state_store(), attempts, patience, metrics)


def _open(store: Store, attempts: int, patience: float, metrics: Metrics | None) -> S3Service:
    return S3Service(
        region=store.region,
        endpoint_url=store.endpoint,
        ignore_configured_endpoints=store.ignore_configured_endpoints,
        access_key_id=store.access_key_id,
        secret_access_key=store.secret_access_key,
        session_token=store.session_token,
        checksums=store.checksums,
        conditional_writes=store.conditional_writes,
        connect_timeout=min(5.0, patience),
        read_timeout=patience,
        attempts=attempts,
        metrics=metrics,
    )


def _s3_for_records(settings: Settings, metrics: Metrics) -> S3Service:
    """A request for a record must fail, and be made again, well within the lease."""
    patience = min(10.0, settings.lease_ttl_seconds / 8)
    return open_state_s3(settings, attempts=2, patience=patience, metrics=metrics)


def _say_hello(settings: Settings, machine: Machine, observer: Observer) -> None:
    observer.metrics.worker.info({"device": machine.device, "base_model": settings.base_model})
    log.info(
        "worker_starting",
        device=machine.device,
        queue=settings.training_queue,
        base_model=settings.base_model,
        mixed_precision=settings.mixed_precision if machine.cuda else "no",
    )
    if not machine.cuda:
        log.warning("training_on_cpu", reason="no CUDA, and ALLOW_CPU=true: fp32 and slow")
    if reason := not_pinned(settings.base_model, settings.base_model_revision):
        log.warning("base_model_not_pinned", reason=reason)
