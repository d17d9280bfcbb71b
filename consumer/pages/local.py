"""The HTTP pages of a local training: the same pages as the worker's, without queue and S3."""

from __future__ import annotations

import threading
import time
from typing import Any

from consumer.pages.http_pages import HttpPages, numbers_of
from consumer.trainer.machine import Machine
from jobs.kinds import JobKind
from utils.events import Event, Progress
from utils.metrics import Metrics


class LocalCondition:
    """The condition of a local training. Safe to share between threads.

    Args:
        kind: The kind of the training.
        machine: The result of the machine's test.
        base_model: Name or folder of the base model.
        metrics: Receives the progress.
    """

    def __init__(self, kind: JobKind, machine: Machine, base_model: str, metrics: Metrics) -> None:
        self._kind = kind
        self._machine = machine
        self._base_model = base_model
        self._metrics = metrics
        self._latest: Progress | None = None
        self._born_at = time.monotonic()
        self._over = threading.Event()

    def saw(self, event: Event) -> None:
        """Take the newest event of the trainer."""
        if isinstance(event, Progress):
            self._latest = event
            if event.total:
                self._metrics.job_progress_ratio.set(event.done / event.total)
            if event.per_second is not None:
                self._metrics.steps_per_second.set(event.per_second)
            if event.gpu_memory_allocated is not None:
                self._metrics.trainer_gpu_memory_allocated_bytes.set(event.gpu_memory_allocated)

    def health(self) -> dict[str, Any]:
        """The process lives as long as it trains."""
        return {
            "status": "healthy",
            "cuda_available": self._machine.cuda,
            "is_training": True,
        }

    def ready(self) -> dict[str, Any]:
        """A local training takes no jobs."""
        return {"ready": False, "checks": {"worker": "a local training takes no jobs"}}

    def status(self) -> dict[str, Any]:
        """Facts about the machine and the training."""
        machine, latest = self._machine, self._latest
        return {
            "is_running": True,
            "is_training": True,
            "uptime_seconds": round(time.monotonic() - self._born_at, 1),
            "gpu_count": machine.count if machine.cuda else 0,
            "gpu_name": machine.device if machine.cuda else None,
            "gpu_compute_capability": machine.capability or None,
            "device": machine.device,
            "base_model": self._base_model,
            "stage": str(latest.stage) if latest else None,
        }

    def numbers(self) -> dict[str, Any]:
        """The metrics as JSON."""
        return numbers_of(self._kind, self._latest, True)

    def show(self) -> None:
        """All metrics are up to date."""


def local_pages(
    host: str, port: int, kind: JobKind, machine: Machine, base_model: str
) -> tuple[HttpPages, LocalCondition]:
    """The pages of a local training, to be entered as a context, and their contents.

    Args:
        host: `HTTP_HOST`.
        port: `HTTP_PORT`.
        kind: The kind of the training.
        machine: The result of the machine's test.
        base_model: Name or folder of the base model.

    Raises:
        ConfigurationError: The port is in use or may not be used.
    """
    metrics = Metrics()
    metrics.declare(kind.counters, kind.gauges)
    condition = LocalCondition(kind, machine, base_model, metrics)
    return HttpPages(host, port, condition, metrics), condition
