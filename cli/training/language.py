"""`main.py train --kind llm`: a language model on this machine, with no broker and no S3."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

import config
from cli.program import EXIT_FAILED, EXIT_INTERRUPTED, console, on_stop_signals
from cli.training.local import train_conversations
from cli.training.style import Bar
from consumer.life.stop_signal import StopSignal
from conversations.intake import Intake, take_in
from conversations.reading import UnreadableFile
from jobs.llm import BASE_NAME, LlmOptions, LlmParameters, LlmRun
from utils import logger
from utils.errors import ConfigurationError, StopReason
from utils.events import Finished
from utils.names import printable
from utils.settings.groups import LogSettings
from utils.wording import counted

KIND = "llm"


def train(  # pylint: disable=too-many-locals  # one for each option
    data: Path,
    output: Path | None,
    overrides: dict[str, Any],
    config_file: Path | None,
    *,
    base_model: str | None,
    validation: Path | None,
    resume: bool,
    validate_only: bool,
) -> int:
    """Train on a file of conversations, or report on it.

    Args:
        data: The file.
        output: Receives the model.
        overrides: Parameters of the command line; None for those of the settings.
        config_file: A file with more settings.
        base_model: Hub name or local folder of the base; None for `LLM_DEFAULT_BASE_MODEL`.
        validation: File of held-out conversations.
        resume: Continue from the newest checkpoint in `output`.
        validate_only: Report on the data, and do not train.

    Returns:
        The exit code.
    """
    settings = config.load_local(file=config_file)
    parameters = _parameters(settings.parameters[KIND], overrides)
    options: LlmOptions = settings.options[KIND]
    for name, path in (("DATA", data), ("--validation", validation)):
        if path and not path.is_file():
            raise ConfigurationError(f"{name}: {path} is not a file. Name a file of conversations.")
    if validate_only:
        logger.configure(level="ERROR", log_format="text", secrets=settings.secrets())
        return validate(data, validation, parameters, options.min_training_samples)
    if output is None:
        raise ConfigurationError("--output is missing. Name the folder for the model.")
    quiet = LogSettings(log_level="WARNING", log_format="text")
    settings = settings.model_copy(update={"log": quiet})
    logger.configure(level="WARNING", log_format="text", secrets=settings.secrets())
    stop = StopSignal()
    on_stop_signals(lambda: stop.request(StopReason.SHUTDOWN))
    run = _run(data, validation, parameters, options, base_model)
    with Bar() as progress_bar:
        finished = train_conversations(
            run, output, settings=settings, resume=resume, on_event=progress_bar.saw, stop=stop
        )
    if finished.stopped:
        console.print(f"Stopped after step {finished.done}; continue with --resume.")
        return EXIT_INTERRUPTED
    _print_results(output, finished)
    return 0


def _parameters(defaults: LlmParameters, overrides: dict[str, Any]) -> LlmParameters:
    given = {name: value for name, value in overrides.items() if value is not None}
    if "epochs" in given:
        given["epochs"] = float(given["epochs"])
    try:
        parameters = dataclasses.replace(defaults, **given)
        parameters.require_libraries()
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return parameters


def _run(
    data: Path,
    validation: Path | None,
    parameters: LlmParameters,
    options: LlmOptions,
    base_model: str | None,
) -> LlmRun:
    name = base_model or options.default_base_model
    if not name:
        raise ConfigurationError("--base-model is missing. Name a model of the hub, or a folder.")
    source = options.source_of(name) or name
    if Path(name).is_dir():
        source, name = str(Path(name).resolve()), Path(name).resolve().name
    elif not BASE_NAME.fullmatch(name):
        raise ConfigurationError(f"--base-model: {printable(name)} is no folder and no hub name.")
    return LlmRun(
        task_id="local",
        subject="local",
        claim=1,
        base_model=name,
        base_source=source,
        training_file=str(data.resolve()),
        validation_file=str(validation.resolve()) if validation else None,
        parameters=parameters,
        work_folder="",
        template_date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        min_training_samples=options.min_training_samples,
        use_4bit=options.use_4bit,
        use_8bit=options.use_8bit,
    )


def validate(
    data: Path, validation: Path | None, parameters: LlmParameters, min_samples: int
) -> int:
    """Print the intake of a file. It needs no torch and no base model.

    Returns:
        0; 1 if too few conversations can be used.
    """
    out = Console(highlight=False)
    try:
        intake = take_in(
            data,
            validation=validation,
            train_on=parameters.train_on,
            system_prompt="",
            redact=parameters.redact,
            validation_split=parameters.validation_split,
            seed=parameters.seed,
        )
    except UnreadableFile as error:
        out.print(f"{data}: {error}", style="red", markup=False)
        return EXIT_FAILED
    _print_rows(intake, out)
    can = f"{intake.used} of {counted(intake.rows, 'row')} can be used"
    if intake.used < min_samples or not intake.training:
        least = f"at least {min_samples} are needed (LLM_MIN_TRAINING_SAMPLES)"
        out.print(f"{can}, but {least}. Correct the rows above.", style="red")
        return EXIT_FAILED
    out.print(f"{can}: {len(intake.training)} are trained, {len(intake.held_out)} are held out.")
    return 0


def _print_rows(intake: Intake, out: Console) -> None:
    for style, title, reasons in (
        ("red", "left out", intake.left_out),
        ("yellow", "changed", intake.changed),
    ):
        for each in reasons.listed():
            rows = ", ".join(map(str, each["rows"]))
            more = " and more" if each["count"] > len(each["rows"]) else ""
            line = f"{title}: {counted(each['count'], 'row')}: {each['reason']} (row {rows}{more})"
            out.print(line, style=style, markup=False)
    for warning in intake.warnings:
        out.print(f"note: {warning}", style="yellow", markup=False)


def _print_results(output: Path, finished: Finished) -> None:
    summary = finished.summary
    console.print(
        f"Trained {finished.done} steps in {finished.seconds:.0f} s. {summary['verdict']}"
    )
    for label, name in (("model", "adapter_model.safetensors"), ("report", "training_report.html")):
        console.print(f"  {label:9}{output / name}", highlight=False, soft_wrap=True)
