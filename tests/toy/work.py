"""The work of the toy kind. It needs no GPU and no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from jobs.style import TrainerOptions
from tests.toy.kind import ToyRun
from utils.errors import StopReason
from utils.events import BaseModelReady, Event, Finished, Progress, Stage, Started

Tell = Callable[[Event | BaseModelReady], None]


class ToyWork:
    """Counts the letters of a text; its base is loaded in no time."""

    run_type = ToyRun

    def __init__(self, options: TrainerOptions) -> None:
        self.is_usable = True
        self._options = options

    @property
    def on_gpu(self) -> bool:
        """Never."""
        return False

    def load(self, tell: Tell) -> None:
        """Nothing takes time."""
        tell(BaseModelReady(True))

    def release(self, tell: Tell) -> None:
        """Nothing is held."""
        tell(BaseModelReady(False))

    def run(
        self, run: ToyRun, tell: Tell, should_stop: Callable[[], StopReason | None]
    ) -> Finished:
        """Count."""
        text = Path(run.path).read_text(encoding="utf-8")
        tell(Started(run.task_id, 0, len(text), "letter"))
        for done in range(len(text)):
            if reason := should_stop():
                return Finished(run.task_id, "", (), done, 0.0, stopped=reason)
            tell(Progress(run.task_id, Stage.TRAINING, done + 1, len(text), "letter"))
        output = Path(run.folder) / "output"
        output.mkdir()
        (output / "letters.json").write_text(json.dumps({"letters": len(text)}))
        return Finished(run.task_id, str(output), ("letters.json",), len(text), 0.1)
