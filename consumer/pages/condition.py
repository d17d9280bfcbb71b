"""The answers of the HTTP pages: whether the worker is alive and ready, and its current work.

All facts are reported by other parts beforehand, so an answer takes no time and waits for nothing.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from consumer.pages.http_pages import numbers_of
from consumer.pages.observer import Observer
from consumer.trainer.machine import Machine
from consumer.trainer.trainer_process import TrainerProcess
from jobs.kinds import JobKind
from services.broker.connection import BrokerLoop
from utils.metrics import READINESS

CHILDLESS_SECONDS = 30.0
"""A trainer that died once is replaced sooner; one that dies at every start is not."""
BROKER_SILENT_SECONDS = 5.0
"""The connection's thread asks RabbitMQ for the queues' lengths more often than this."""
S3_SILENT_SECONDS = 9.0
"""A request to S3 may hang beyond its time-out, for example in the name resolver."""
STUCK_SECONDS = 180.0
"""Longer than any wait of the connection's thread that ends on its own: for an answer, for a broker
that blocks its publishers, for a connection to each of ten hosts."""


class Condition:
    """A worker's condition; its parts report themselves as the worker starts.

    Args:
        observer: The facts about its work.
        stop: Set once the worker shuts down.
        first_kind: The kind of job that the worker serves first; its numbers are shown before there
            is a job.
        base_model: The base model's name, for `/status`.
        queue: The training queue's name, for `/status`.
    """

    def __init__(
        self,
        observer: Observer,
        stop: threading.Event,
        *,
        first_kind: JobKind,
        base_model: str,
        queue: str,
    ) -> None:
        self._machine: Machine | None = None
        self._machine_problem: str | None = None
        self._trainer: TrainerProcess | None = None
        self._broker: BrokerLoop | None = None
        self._state_problem: str | None = None
        self._remarks: dict[str, str] = {}
        self._storage_problem: str | None = "not tested yet"
        self._storage_seen_at = float("inf")
        self._stop = stop
        self._first_kind = first_kind
        self._base_model = base_model
        self._queue = queue
        self._observer = observer
        self._born_at = self._child_seen_at = time.monotonic()

    @property
    def is_training(self) -> bool:
        """Whether the worker holds a job."""
        return self._observer.job is not None

    def machine_tested(self, machine: Machine) -> None:
        """The test of the GPU is over, and the machine can train."""
        self._machine = machine

    def machine_failed(self, problem: str) -> None:
        """The machine cannot train any more."""
        self._machine_problem = problem

    def has_trainer(self, trainer: TrainerProcess) -> None:
        """The trainer process exists."""
        self._trainer = trainer

    def has_broker(self, broker: BrokerLoop) -> None:
        """The connection to RabbitMQ exists."""
        self._broker = broker

    def storage_tested(self, problem: str | None) -> None:
        """S3 was tested.

        Args:
            problem: Why S3 cannot be used, or None.
        """
        self._storage_problem, self._storage_seen_at = problem, time.monotonic()

    def state_tested(self, problem: str | None, remark: str = "") -> None:
        """The state bucket was tested for conditional writes.

        Args:
            problem: Why no job may be taken although S3 answers, or None.
            remark: A sentence for `/ready` about a bucket that may be used.
        """
        self._state_problem = problem
        if remark:
            self._remarks["s3"] = remark

    def revive_trainer(self) -> None:
        """Replace a trainer that died while idle; during a job, the job's run replaces it."""
        if self._trainer and not self.is_training:
            self._trainer.revive()

    def health(self) -> dict[str, Any]:
        """Whether the process should go on; `problem` is the reason if not.

        A broker that does not answer is named under `broker`. It is no reason for a restart: the
        worker ends that connection.
        """
        problem, silence = self._fatal_problem(), self._silence()
        health: dict[str, Any] = {
            "status": "unhealthy" if problem else "healthy",
            "cuda_available": bool(self._machine and self._machine.cuda),
            "is_training": self.is_training,
        }
        if silence and not self._stop.is_set():
            health["broker"] = silence
        return health | ({"problem": problem} if problem else {})

    def problems(self) -> dict[str, str]:
        """Why the worker is not ready, by the parts of `READINESS`; empty if it is ready."""
        found = {
            "broker": self._broker_problem(),
            "s3": self._s3_problem(),
            "gpu": self._gpu_problem(),
            "base_model": self._base_model_problem(),
        }
        assert tuple(found) == READINESS
        return {part: problem for part, problem in found.items() if problem}

    def ready(self) -> dict[str, Any]:
        """Whether the worker can take a job, and the result for each part of `READINESS`."""
        problems = self.problems()
        checks = {part: problems.get(part) or self._remarks.get(part, "ok") for part in READINESS}
        return {"ready": not problems, "checks": checks}

    def status(self) -> dict[str, Any]:
        """Facts about the worker and its current job."""
        job, machine = self._observer.job, self._machine
        queues = self._observer.queues
        oldest = queues.oldest_seconds
        return {
            "is_running": self._fatal_problem() is None and not self._stop.is_set(),
            "is_ready": not self.problems(),
            "is_training": job is not None,
            "uptime_seconds": round(time.monotonic() - self._born_at, 1),
            "gpu_count": machine.count if machine and machine.cuda else 0,
            "gpu_name": machine.device if machine and machine.cuda else None,
            "device": machine.device if machine else None,
            "gpu_compute_capability": (machine.capability or None) if machine else None,
            "base_model": self._base_model,
            "base_model_loaded": bool(self._trainer and self._trainer.base_model_ready),
            "queue": {
                "name": self._queue,
                "length": queues.length,
                "oldest_seconds_at_most": None if oldest is None else round(oldest, 1),
            },
            "job": job.facts() if job else None,
        }

    def numbers(self) -> dict[str, Any]:
        """The metrics as JSON: those of the current job, otherwise of the last one."""
        observer = self._observer
        kind = observer.last_kind or self._first_kind
        numbers = numbers_of(kind, observer.last, self.is_training)
        return numbers | {"queue_length": observer.queues.length}

    def show(self) -> None:
        """Update the metrics of the condition."""
        metrics, problems = self._observer.metrics, self.problems()
        metrics.ready.set(not problems)
        for part in READINESS:
            metrics.ready_check.labels(part).set(part not in problems)
        metrics.trainer_up.set(bool(self._trainer and self._trainer.pid))
        metrics.consuming.set(bool(self._broker and self._broker.consuming))
        if job := self._observer.job:
            job.show_lease()

    def _fatal_problem(self) -> str | None:
        if self._broker and not self._broker.turned_within(STUCK_SECONDS):
            return f"the connection's thread has not turned for {STUCK_SECONDS:.0f} seconds"
        now = time.monotonic()
        if self._trainer is None or self._trainer.pid or self._stop.is_set():
            self._child_seen_at = now
        if now - self._child_seen_at > CHILDLESS_SECONDS:
            return f"there has been no trainer process for {CHILDLESS_SECONDS:.0f} seconds"
        return None

    def _broker_problem(self) -> str | None:
        if self._stop.is_set():
            return "the worker shuts down"
        if self._broker is None:
            return "not connected yet"
        if not self._broker.connected:
            return "there is no connection to RabbitMQ"
        if silence := self._silence():
            return silence
        if not self._broker.consuming and not self._broker.busy:
            return "connected, but no consumer of the training queue"
        return None

    def _silence(self) -> str | None:
        """The sentence about a broker that does not answer a request, or None."""
        broker = self._broker
        if broker is None or not broker.connected or broker.turned_within(BROKER_SILENT_SECONDS):
            return None
        return f"RabbitMQ has not answered for {BROKER_SILENT_SECONDS:.0f} seconds"

    def _s3_problem(self) -> str | None:
        if time.monotonic() - self._storage_seen_at > S3_SILENT_SECONDS:
            return f"S3 has not answered for {S3_SILENT_SECONDS:.0f} seconds"
        return self._storage_problem or self._state_problem

    def _gpu_problem(self) -> str | None:
        if self._observer.gpus_lost:
            return "the driver does not answer any more (NVML)"
        return self._machine_problem or (None if self._machine else "not tested yet")

    def _base_model_problem(self) -> str | None:
        if self._trainer is None or not self._trainer.pid:
            return "there is no trainer process"
        return None if self._trainer.base_model_ready else "not loaded yet"
