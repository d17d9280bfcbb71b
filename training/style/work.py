"""The work of the style kind: runs on a base model that stays loaded between them."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import transformers

from jobs.kinds import TrainerOptions
from jobs.layout import STYLE_FILES
from jobs.style import TrainingRun
from reports import html_report
from training.runtime.device import device_errors_as_ours, free_memory, gpu_error, out_of_memory
from training.style import recovery
from training.style.dataset import prepare
from training.style.examples import Dataset
from training.style.families.sd15 import BaseModel
from training.style.results import export, preview, report
from training.style.results.examiner import prompts_of, sample_steps
from training.style.results.lora_formats import model_card
from training.style.results.report import TrainingResult
from utils.errors import GpuBroken, Stopped, StopReason
from utils.events import BaseModelReady, Event, Finished, Progress, Stage

log = logging.getLogger(__name__)

Emit = Callable[[Event | BaseModelReady], None]

SAMPLE_SIDE = 512
"""Side of a sample in the HTML report, in pixels."""


class StyleWork:
    """Does the runs of the style kind, one after the other.

    Attributes:
        is_usable: False when the process must be replaced before the next run, because the base
            model could not be restored.

    Args:
        options: The options of the trainer process.
    """

    run_type = TrainingRun
    has_base = True
    shares_runs = False

    def __init__(self, options: TrainerOptions) -> None:
        self.is_usable = True
        self._options = options
        self._base: BaseModel | None = None
        _quieten_libraries()

    @property
    def on_gpu(self) -> bool:
        """Whether the base model is loaded and on a GPU."""
        return self._base is not None and self._base.device.type == "cuda"

    def load(self, emit: Emit) -> None:
        """Load the base model, unless it is loaded.

        Args:
            emit: Receives `BaseModelReady`.

        Raises:
            GpuBroken: There is no usable GPU, and training on the CPU is not allowed.
            BaseModelUnavailable: The model is missing, incomplete or cannot be reached.
        """
        self._loaded(emit)

    def release(self, emit: Emit) -> None:
        """Give the memory of the base model back. The next run loads it again."""
        if self._base is not None:
            device, self._base = self._base.device, None
            free_memory(device)
            emit(BaseModelReady(False))

    @device_errors_as_ours()
    def run(
        self, run: TrainingRun, emit: Emit, should_stop: Callable[[], StopReason | None]
    ) -> Finished:
        """Do one run. The base model has no LoRA afterwards.

        Args:
            run: The run.
            emit: Receives the run's events, except the last one, and `BaseModelReady`.
            should_stop: Returns the reason to stop, or None.

        Raises:
            TrainingServerError: The run failed for a known reason.
            Exception: The run failed for an unknown one.
        """
        began = time.monotonic()
        try:
            finished = self._train(run, self._loaded(emit), emit, should_stop)
        except Stopped as stop:  # before the first step: there is nothing to save
            finished = Finished(run.task_id, "", (), 0, 0.0, stopped=stop.reason)
        except Exception:
            self._detach_after_failure()
            raise
        self._detach(emit)
        return dataclasses.replace(finished, seconds=time.monotonic() - began)

    def _loaded(self, emit: Emit) -> BaseModel:
        if self._base is None:
            began = time.monotonic()
            self._base = BaseModel.load(self._options)
            emit(BaseModelReady(True, time.monotonic() - began))
        return self._base

    def _detach(self, emit: Emit) -> None:
        """Remove the LoRA after a run that did not fail.

        Raises:
            Exception: The base model cannot be restored.
        """
        if self._base is None:
            return
        try:
            self._base.detach()
        except Exception as error:  # pylint: disable=broad-exception-caught  # raised, or logged
            log.error("detach_failed", exc_info=error)
            if not out_of_memory(error):
                self.is_usable = False
                raise
            self.release(emit)  # The model is made. The base is loaded again.
        else:
            if self._base.drifted:
                self.release(emit)

    def _detach_after_failure(self) -> None:
        """Remove the LoRA after a run that failed, whose error is the one to report."""
        if self._base is None:
            return
        try:
            self._base.detach()
        except Exception as error:  # pylint: disable=broad-exception-caught  # logged
            log.error("detach_failed", exc_info=error)
            self.is_usable = False
        self.is_usable = self.is_usable and not self._base.drifted

    def _train(
        self,
        run: TrainingRun,
        base: BaseModel,
        emit: Emit,
        should_stop: Callable[[], StopReason | None],
    ) -> Finished:
        """The run from its images to its files."""
        epochs = run.parameters.epochs
        at_the_beginning = {"epoch": 0, "total_epochs": epochs}
        preparing = Progress(run.task_id, Stage.PREPARING, 0, 0, facts=at_the_beginning)
        emit(preparing)
        data = prepare(run, base, should_stop=should_stop, on_image=lambda: emit(preparing))
        result = recovery.train(run, base, data, emit=emit, should_stop=should_stop)
        facts = {"epoch": result.epochs, "loss": result.loss}
        finished = Finished(
            run.task_id, "", (), result.steps, 0.0, stopped=result.stopped, facts=facts
        )
        if result.stopped:
            return finished
        emit(
            Progress(
                run.task_id,
                Stage.EXPORTING,
                result.steps,
                result.steps,
                per_second=result.steps_per_second,
                facts=facts | {"total_epochs": epochs},
            )
        )
        folder, summary = _write_output(run, base, data, result)
        files = tuple(name for name in STYLE_FILES if (folder / name).is_file())
        return dataclasses.replace(finished, folder=str(folder), files=files, summary=summary)


def _write_output(
    run: TrainingRun, base: BaseModel, data: Dataset, result: TrainingResult
) -> tuple[Path, dict[str, Any]]:
    """Export the LoRA, make its samples, write the report; returns the folder and a summary."""
    folder = Path(run.work_folder) / "output"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    card = model_card(run, base, data, result)
    export.export(base, result.parameters, folder, metadata=card)
    result, final = _with_previews(run, base, data, result, folder)
    content = report.build_report(run, base, data, result)
    report.write_report(content, folder)
    _write_html(content, run, data, result, final, folder)
    return folder, report.summary(content)


def _with_previews(
    run: TrainingRun, base: BaseModel, data: Dataset, result: TrainingResult, folder: Path
) -> tuple[TrainingResult, tuple[list[bytes], list[bytes]]]:
    """Paint samples and plot the loss; training does not fail for want of an image of it.

    Returns:
        The result with a sentence about what could not be made, and the samples without and with
        the LoRA as JPEG files.
    """
    final: tuple[list[bytes], list[bytes]] = [], []

    def paint_samples() -> None:
        columns = preview.write_samples(
            base,
            prompts_of(run, data),
            run.parameters.seed,
            folder,
            resolution=run.parameters.resolution,
            steps=sample_steps(run, base),
            embeddings=data.embeddings,
        )
        for files, images in zip(final, columns, strict=True):
            files += [preview.jpeg(image, SAMPLE_SIDE) for image in images]

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
    return dataclasses.replace(result, warnings=(*result.warnings, *missing)), final


def _write_html(
    content: dict[str, Any],
    run: TrainingRun,
    data: Dataset,
    result: TrainingResult,
    final: tuple[list[bytes], list[bytes]],
    folder: Path,
) -> None:
    """The report for people. The facts are safe in the other one: training does not fail of it."""
    before, after = final
    thumbnails = {**(data.held_out.thumbnails if data.held_out else {}), **data.thumbnails}
    try:
        images = html_report.ReportImages(
            training=[thumbnails.get(image.path or "") for image in run.images],
            held_out=[thumbnails.get(image.path or "") for image in run.validation_images],
            prompts=preview.chosen_prompts(prompts_of(run, data)),
            before=before,
            after=after,
            checkpoints=report.sample_rows(result),
        )
        html_report.write_html(content, images, folder)
    except (ValueError, TypeError, LookupError) as error:
        log.error("html_report_failed", exc_info=error)


def _quieten_libraries() -> None:
    """Turn off progress bars and log handlers that would break the log's lines."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.disable_default_handler()
        library.utils.logging.enable_propagation()
        library.utils.logging.set_verbosity_error()
