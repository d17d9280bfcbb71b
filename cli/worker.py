"""`main.py worker`: takes training jobs until a signal stops it."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import config
from cli.program import guarded, on_stop_signals
from consumer.life.stop_signal import Shutdown
from consumer.worker import LAST_WORDS_SECONDS, run_worker
from services.telemetry.error_reports import reported
from utils import logger

log = logger.get_logger("main")


def run(config_file: Path | None, once_idle: float | None) -> None:
    """Run the worker, and end the process with its exit code.

    Args:
        config_file: A file with more settings.
        once_idle: End after one training message, or after this many seconds without one.
    """
    with contextlib.ExitStack() as lasting:  # the last error is logged after the run
        code = guarded(lambda: _run(config_file, once_idle, lasting), report=log)
    # A thread that hangs in the network must not delay the exit: everything is settled by now.
    logging.shutdown()
    os._exit(code)


def _run(config_file: Path | None, once_idle: float | None, lasting: contextlib.ExitStack) -> int:
    settings = config.load(file=config_file)
    logger.configure(
        level=settings.log.log_level, log_format=settings.log.log_format, secrets=settings.secrets()
    )
    if unknown := config.unknown_names(config_file):
        log.warning("settings_unknown", reason=unknown)
    shutdown = Shutdown(settings.worker.shutdown_grace_seconds)
    on_stop_signals(shutdown.request)
    dsn = settings.telemetry.sentry_dsn
    lasting.enter_context(
        reported(
            dsn.get_secret_value() if dsn else None,
            environment=settings.telemetry.sentry_environment,
            labels=settings.kinds().labels,
            secrets=settings.secrets(),
            flush_seconds=LAST_WORDS_SECONDS,
        )
    )
    run_worker(settings, shutdown, once_idle=once_idle)
    return 0
