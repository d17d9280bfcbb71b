"""The trainer process's work: run after run on a warm base; what goes wrong becomes a fact."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import diffusers
import jinja2
import transformers

from jobs.lora_config import TrainerOptions, TrainingRun
from reports import html_report
from training.runtime.device import gpu_error, out_of_memory
from training.runtime.inbox import Inbox
from training.style import held_out, recovery
from training.style.dataset import Dataset
from training.style.families.sd15 import BaseModel
from training.style.results import export, preview, report
from training.style.results.examiner import prompts_of, sample_steps
from training.style.results.model_card import model_card
from training.style.results.result import TrainingResult
from utils.errors import (
    REPORTABLE,
    DiskFull,
    GpuBroken,
    MachineError,
    Stopped,
    TrainingFailed,
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
    encode,
)
from utils.gpu_monitor import GpuMonitor

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Output:
    """What a run leaves behind, as `Finished` tells it; of a stopped run nothing."""

    folder: str = ""
    files: tuple[str, ...] = ()
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)


def _unbound(**_: Any) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


class Child:
    """Serves runs on one base model.

    Args:
        options: What the process was told when it started.
        inbox: Where runs and stops come from.
        events: Where facts go.
        bound: Binds names to every log line until its block ends. (Not imported here: a machine
            that only trains has no such logger.)
    """

    def __init__(
        self,
        options: TrainerOptions,
        inbox: Inbox,
        events: IO[bytes],
        *,
        bound: Callable[..., AbstractContextManager[None]] = _unbound,
    ) -> None:
        self._bound = bound
        self._options, self._inbox, self._events = options, inbox, events
        self._base: BaseModel | None = None
        self._monitor = GpuMonitor()
        self._telling = threading.Lock()
        _quieten_libraries()

    def serve(self) -> None:
        """Load the base model, then do runs until the process ends with its pipe."""
        if not self._inbox.has_run():
            try:
                self._loaded_base()
            except TrainingServerError as error:
                # No run to blame it on yet: the next one tries again, and reports it if it fails
                # again.
                log.error("base_model_not_loaded", extra=_reason(error))
        while True:
            run = self._inbox.take()
            with self._bound(task_id=run.task_id, style_id=run.style_id):
                log.info("run_taken", extra={"claim": run.claim})
                ending = self._do(run)
            self._inbox.lay_down()
            self._tell(ending)

    def _do(self, run: TrainingRun) -> Finished | Failed:
        """One run: it always has an ending, and leaves the base model bare."""
        began = time.monotonic()
        ending: Finished | Failed
        try:
            ending = self._train(run, self._loaded_base(), began)
        except Stopped as stop:  # before the first step: there is nothing to save
            ending = Finished(run.task_id, "", (), 0, time.monotonic() - began, stopped=stop.reason)
        except TrainingServerError as error:
            # Raised on purpose, its sentence says it all; the desk repeats it at its own level.
            log.info("run_not_possible", extra=_reason(error))
            ending = failed(run, error)
        except Exception as error:  # pylint: disable=broad-exception-caught
            # Not swallowed: the desk is told, by name.
            log.error("run_failed", exc_info=error)
            ending = failed(run, error)
        return self._laid_bare(run, ending)

    def _loaded_base(self) -> BaseModel:
        if self._base is None:
            began = time.monotonic()
            self._base = BaseModel.load(self._options)
            self._tell(BaseModelReady(True, time.monotonic() - began))
        return self._base

    def _give_up_base(self) -> None:
        """The next run loads it anew."""
        self._base = None
        self._tell(BaseModelReady(False))

    def _train(self, run: TrainingRun, base: BaseModel, began: float) -> Finished:
        """The run from its images to its files."""
        epochs = run.parameters.epochs
        at_the_beginning = {"epoch": 0, "total_epochs": epochs}
        preparing = Progress(run.task_id, Stage.PREPARING, 0, 0, facts=at_the_beginning)
        self._tell(preparing)
        data = held_out.prepare(
            run,
            base,
            should_stop=self._inbox.stop_reason,
            on_image=lambda: self._tell(preparing),
        )
        result = recovery.train(
            run, base, data, emit=self._tell, should_stop=self._inbox.stop_reason
        )
        output = _Output()
        facts = {"epoch": result.epochs, "loss": result.loss}
        if result.stopped is None:
            self._tell(
                Progress(
                    run.task_id,
                    Stage.EXPORTING,
                    result.steps,
                    result.steps,
                    per_second=result.steps_per_second,
                    facts=facts | {"total_epochs": epochs},
                )
            )
            output = self._write_output(run, base, data, result)
        return Finished(
            task_id=run.task_id,
            folder=output.folder,
            files=output.files,
            done=result.steps,
            seconds=time.monotonic() - began,
            stopped=result.stopped,
            facts=facts,
            summary=output.summary,
        )

    def _write_output(
        self, run: TrainingRun, base: BaseModel, data: Dataset, result: TrainingResult
    ) -> _Output:
        """Export the LoRA, paint its samples, write the report."""
        folder = Path(run.work_folder) / "output"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        card = model_card(run, base, data, result)
        export.export(base, result.parameters, folder, metadata=card)
        result = _with_previews(run, base, data, result, folder)
        content = report.build_report(run, base, data, result)
        report.write_report(content, folder)
        _write_html(content, run, data, result, folder)
        files = tuple(name for name in report.FILES if (folder / name).is_file())
        return _Output(str(folder), files, report.summary(content))

    def _laid_bare(self, run: TrainingRun, ending: Finished | Failed) -> Finished | Failed:
        """Take the LoRA off; a base that is not what it was then makes this process unusable."""
        if self._base is None:
            return ending
        try:
            self._base.detach()
        except Exception as error:  # pylint: disable=broad-exception-caught
            # Not swallowed: the desk is told, by name.
            log.error("detach_failed", exc_info=error)
            if isinstance(ending, Finished):
                if out_of_memory(error):  # the model is made; the base is loaded anew
                    self._give_up_base()
                    return ending
                ending = failed(run, error)
            return dataclasses.replace(ending, trainer_usable=False)
        if self._base.drifted:
            # Only a Failed can say so; after a Finished the next load starts from nothing.
            if isinstance(ending, Failed):
                return dataclasses.replace(ending, trainer_usable=False)
            self._give_up_base()
        return ending

    def _tell(self, event: Event | BaseModelReady) -> None:
        """Write one fact. Without a reader there is nothing left to do: the process ends."""
        line = memoryview(encode(event))
        with self._telling:
            try:
                while line:
                    line = line[self._events.write(line) :]
            except OSError:
                os._exit(0)
        # Every minute the desk looks; where there is no GPU, it has said so.
        if isinstance(event, CheckpointSaved) and self._base and self._base.device.type == "cuda":
            self._monitor.log_now()


def _reason(error: TrainingServerError) -> dict[str, str]:
    """What a log line says of an error that was raised on purpose: its sentence, and its cause."""
    cause = error.__cause__
    return {"reason": str(error)} | ({"cause": repr(cause)[:500]} if cause else {})


def failed(run: TrainingRun, error: BaseException) -> Failed:
    """An exception as a fact: a reportable name, and a sentence without places on this disk."""
    known = _known(error)
    name = next(
        (cls.__name__ for cls in type(known).__mro__ if REPORTABLE.get(cls.__name__) is cls),
        TrainingFailed.__name__,
    )
    # A broken CUDA context lives as long as its process.
    usable = not isinstance(known, MachineError) or isinstance(known, DiskFull)
    return Failed(run.task_id, name, _without_paths(str(known)), trainer_usable=usable)


def _known(error: BaseException) -> TrainingServerError:
    if isinstance(error, TrainingServerError):
        return error
    if known := gpu_error(error):
        return known
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull("The worker's disk is full.")
    first_line = (str(error).splitlines() or [""])[0]
    return TrainingFailed(
        f"Training broke off unexpectedly ({type(error).__name__}: {first_line[:200]})."
    )


def _without_paths(message: str) -> str:
    """The message with only the last part of every absolute path; addresses stay."""
    return re.sub(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+([^\s/'\"]*)", r"\1", message)


def _with_previews(
    run: TrainingRun, base: BaseModel, data: Dataset, result: TrainingResult, folder: Path
) -> TrainingResult:
    """Paint samples and plot the loss; training does not fail for want of an image of it."""

    def paint_samples() -> None:
        preview.write_samples(
            base,
            prompts_of(run, data),
            run.parameters.seed,
            folder,
            resolution=run.parameters.resolution,
            steps=sample_steps(run, base),
        )

    def plot_losses() -> None:
        preview.write_loss_curve(
            result.losses, folder, probes=result.probes, delivered=result.delivered_epoch
        )

    missing = []
    for name, make in (("sample images", paint_samples), ("loss curve", plot_losses)):
        try:
            make()
        except Exception as error:  # pylint: disable=broad-exception-caught  # said in the report
            if isinstance(gpu_error(error), GpuBroken):
                raise
            log.error("preview_failed", extra={"preview": name}, exc_info=error)
            missing.append(f"The {name} could not be made ({type(error).__name__}).")
    return dataclasses.replace(result, warnings=(*result.warnings, *missing))


def _write_html(
    content: dict[str, Any], run: TrainingRun, data: Dataset, result: TrainingResult, folder: Path
) -> None:
    """The report for people. The facts are safe in the other one: training does not fail of it."""
    try:
        prompts = preview.chosen_prompts(prompts_of(run, data))
        held_out_thumbnails = data.held_out.thumbnails if data.held_out else {}
        html_report.write_html(
            content,
            run,
            result,
            prompts,
            folder,
            thumbnails={**held_out_thumbnails, **data.thumbnails},
        )
    except (ValueError, TypeError, LookupError, jinja2.TemplateError) as error:
        log.error("html_report_failed", exc_info=error)


def _quieten_libraries() -> None:
    """Their progress bars and handlers of their own would break the log's lines."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.disable_default_handler()
        library.utils.logging.enable_propagation()
        library.utils.logging.set_verbosity_error()
