"""The work of the toy kind. It needs no GPU and no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from jobs.checkpoint_name import folder_name
from jobs.kinds import TrainerOptions
from tests.toy.kind import ToyRun
from utils.errors import StopReason
from utils.events import (
    BaseModelReady,
    CheckpointSaved,
    Event,
    Finished,
    Progress,
    Stage,
    Started,
)
from utils.manifest import write_folder

Tell = Callable[[Event | BaseModelReady], None]
CHECKPOINT_LETTERS = 4
_COUNT = "count.json"


class ToyWork:
    """Counts the letters of a text, and makes a checkpoint after every few letters."""

    run_type = ToyRun
    has_base = False
    shares_runs = False
    on_gpu = False

    def __init__(self, options: TrainerOptions) -> None:
        self.is_usable = True
        self._options = options

    def load(self, tell: Tell) -> None:
        """There is nothing to load."""
        tell(BaseModelReady(True))

    def release(self, tell: Tell) -> None:
        """There is nothing to release."""
        tell(BaseModelReady(False))

    def run(
        self, run: ToyRun, tell: Tell, should_stop: Callable[[], StopReason | None]
    ) -> Finished:
        """Count."""
        total = len(Path(run.path).read_text(encoding="utf-8"))
        begun = _counted(Path(run.resume_from)) if run.resume_from else 0
        tell(Started(run.task_id, begun, total, "letter"))
        for done in range(begun, total):
            if reason := should_stop():
                return Finished(run.task_id, "", (), done, 0.0, stopped=reason)
            time.sleep(run.pause_seconds)
            facts = {"counted": done + 1}
            tell(Progress(run.task_id, Stage.TRAINING, done + 1, total, "letter", facts=facts))
            if (done + 1) % CHECKPOINT_LETTERS == 0:
                tell(_saved(run, done + 1))
        output = Path(run.folder) / "output"
        output.mkdir()
        (output / "letters.json").write_text(json.dumps({"letters": total}))
        return Finished(run.task_id, str(output), ("letters.json",), total, 0.1)


def _saved(run: ToyRun, done: int) -> CheckpointSaved:
    name = folder_name(0, done, inside_epoch=True)
    folder = Path(run.folder) / "checkpoints" / name
    write_folder(folder, {_COUNT: json.dumps(done).encode()}, {"claim": run.claim})
    return CheckpointSaved(run.task_id, name, 0, done, str(folder), 0.0)


def _counted(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / _COUNT).read_text()))
