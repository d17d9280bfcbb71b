"""Is the worker alive, is it ready, what is it doing: the answers of the HTTP pages.

Everything here is read off what others have noted, so an answer takes no time and waits for nobody.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from config import Settings
from consumer.pages.observer import Observer
from consumer.trainer.machine import Machine
from consumer.trainer.trainer_process import TrainerProcess
from services.broker.connection import BrokerLoop
from utils.metrics import READINESS

CHILDLESS_SECONDS = 30.0
"""A trainer that died is replaced sooner than this; one that dies at every start is not."""
BROKER_SILENT_SECONDS = 5.0
"""The owner asks RabbitMQ for the queues' lengths more often; while nothing comes, it waits."""
S3_SILENT_SECONDS = 9.0
"""A look at S3 may hang where no time-out reaches, in the resolver for one."""
STUCK_SECONDS = 180.0
"""Longer than any wait of the connection's thread that ends by itself: for an answer, for a broker
that blocks its publishers, for a connection to each of ten hosts."""


class Condition:
    """A worker's condition; the parts are put in as they come to be.

    Args:
        settings: What the worker is to be.
        observer: What is known of its work.
        stop: Set once the worker shuts down.

    Attributes:
        machine: What the test of the GPU found; None until it is over.
        machine_problem: Why the machine cannot train any more.
        trainer: The trainer process.
        broker: The connection's life.
        stop: Set once the worker shuts down.
        state_problem: Why no job may be taken although S3 answers.
        remarks: What to know of a part that is ready, by the parts of `utils.metrics.READINESS`.
    """

    def __init__(self, settings: Settings, observer: Observer, stop: threading.Event) -> None:
        self.machine: Machine | None = None
        self.machine_problem: str | None = None
        self.trainer: TrainerProcess | None = None
        self.broker: BrokerLoop | None = None
        self.state_problem: str | None = None
        self.remarks: dict[str, str] = {}
        self._storage_problem: str | None = "not looked at yet"
        self._storage_seen_at = float("inf")
        self.stop = stop
        self._settings = settings
        self._observer = observer
        self._born_at = self._child_seen_at = time.monotonic()

    @property
    def is_training(self) -> bool:
        """Whether a job is in hand."""
        return self._observer.job is not None

    def saw_storage(self, problem: str | None) -> None:
        """S3 was looked at: why it cannot be used, or None."""
        self._storage_problem, self._storage_seen_at = problem, time.monotonic()

    def health(self) -> dict[str, Any]:
        """Whether the process should live on; its `problem` says why not.

        A broker that leaves a request without an answer is named under `broker`, and is no reason
        for a restart: the worker ends that connection by itself.
        """
        problem, silence = self._fatal_problem(), self._silence()
        health: dict[str, Any] = {
            "status": "unhealthy" if problem else "healthy",
            "cuda_available": bool(self.machine and self.machine.cuda),
            "is_training": self.is_training,
        }
        if silence and not self.stop.is_set():
            health["broker"] = silence
        return health | ({"problem": problem} if problem else {})

    def problems(self) -> dict[str, str]:
        """Why the worker is not ready, by the parts of `utils.metrics.READINESS`; empty: it is."""
        found = {
            "broker": self._broker_problem(),
            "s3": self._s3_problem(),
            "gpu": self._gpu_problem(),
            "base_model": self._base_model_problem(),
        }
        assert tuple(found) == READINESS
        return {part: problem for part, problem in found.items() if problem}

    def status(self) -> dict[str, Any]:
        """What the worker is and does."""
        job, machine = self._observer.job, self.machine
        queues = self._observer.queues
        oldest = queues.oldest_seconds
        return {
            "is_running": self._fatal_problem() is None and not self.stop.is_set(),
            "is_ready": not self.problems(),
            "is_training": job is not None,
            "uptime_seconds": round(time.monotonic() - self._born_at, 1),
            "gpu_count": machine.count if machine and machine.cuda else 0,
            "gpu_name": machine.device if machine and machine.cuda else None,
            "device": machine.device if machine else None,
            "base_model": self._settings.base_model,
            "base_model_loaded": bool(self.trainer and self.trainer.base_model_ready),
            "queue": {
                "name": self._settings.training_queue,
                "length": queues.length,
                "oldest_seconds_at_most": None if oldest is None else round(oldest, 1),
            },
            "job": job.facts() if job else None,
        }

    def numbers(self) -> dict[str, Any]:
        """The metrics for those who read no Prometheus: the job in hand, else the last one."""
        latest = self._observer.last
        facts = latest.facts if latest else {}
        trainer_bytes = latest.gpu_memory_allocated if latest else None
        return {
            "current_step": latest.done if latest else 0,
            "total_steps": latest.total if latest else 0,
            "current_epoch": facts.get("epoch", 0),
            "total_epochs": facts.get("total_epochs", 0),
            "last_loss": facts.get("loss"),
            "steps_per_second": latest.per_second if latest else None,
            "estimated_seconds": latest.seconds_left if latest and self.is_training else None,
            "is_training": self.is_training,
            "gpu_memory_allocated": (trainer_bytes or 0) if self.is_training else 0,
            "queue_length": self._observer.queues.length,
        }

    def show(self) -> None:
        """Bring the metrics of the condition up to date."""
        metrics, problems = self._observer.metrics, self.problems()
        metrics.ready.set(not problems)
        for part in READINESS:
            metrics.ready_check.labels(part).set(part not in problems)
        metrics.trainer_up.set(bool(self.trainer and self.trainer.pid))
        metrics.consuming.set(bool(self.broker and self.broker.consuming))
        if job := self._observer.job:
            job.show_lease()

    def _fatal_problem(self) -> str | None:
        if self.broker and not self.broker.turned_within(STUCK_SECONDS):
            return f"the connection's thread has not turned for {STUCK_SECONDS:.0f} seconds"
        now = time.monotonic()
        if self.trainer is None or self.trainer.pid or self.stop.is_set():
            self._child_seen_at = now
        if now - self._child_seen_at > CHILDLESS_SECONDS:
            return f"there has been no trainer process for {CHILDLESS_SECONDS:.0f} seconds"
        return None

    def _broker_problem(self) -> str | None:
        if self.stop.is_set():
            return "the worker shuts down"
        if self.broker is None:
            return "not connected yet"
        if not self.broker.connected:
            return "there is no connection to RabbitMQ"
        if silence := self._silence():
            return silence
        if not self.broker.consuming and not self.broker.busy:
            return "connected, but no consumer of the training queue"
        return None

    def _silence(self) -> str | None:
        """The broker has a request, and does not answer."""
        broker = self.broker
        if broker is None or not broker.connected or broker.turned_within(BROKER_SILENT_SECONDS):
            return None
        return f"RabbitMQ has not answered for {BROKER_SILENT_SECONDS:.0f} seconds"

    def _s3_problem(self) -> str | None:
        if time.monotonic() - self._storage_seen_at > S3_SILENT_SECONDS:
            return f"S3 has not answered for {S3_SILENT_SECONDS:.0f} seconds"
        return self._storage_problem or self.state_problem

    def _gpu_problem(self) -> str | None:
        if self._observer.gpus_lost:
            return "the driver does not answer any more (NVML)"
        return self.machine_problem or (None if self.machine else "not tested yet")

    def _base_model_problem(self) -> str | None:
        if self.trainer is None or not self.trainer.pid:
            return "there is no trainer process"
        return None if self.trainer.base_model_ready else "not loaded yet"
