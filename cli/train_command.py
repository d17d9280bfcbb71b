"""`main.py train` on a terminal: a progress bar, then the files of the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import config
from cli.program import EXIT_INTERRUPTED, console, on_stop_signals
from cli.train import train_folder
from consumer.life.stop_signal import StopSignal
from utils import logger
from utils.errors import ConfigurationError, StopReason
from utils.events import CheckpointSaved, Event, Finished, Stage, Started
from utils.events import Progress as ProgressEvent


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
    settings: config.TrainerSettings = config.load(config.TrainerSettings, file=config_file)
    try:
        parameters = settings.hyper_parameters(
            **{name: value for name, value in overrides.items() if value is not None}
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    # The bar is what a person wants to see here; the log is for what goes wrong.
    settings = settings.model_copy(update={"log_level": "WARNING", "log_format": "text"})
    logger.configure(level="WARNING", log_format="text", secrets=settings.secrets())
    if unknown := config.unknown_names(config_file):
        console.print(f"note: {unknown}", markup=False, highlight=False, soft_wrap=True)
    stop = StopSignal()
    on_stop_signals(lambda: stop.request(StopReason.SHUTDOWN))
    with _Bar() as progress_bar:
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
        console.print(f"Stopped after step {finished.done}; go on with --resume.")
        return EXIT_INTERRUPTED
    _print_results(output, finished)
    return 0


def _print_results(output: Path, finished: Finished) -> None:
    value = finished.facts.get("loss")
    loss = "" if value is None else f", loss {value:.4f}"
    console.print(
        f"Trained {finished.facts.get('epoch', 0)} epochs in {finished.seconds:.0f} s{loss}."
    )
    for label, name in (
        ("model", "lora_weights.safetensors"),
        ("report", "training_report.html"),
        ("samples", "samples.png"),
        ("loss", "loss_curve.png"),
    ):
        if name in finished.files:
            console.print(f"  {label:9}{output / name}", highlight=False, soft_wrap=True)


@dataclasses.dataclass
class _Bar:
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

    def __enter__(self) -> _Bar:
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
