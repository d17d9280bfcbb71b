"""The work of the language-model kind, with a fault that the name of the task asks for.

`{fault}-{rank}`: the fault happens in the process of this rank, in the third step.
"""

# pylint: disable=protected-access
from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from jobs.kinds import TrainerOptions
from jobs.llm import LlmRun
from training.language import trainer
from training.language.work import LanguageWork
from utils.errors import DiskFull, StopReason, TrainingFailed
from utils.events import Finished

FAULTY_STEP = 2


class AwkwardWork(LanguageWork):
    """Does runs, some with a fault."""

    def __init__(self, options: TrainerOptions) -> None:
        super().__init__(options)
        self._rank = options.rank

    def run(
        self, run: LlmRun, tell: Callable[[Any], None], should_stop: Callable[[], StopReason | None]
    ) -> Finished:
        """Do one run."""
        fault, _, rank = run.task_id.rpartition("-")
        usual = trainer.Trainer._pass
        if rank == str(self._rank):
            trainer.Trainer._pass = _faulty(fault)  # type: ignore[method-assign]
        try:
            return super().run(run, tell, should_stop)
        finally:
            trainer.Trainer._pass = usual  # type: ignore[method-assign]


def _faulty(fault: str) -> Callable[..., torch.Tensor]:
    usual = trainer.Trainer._pass

    def passing(self: Any, start: int, rows: Any, tokens: int) -> torch.Tensor:
        if self.state.step == FAULTY_STEP:
            _happen(fault, self, len(rows))
        return usual(self, start, rows, tokens)

    return passing


def _happen(fault: str, training: Any, rows: int) -> None:
    match fault:
        case "memory" if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        case "error":
            raise DiskFull("The worker's disk is full.")
        case "death":
            os.kill(os.getpid(), signal.SIGKILL)
        case "drift":
            with torch.no_grad():
                next(iter(training.weights.values())).add_(1e-7)
        case "shares":
            model = training._model.get_base_model()
            base = [w for w in model.parameters() if not w.requires_grad]
            held = sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in base)
            raise TrainingFailed(f"Of {sum(w.numel() for w in base)} weights {held} are here.")
        case "slow":
            time.sleep(3.0)
