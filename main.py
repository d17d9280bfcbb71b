"""The training server's command line and composition root.

Exit codes: 0 ended as asked; 1 a local training failed; 2 the settings or arguments are wrong; 3
RabbitMQ refuses this worker; 4 this machine cannot train; 130 a local training was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from structlog.stdlib import BoundLogger

import config
from cli.commands import add_commands
from consumer.life.stop_signal import Shutdown, StopSignal
from utils import logger
from utils.errors import (
    BrokerRefused,
    ConfigurationError,
    MachineError,
    StopReason,
    TrainingServerError,
)
from utils.events import CheckpointSaved, Event, Finished, Stage, Started
from utils.events import Progress as ProgressEvent

EXIT_FAILED, EXIT_SETTINGS, EXIT_BROKER, EXIT_MACHINE, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

app = typer.Typer(
    help="Fine-tunes a LoRA of an artist's style on Stable Diffusion 1.5.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)
log = logger.get_logger("main")


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    """Without a command, `worker` runs."""
    if context.invoked_subcommand is None:
        worker()


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="More settings, in TOML or JSON; the environment wins."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def worker(
    once: Annotated[bool, typer.Option("--once", help="One training message, then end.")] = False,
    idle_seconds: Annotated[
        float, typer.Option(min=0, help="With --once: end after so long without a message.")
    ] = 60.0,
    config_file: ConfigFile = None,
) -> None:
    """Take training jobs from RabbitMQ until told to stop (SIGTERM or Ctrl-C).

    Settings come from the environment and `.env`; `.env.example` documents each.
    """
    with contextlib.ExitStack() as lasting:  # the last error is logged after the run
        code = _guarded(lambda: _run_worker(config_file, idle_seconds if once else None, lasting))
    # A thread that hangs in the network must not hold up the end: everything is settled by now.
    logging.shutdown()
    os._exit(code)


@app.command()
def doctor(
    show_all: Annotated[
        bool, typer.Option("--all", help="Print every finding in full, with advice.")
    ] = False,
    policy: Annotated[
        bool,
        typer.Option(
            "--policy", help="Print the least S3 policy for the worker, and test nothing."
        ),
    ] = False,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Test everything that a worker needs before its first job, and print what to do.

    Exit code 0: a worker can be started; 1: a test failed; 2: the settings are wrong.
    """
    from cli.doctor import command  # pylint: disable=import-outside-toplevel

    if policy:
        sys.exit(command.print_policy(config_file=config_file))
    sys.exit(command.run(as_json=as_json, show_all=show_all, config_file=config_file))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA as safetensors.")],
    show_all: Annotated[
        bool, typer.Option("--all", help="Also print every layer and the metadata.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print a summary of a LoRA file: format, base, rank, alpha, targets, norms.

    Exit code 1: the file is damaged, a pickle, or not a LoRA.
    """
    from cli.inspect import run  # pylint: disable=import-outside-toplevel

    sys.exit(run(file, as_json=as_json, show_all=show_all))


@app.command()
def train(
    folder: Annotated[
        Path, typer.Argument(help="Folder of images; `name.txt` captions `name.jpg`.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder that receives the model, report and samples.")
    ],
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a forward pass.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the training images.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Alpha of the LoRA.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    deliver: Annotated[
        str | None, typer.Option(help="Which checkpoint becomes the model: last or best.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Folder of images to judge by, not trained on.")
    ] = None,
    trigger_word: Annotated[
        str, typer.Option(help="A word in front of every prompt, to call the style by.")
    ] = "",
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest checkpoint in OUTPUT.")
    ] = False,
    config_file: ConfigFile = None,
) -> None:
    """Train on a folder of images: no broker, no S3, no backend.

    All other settings come from the environment and `.env`, as for the worker.
    """
    overrides = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "resolution": resolution,
        "rank": rank,
        "alpha": alpha,
        "seed": seed,
        "deliver": deliver,
    }
    _end(
        lambda: _run_training(
            folder,
            output,
            overrides,
            config_file,
            {"validation": validation, "trigger_word": trigger_word, "resume": resume},
        )
    )


def _end(command: Callable[[], int]) -> None:
    """Run a command that a person looks on at, and end with its exit code."""
    sys.exit(_guarded(command, say=_Sentences()))


add_commands(app, _end)


class _Sentences:
    """Stands in for the log where a person looks on."""

    def error(self, _event: str, *, reason: str) -> None:
        """Print the reason alone."""
        _print_problem(reason)


def _print_problem(sentence: str) -> None:
    console.print(sentence, style="red", markup=False, highlight=False, soft_wrap=True)


def _guarded(command: Callable[[], int], *, say: _Sentences | BoundLogger = log) -> int:
    """Run a command; errors that a person can mend are told without a stack trace."""
    try:
        return command()
    except ConfigurationError as error:  # there may be no log yet
        _print_problem(str(error))
        return EXIT_SETTINGS
    except BrokerRefused as error:
        say.error("broker_refused", reason=str(error))
        return EXIT_BROKER
    except MachineError as error:
        say.error("machine_unfit", reason=str(error))
        return EXIT_MACHINE
    except TrainingServerError as error:
        say.error("failed", reason=str(error))
        return EXIT_FAILED


def _on_stop_signals(first: Callable[[], None]) -> None:
    """Call `first` at SIGTERM, SIGINT or SIGHUP, in a thread of its own; a further SIGTERM or
    SIGINT ends the process at once.

    The signals are blocked and waited for, so no handler interrupts a thread that holds a lock. A
    terminal that closes sends SIGHUP twice, from the kernel and from the shell, so that one never
    hurries the end. Where SIGHUP was ignored at start (nohup), it stays ignored.
    """
    at_once = {signal.SIGTERM, signal.SIGINT}
    wanted = set(at_once)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        wanted.add(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)

    def wait() -> None:
        signal.sigwait(wanted)
        first()
        # The trainer ends with our pipe, whatever it is doing.
        os._exit(128 + signal.sigwait(at_once))

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _run_training(
    folder: Path,
    output: Path,
    overrides: dict[str, Any],
    config_file: Path | None,
    how: dict[str, Any],
) -> int:
    from cli.train import train_folder  # pylint: disable=import-outside-toplevel

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
    _on_stop_signals(lambda: stop.request(StopReason.SHUTDOWN))
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
    _say_what_was_made(output, finished)
    return 0


def _say_what_was_made(output: Path, finished: Finished) -> None:
    value = finished.facts.get("loss")
    loss = "" if value is None else f", loss {value:.4f}"
    console.print(
        f"Trained {finished.facts.get('epoch', 0)} epochs in {finished.seconds:.0f} s{loss}."
    )
    for label, name in (
        ("model", "lora_weights.safetensors"),
        ("report", "training_report.html"),
        ("pictures", "samples.png"),
        ("loss", "loss_curve.png"),
    ):
        if name in finished.files:
            console.print(f"  {label:9}{output / name}", highlight=False, soft_wrap=True)


@dataclasses.dataclass
class _Bar:
    """A progress bar that follows the trainer's events, from the first of them on."""

    def __post_init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:12}"),
            BarColumn(),
            TextColumn("{task.fields[steps]}"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,  # at the end a sentence says what there is to say
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


def _run_worker(
    config_file: Path | None, once_idle: float | None, lasting: contextlib.ExitStack
) -> int:
    settings: config.Settings = config.load(file=config_file)
    logger.configure(
        level=settings.log_level, log_format=settings.log_format, secrets=settings.secrets()
    )
    if unknown := config.unknown_names(config_file):
        log.warning("settings_unknown", reason=unknown)
    shutdown = Shutdown(settings.shutdown_grace_seconds)
    _on_stop_signals(shutdown.request)
    # Imported late, so that `train` and `--help` need neither pika nor boto3.
    # pylint: disable=import-outside-toplevel
    from consumer.worker import LAST_WORDS_SECONDS, run_worker
    from services.telemetry.error_reports import reported

    dsn = settings.sentry_dsn
    lasting.enter_context(
        reported(
            dsn.get_secret_value() if dsn else None,
            environment=settings.sentry_environment,
            secrets=settings.secrets(),
            flush_seconds=LAST_WORDS_SECONDS,
        )
    )
    run_worker(settings, shutdown, once_idle=once_idle)
    return 0


if __name__ == "__main__":
    app()
