"""Composition root of the worker: services, trainer process, pipeline and consumer of one worker.

No other module of the worker sees all settings.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from config import Settings
from consumer.desk import Desk, open_desk
from consumer.life.checkpoint_uploads import clear_up
from consumer.life.state_guard import StateGuard
from consumer.life.stop_signal import Shutdown
from consumer.life.sweeper import Sweeper
from consumer.life.work_folder import WorkFolder
from consumer.pages.condition import Condition
from consumer.pages.http_pages import HttpPages
from consumer.pages.observer import Observer
from consumer.pages.surroundings import PATIENCE_SECONDS, Surroundings
from consumer.pipeline import Pipeline
from consumer.trainer.machine import Machine, require_fit
from consumer.trainer.trainer_process import TrainerProcess
from consumer.training_consumer import training_consumer
from services.broker.outbox import Outbox
from services.broker.settlement import Queue
from services.records.sweep import RecordSweep
from services.s3.s3_service import S3Service, open_store
from services.telemetry.tracing import open_tracing
from utils.errors import ConfigurationError, MachineError
from utils.gpu_monitor import GpuMonitor
from utils.logger import get_logger
from utils.settings.groups import TrainerSettings
from utils.settings.values import not_pinned

log = get_logger(__name__)

TRAINER = (sys.executable, "-m", "training")
GPU_SAMPLE_SECONDS = 5.0
LAST_WORDS_SECONDS = 1.0  # for the last spans and error reports, at the end of a shutdown's grace


def run_worker(
    settings: Settings,
    shutdown: Shutdown,
    *,
    trainer_command: Sequence[str] = TRAINER,
    once_idle: float | None = None,
) -> None:
    """Take jobs until the shutdown.

    Args:
        settings: All settings.
        shutdown: Stops the worker after the current job is saved.
        trainer_command: Starts the trainer process.
        once_idle: Stop after one training message, or after this many seconds without one.

    Raises:
        ConfigurationError: A folder, a port or a service cannot be opened with these settings, a
            kind cannot use BASE_MODEL, TRAINER_PROCESSES does not fit this machine or KINDS, or
            the state bucket does not honour conditional writes.
        MachineError: This machine cannot train; the current job is returned to the queue.
        BrokerRefused: RabbitMQ refuses the worker, and waiting does not help.
    """
    _refuse_base_model(settings)
    telemetry, pages = settings.telemetry, settings.pages
    otlp_headers = telemetry.otel_exporter_otlp_headers
    tracing = open_tracing(
        telemetry.otel_exporter_otlp_endpoint,
        headers=otlp_headers.get_secret_value() if otlp_headers else "",
        service=telemetry.otel_service_name,
        secrets=settings.secrets(),
    )
    observer = Observer(tracing=tracing)
    for kind in (kinds := settings.kinds()):
        observer.metrics.declare(kind.counters, kind.gauges)
    condition = Condition(
        observer,
        shutdown.event,
        first_kind=next(iter(kinds)),
        base_model=settings.trainer.base_model,
        queue=settings.broker.training_queue,
    )
    # The pages open first, so that a platform's probes are answered while the GPU is tested.
    with HttpPages(pages.http_host, pages.http_port, condition, observer.metrics):
        machine = _machine_test(settings)()
        _log_start(settings.trainer, settings.broker.training_queue, machine, observer)
        condition.machine_tested(machine)
        try:
            processes = settings.trainer_processes(machine.count)
            observer.metrics.trainer_processes.set(processes)
            _serve(settings, shutdown, observer, condition, trainer_command, processes, once_idle)
        finally:
            tracing.close(LAST_WORDS_SECONDS)
    log.info("worker_stopped")


# One variable for each part of a worker.
def _serve(  # pylint: disable=too-many-locals
    settings: Settings,
    shutdown: Shutdown,
    observer: Observer,
    condition: Condition,
    trainer_command: Sequence[str],
    processes: int,
    once_idle: float | None,
) -> None:
    """Take jobs on a machine that can train, until the shutdown."""
    state_s3 = open_store(settings.storage.state_store(), metrics=observer.metrics)
    guard = StateGuard(
        state_s3,
        settings.storage.state_bucket_name,
        allow_unguarded=settings.storage.allow_unguarded_state,
        report=condition.state_tested,
    )
    guard.test()  # a store without conditional writes is refused before anything is loaded
    folders = WorkFolder(settings.worker.work_dir)
    trainer = _trainer(settings, folders, trainer_command, observer, processes)
    condition.has_trainer(trainer)
    failures: list[MachineError] = []

    def machine_fails(error: MachineError) -> None:
        failures.append(error)
        condition.machine_failed(str(error))
        shutdown.request()

    monitor = GpuMonitor(sample_seconds=GPU_SAMPLE_SECONDS, observe=observer.gpus)
    try:
        trainer.start()  # the base model is loaded during the wait for the first message
        monitor.start()
        outbox = Outbox()
        desk = open_desk(
            limits=settings.limits,
            storage=settings.storage,
            webhooks=settings.webhooks,
            kinds=settings.kinds(),
            state_s3=state_s3,
            trainer=trainer,
            folders=folders,
            shutdown=shutdown,
            test_machine=_machine_test(settings),
            machine_fails=machine_fails,
            observer=observer,
            outbox=outbox,
        )
        with _surroundings(settings, folders, condition, observer):
            # If S3 is down when the worker starts, the worker waits for the test of the bucket.
            if guard.wait(shutdown.event, at_most=once_idle):
                _take_jobs(settings, desk, condition, outbox, once_idle)
    finally:
        # The consumer has returned its messages by now. The trainer ends before its folder goes.
        trainer.close()
        monitor.stop()
        folders.close()
    if failures:
        raise failures[0]


def _refuse_base_model(settings: Settings) -> None:
    """Refuse a base model on which every job of a kind would fail."""
    for kind in settings.kinds():
        if refused := kind.refusal(settings.trainer.base_model):
            raise ConfigurationError(refused)


def _machine_test(settings: Settings) -> Callable[[], Machine]:
    """The test of the GPU, which raises `GpuBroken` if this machine cannot train."""
    return functools.partial(
        require_fit, settings.trainer_environment(), allow_cpu=settings.may_use_cpu()
    )


def _trainer(
    settings: Settings,
    folders: WorkFolder,
    command: Sequence[str],
    observer: Observer,
    processes: int,
) -> TrainerProcess:
    environment = settings.trainer_environment(processes=processes)
    return TrainerProcess(
        settings.trainer_options(processes=processes),
        environment | {"TMPDIR": str(folders.temporary)},
        stall_seconds=settings.trainer.stall_seconds,
        command=command,
        metrics=observer.metrics,
        secrets=settings.secrets(),
        confinement=settings.trainer_confinement(folders.path, processes=processes),
    )


def _surroundings(
    settings: Settings, folders: WorkFolder, condition: Condition, observer: Observer
) -> Surroundings:
    """The polls of S3 and the disks, with clients whose requests fail fast."""
    storage, hf_home = settings.storage, settings.trainer.hf_home
    fast: Callable[..., S3Service] = functools.partial(
        open_store, attempts=1, patience=PATIENCE_SECONDS
    )
    s3 = fast(storage.main_store())
    one_store = storage.state_store() == storage.main_store()
    state_s3 = s3 if one_store else fast(storage.state_store())
    return Surroundings(
        [(storage.model_bucket_name, s3), (storage.state_bucket_name, state_s3)],
        {"work": folders.path} | ({"models": hf_home} if hf_home else {}),
        condition,
        observer.metrics,
    )


def _take_jobs(
    settings: Settings,
    desk: Desk,
    condition: Condition,
    outbox: Outbox,
    once_idle: float | None,
) -> None:
    """Consume until the shutdown."""
    limits, observer = settings.limits, desk.observer
    consumer = training_consumer(
        settings.broker,
        handle=Pipeline(desk).handle,
        handle_ending=desk.endings.handle,
        queues=[Queue.of_kind(kind) for kind in settings.worker.kinds],
        stop=desk.shutdown.event,
        stop_seconds=settings.worker.shutdown_grace_seconds,
        retry_delays=limits.retry_delays_seconds,
        ending_retry_delays=limits.ending_retry_delays_seconds,
        observer=observer,
        once_idle=once_idle,
        outbox=outbox,
    )
    condition.has_broker(consumer)
    sweep = RecordSweep(
        desk.state_s3,
        desk.state_bucket,
        lease_seconds=limits.lease_ttl_seconds,
        clear_up=functools.partial(clear_up, desk.state_s3, desk.state_bucket, kinds=desk.kinds),
        may_wait=lambda record: observer.queues.may_hold_messages(Queue.of_kind(record.kind)),
    )
    with Sweeper(
        sweep,
        consumer.publish,
        desk.kinds,
        desk.state_s3,
        desk.state_bucket,
        every_seconds=limits.lease_ttl_seconds,
        retention_days=limits.record_retention_days,
        observer=observer,
    ):
        consumer.run()


def _log_start(trainer: TrainerSettings, queue: str, machine: Machine, observer: Observer) -> None:
    observer.metrics.worker.info({"device": machine.device, "base_model": trainer.base_model})
    log.info(
        "worker_starting",
        device=machine.device,
        queue=queue,
        base_model=trainer.base_model,
        mixed_precision=trainer.mixed_precision if machine.cuda else "no",
    )
    if not machine.cuda and trainer.allow_cpu:
        log.warning("training_on_cpu", reason="no CUDA, and ALLOW_CPU=true: fp32 and slow")
    if reason := not_pinned(trainer.base_model, trainer.base_model_revision):
        log.warning("base_model_not_pinned", reason=reason)
