"""A trainer process without torch: the same pipe, the same events, the same files, no model.

It "trains" by sleeping, and notes every epoch in the journal, so that repeated work is counted.
Each file contains the name of its job. Special values of the parameter `seed` mark jobs that are
destined to fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import IO, Any

from jobs.kinds import Run
from jobs.layout import STYLE_FILES
from jobs.llm import LlmRun
from jobs.style import TrainingRun
from tests.chaos import full_disk
from tests.chaos.fates import SEEDS
from tests.chaos.journal import Journal
from tests.chaos.reference import Destiny
from tests.chaos.timing import CHECKPOINT_INTERVAL, LLM_FILES
from training.runtime.inbox import Inbox
from utils import manifest
from utils.errors import (
    BaseModelUnavailable,
    CheckpointUnusable,
    DiskFull,
    LowQualityData,
    StopReason,
    TrainingDiverged,
    TrainingServerError,
)
from utils.events import (
    BaseModelReady,
    CheckpointSaved,
    Event,
    Failed,
    Finished,
    Progress,
    Stage,
    Started,
    encode,
    from_dict,
)

STEPS_PER_EPOCH = 4
_LANGUAGE = "training.language"
"""Module of the runners of language models."""

_PROGRESS_SECONDS = 0.25
_DIVERGES_AT = 5
"""Epochs, when there are checkpoints already."""
_FATES = {seed: destiny for destiny, seed in SEEDS.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class StandInRun:
    """The parts of a run, of either kind, that the stand-in uses."""

    task_id: str
    claim: int
    epochs: int
    seed: int
    rank: int
    checkpoint_interval: int
    work_folder: str
    resume_from: str | None
    files: tuple[str, ...]
    images: int
    owner: dict[str, Any]

    @classmethod
    def of(cls, run: Run) -> StandInRun:
        """The run of a style, or of a language model."""
        if run.runner.startswith(_LANGUAGE):
            language = from_dict(LlmRun, run.order)
            return cls(
                *(language.task_id, language.claim, int(language.parameters.epochs)),
                seed=language.parameters.seed,
                rank=language.parameters.rank,
                checkpoint_interval=CHECKPOINT_INTERVAL,
                work_folder=language.work_folder,
                resume_from=language.resume_from,
                files=LLM_FILES,
                images=0,
                owner={"subject": language.subject},
            )
        style = from_dict(TrainingRun, run.order)
        return cls(
            *(style.task_id, style.claim, style.parameters.epochs),
            seed=style.parameters.seed or 0,
            rank=style.parameters.rank,
            checkpoint_interval=style.checkpoint_interval,
            work_folder=style.work_folder,
            resume_from=style.resume_from,
            files=STYLE_FILES,
            images=sum(image.path is not None for image in style.images),
            owner={"style_id": style.style_id},
        )


class StandIn:
    """Serves runs.

    Args:
        inbox: Brings them.
        events: Takes the events.
        journal: Notes each epoch.
        epoch_seconds: How long one takes.
        disk_full: While this file exists, the disk is full.
        repaired: Folder of files named after tasks that are no longer destined to fail.
    """

    def __init__(
        self,
        inbox: Inbox,
        events: IO[bytes],
        journal: Journal,
        *,
        epoch_seconds: float,
        disk_full: Path,
        repaired: Path,
    ) -> None:
        self._repaired = repaired
        self._inbox, self._events, self._journal = inbox, events, journal
        self._epoch_seconds = epoch_seconds
        self._disk_full = disk_full

    def serve(self) -> None:
        """Do runs until the process ends with its pipe."""
        self._tell(BaseModelReady(True))
        while True:
            run = self._inbox.take()
            try:
                ending: Finished | Failed = self._train(StandInRun.of(run))
            except TrainingServerError as error:
                ending = Failed(run.task_id, type(error).__name__, str(error))
            except OSError as error:
                ending = Failed(run.task_id, DiskFull.__name__, f"disk: {error.strerror}")
            self._inbox.lay_down()
            self._tell(ending)

    def _train(self, run: StandInRun) -> Finished:
        began = time.monotonic()
        fate = self._fate(run)
        epochs = run.epochs
        total = epochs * STEPS_PER_EPOCH
        self._tell(Progress(run.task_id, Stage.PREPARING, 0, 0, facts=_facts(0, epochs)))
        step = first = _resumed_step(run)
        self._note(run, "run", resumed_epoch=first // STEPS_PER_EPOCH)
        facts = _facts(step // STEPS_PER_EPOCH, epochs) | {"images_used": run.images}
        self._tell(Started(run.task_id, step, total, facts=facts))
        told = 0.0
        stopped: StopReason | None = None
        while step < total:
            if stopped := self._inbox.stop_reason():
                if step > first and step % (STEPS_PER_EPOCH * run.checkpoint_interval):
                    self._save(run, step)
                break
            time.sleep(self._epoch_seconds / STEPS_PER_EPOCH)
            step += 1
            epoch, inside = divmod(step, STEPS_PER_EPOCH)
            if not inside:
                self._note(run, "epoch", epoch=epoch)
                if fate is Destiny.DIVERGES and epoch >= _DIVERGES_AT:
                    raise TrainingDiverged("the loss is no number any more")
                if epoch % run.checkpoint_interval == 0 or epoch == epochs:
                    self._save(run, step)
            if time.monotonic() - told > _PROGRESS_SECONDS or step == total:
                told = time.monotonic()
                self._tell(self._progress(run, Stage.TRAINING, step))
        return self._finished(run, step, stopped, time.monotonic() - began)

    def _fate(self, run: StandInRun) -> Destiny | None:
        """The job's destiny.

        Raises:
            TrainingServerError: The job is destined to fail before its first epoch.
        """
        fate = _FATES.get(run.seed)
        if fate is None or (self._repaired / run.task_id).exists():
            return None
        if fate is Destiny.LOW_QUALITY:
            raise LowQualityData("0 of 2 images can be used")
        if fate in (Destiny.GIVEN_UP, Destiny.GIVEN_UP_REDRIVEN):
            raise BaseModelUnavailable("the base model could not be loaded")
        return fate

    def _finished(
        self, run: StandInRun, step: int, stopped: StopReason | None, seconds: float
    ) -> Finished:
        folder = ""
        if stopped is None:
            self._tell(self._progress(run, Stage.EXPORTING, step))
            folder = str(self._export(run))
        self._note(run, "run_over", epoch=step // STEPS_PER_EPOCH, stopped=stopped)
        return Finished(
            task_id=run.task_id,
            folder=folder,
            files=run.files if folder else (),
            done=step,
            seconds=seconds,
            stopped=stopped,
            facts={"epoch": step // STEPS_PER_EPOCH, "loss": 0.1},
            summary={"hyperparameters": {"rank": run.rank}},
        )

    def _export(self, run: StandInRun) -> Path:
        folder = Path(run.work_folder) / "output"
        folder.mkdir(parents=True)
        for name in run.files:
            self._refuse_if_full()
            (folder / name).write_bytes(content_of(name, run.task_id, run.claim))
        return folder

    def _save(self, run: StandInRun, step: int) -> None:
        self._refuse_if_full()
        began = time.monotonic()
        epoch, inside = divmod(step, STEPS_PER_EPOCH)
        name = f"epoch-{epoch:04d}" + (f"-step-{step:04d}" if inside else "")
        folder = Path(run.work_folder) / "checkpoints" / name
        facts = {
            "task_id": run.task_id,
            **run.owner,
            "claim": run.claim,
            "epoch": epoch,
            "step": step,
        }
        # Like the real one: some files are the same for every claim, some name the claim.
        files = {
            "lora.safetensors": f"lora {run.task_id} {step}".encode() * 50,
            "optimizer.safetensors": f"optimizer {run.task_id} {step}".encode() * 100,
            "random.safetensors": f"random {run.task_id} {step}".encode(),
            "state.json": json.dumps(facts).encode(),
        }
        manifest.write_folder(folder, files, facts)
        self._note(run, "checkpoint", name=name, epoch=epoch, step=step)
        seconds = time.monotonic() - began
        self._tell(CheckpointSaved(run.task_id, name, epoch, step, str(folder), seconds))

    def _refuse_if_full(self) -> None:
        if self._disk_full.exists():
            self._journal.note("disk_full")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _progress(self, run: StandInRun, stage: Stage, step: int) -> Progress:
        epochs = run.epochs
        return Progress(
            task_id=run.task_id,
            stage=stage,
            done=step,
            total=epochs * STEPS_PER_EPOCH,
            per_second=STEPS_PER_EPOCH / self._epoch_seconds,
            facts=_facts(step // STEPS_PER_EPOCH, epochs) | {"loss": 0.1},
        )

    def _note(self, run: StandInRun, kind: str, **facts: Any) -> None:
        self._journal.note(kind, task=run.task_id, claim=run.claim, **facts)

    def _tell(self, event: Event | BaseModelReady) -> None:
        line = memoryview(encode(event))
        try:
            while line:
                line = line[self._events.write(line) :]
        except OSError:
            os._exit(0)


def content_of(name: str, task_id: str, claim: int) -> bytes:
    """The content of the file of this name in the output of this run."""
    return f"{name} of {task_id}, claim {claim}\n".encode() * 20


def digest_of(name: str, task_id: str, claim: int) -> str:
    """SHA-256 of `content_of`, in hexadecimal."""
    return hashlib.sha256(content_of(name, task_id, claim)).hexdigest()


def _facts(epoch: int, epochs: int) -> dict[str, Any]:
    return {"epoch": epoch, "total_epochs": epochs}


def _resumed_step(run: StandInRun) -> int:
    """The epoch of the run's checkpoint; 0 without one.

    Raises:
        CheckpointUnusable: It is damaged, or another job's.
    """
    if run.resume_from is None:
        return 0
    facts = manifest.verify(Path(run.resume_from))
    if facts["task_id"] != run.task_id:
        raise CheckpointUnusable(f"it belongs to {facts['task_id']}, this is {run.task_id}")
    return int(facts["step"])


def main() -> None:
    """Serve runs until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.stand_in_trainer")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--who", required=True)
    parser.add_argument("--epoch-seconds", type=float, required=True)
    parser.add_argument("--disk-full", type=Path, required=True)
    parser.add_argument("--runs-fd", type=int, required=True)
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("options")
    parsed = parser.parse_args()
    full_disk.cut_writes(
        parsed.disk_full.with_name(parsed.disk_full.name + "-mid-write"),
        lambda name: Journal(parsed.journal, parsed.who).note("write_cut", name=name),
    )
    inbox = Inbox(os.fdopen(parsed.runs_fd, "rb", buffering=0))
    inbox.start()
    StandIn(
        inbox,
        os.fdopen(parsed.events_fd, "wb", buffering=0),
        Journal(parsed.journal, parsed.who),
        epoch_seconds=parsed.epoch_seconds,
        disk_full=parsed.disk_full,
        repaired=parsed.journal.with_name("repaired"),
    ).serve()


if __name__ == "__main__":
    main()
