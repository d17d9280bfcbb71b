"""`main.py train` on a terminal: a progress bar, then the files of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import config
from cli.program import EXIT_FAILED, EXIT_INTERRUPTED, console, on_stop_signals
from cli.training.local import folder_run, train_folder
from consumer.life.stop_signal import StopSignal
from jobs.layout import HTML_REPORT, LOSS_CURVE, SAMPLES, STYLE, WEIGHTS
from jobs.style import HyperParameters
from utils import logger
from utils.errors import ConfigurationError, StopReason
from utils.events import CheckpointSaved, Event, Finished, Stage, Started
from utils.events import Progress as ProgressEvent
from utils.names import printable
from utils.settings.groups import LogSettings
from utils.wording import counted

if TYPE_CHECKING:
    from training.style.examples import ImageReport
    from training.style.results.validation import Validation


def run(
    folder: Path,
    output: Path,
    overrides: dict[str, Any],
    config_file: Path | None,
    how: dict[str, Any],
) -> int:
    """Train on a folder with a progress bar, and report the result.

    Args:
        folder: The images.
        output: Receives the model.
        overrides: Hyper-parameters of the command line; None for those of the settings.
        config_file: A file with more settings.
        how: Further arguments of `train_folder`.

    Returns:
        The exit code.
    """
    settings, parameters = _read(overrides, config_file)
    # The bar shows the progress; the log is only for problems.
    quiet = LogSettings(log_level="WARNING", log_format="text")
    settings = settings.model_copy(update={"log": quiet})
    logger.configure(level="WARNING", log_format="text", secrets=settings.secrets())
    if unknown := config.unknown_names(config_file):
        console.print(f"note: {unknown}", markup=False, highlight=False, soft_wrap=True)
    stop = StopSignal()
    on_stop_signals(lambda: stop.request(StopReason.SHUTDOWN))
    with Bar() as progress_bar:
        finished = train_folder(
            folder,
            output,
            settings=settings,
            parameters=parameters,
            **how,
            on_event=progress_bar.saw,
            stop=stop,
        )
    if finished.stopped:
        console.print(f"Stopped after step {finished.done}; continue with --resume.")
        return EXIT_INTERRUPTED
    _print_results(output, finished)
    return 0


def validate(
    folder: Path,
    overrides: dict[str, Any],
    config_file: Path | None,
    *,
    validation: Path | None,
    trigger_word: str,
) -> int:
    """Print the intake report of a folder without a training step.

    Returns:
        0; 1 if too few images can be used.
    """
    # Imported late: it brings torch.
    # pylint: disable-next=import-outside-toplevel
    from training.style.results import validation as intake

    settings, parameters = _read(overrides, config_file)
    logger.configure(level="ERROR", log_format="text", secrets=settings.secrets())
    order = folder_run(folder, settings, parameters, trigger_word)
    if validation:
        others = folder_run(validation, settings, parameters, trigger_word)
        order = dataclasses.replace(
            order, validation_images=others.images, notes=order.notes + others.notes
        )
    report = intake.validate(order)
    out = Console(highlight=False)
    _print_images("Images", report.images, out)
    if validation:
        _print_images("Validation images", report.validation_images, out)
    for size, count in sorted(report.buckets.items()):
        out.print(f"{size} pixels: {counted(count, 'image')}", markup=False)
    for warning in report.warnings:
        out.print(f"note: {warning}", style="yellow", markup=False)
    return _print_verdict(report, settings.options[STYLE].min_images, order.parameters.epochs, out)


def _print_verdict(report: Validation, min_images: int, epochs: int, out: Console) -> int:
    """Print whether a training could run; the exit code."""
    can = f"{report.usable} of {counted(len(report.images), 'image')} can be used"
    if report.usable < min_images:
        least = f"at least {min_images} are needed (MIN_IMAGES)"
        out.print(f"{can}, but {least}. Add images, or correct those above.", style="red")
        return EXIT_FAILED
    if report.problem:
        out.print(report.problem, style="red", markup=False)
        return EXIT_FAILED
    steps = f"{counted(report.steps, 'step')} in {counted(epochs, 'epoch')}"
    out.print(f"{can}: {steps}. `main.py doctor` tests the base model and the GPU.")
    return 0


def _read(
    overrides: dict[str, Any], config_file: Path | None
) -> tuple[config.LocalSettings, HyperParameters]:
    """The settings, and the hyper-parameters with those of the command line."""
    settings = config.load_local(file=config_file)
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        parameters: HyperParameters = dataclasses.replace(settings.parameters[STYLE], **given)
        parameters.require_libraries()
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return settings, parameters


def _print_images(title: str, images: Sequence[ImageReport], out: Console) -> None:
    grid = Table.grid("status", "words", padding=(0, 2))
    grid.columns[1].overflow = "fold"
    styles = {"used": "green", "warned": "yellow", "left_out": "red"}
    for image in images:
        size = f"  {image.width} x {image.height}" if image.width else ""
        trained_as = f", trained as {image.trained_as}" if image.trained_as else ""
        status = Text(image.status.replace("_", " "), styles[image.status])
        grid.add_row(status, Text.assemble((image.source, "bold"), size, trained_as))
        for reason in image.reasons:
            grid.add_row("", Text(reason))
        if image.caption:
            grid.add_row("", Text(f"caption: {printable(image.caption)}", "dim"))
    out.print(f"{title}:", style="bold")
    out.print(grid)


def _print_results(output: Path, finished: Finished) -> None:
    value = finished.facts.get("loss")
    loss = "" if value is None else f", loss {value:.4f}"
    console.print(
        f"Trained {finished.facts.get('epoch', 0)} epochs in {finished.seconds:.0f} s{loss}."
    )
    for label, name in (
        ("model", WEIGHTS),
        ("report", HTML_REPORT),
        ("samples", SAMPLES),
        ("loss", LOSS_CURVE),
    ):
        if name in finished.files:
            console.print(f"  {label:9}{output / name}", highlight=False, soft_wrap=True)


@dataclasses.dataclass
class Bar:
    """A progress bar that shows the trainer's events."""

    def __post_init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:12}"),
            BarColumn(),
            TextColumn("{task.fields[steps]}"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,  # a sentence takes its place at the end
        )
        self._task = self._progress.add_task(str(Stage.PREPARING), total=None, steps="", loss="")
        self._waiting = console.status("getting ready")

    def __enter__(self) -> Bar:
        self._waiting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.stop()
        if self._progress.live.is_started:  # else it would print an empty line
            self._progress.stop()

    def saw(self, event: Event) -> None:
        """Show one event."""
        self._waiting.stop()
        self._progress.start()
        match event:
            case Started():
                for warning in event.warnings:
                    self._progress.console.print(f"note: {warning}", markup=False)
                self._progress.update(self._task, total=event.total, completed=event.done)
            case ProgressEvent():
                value = event.facts.get("loss")
                loss = "" if value is None else f"loss {value:.4f}"
                self._progress.update(
                    self._task,
                    description=str(event.stage),
                    completed=event.done,
                    total=event.total or None,
                    steps=f"{event.done}/{event.total} {event.unit}s" if event.total else "",
                    loss=loss,
                )
            case CheckpointSaved():
                self._progress.console.print(f"checkpoint {event.name}", highlight=False)
            case _:
                pass
