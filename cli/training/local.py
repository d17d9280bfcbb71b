"""`python main.py train`: the same training on a folder of images, without other servers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cli.training.image_folder import ImageFolder, read_folder
from config import LocalSettings
from consumer.life.stop_signal import StopSignal
from consumer.trainer.machine import Machine, require_fit
from consumer.trainer.trainer_process import TrainerProcess
from jobs import base_models
from jobs.addresses import AddressRules
from jobs.checkpoint_name import order
from jobs.fields import Auto
from jobs.kinds import JobKind, Kinds, Run
from jobs.layout import CURVES, REPORT, STYLE, STYLE_FILES
from jobs.llm import LlmKind, LlmRun
from jobs.style import (
    HyperParameters,
    StyleOptions,
    TrainingImage,
    TrainingRun,
    auto_epochs,
    checked_trigger_word,
)
from utils.errors import ConfigurationError, TrainingServerError
from utils.events import Event, Finished
from utils.logger import get_logger
from utils.names import is_unicode, printable

log = get_logger(__name__)

MADE = frozenset(STYLE_FILES)
"""The files that a training writes into its output folder."""

_NO_BUCKETS = AddressRules("", ())
_WORK = ".training"
_TEMPORARY = "tmp"
_MANIFEST = "manifest.json"


def images_in(folder: Path) -> tuple[TrainingImage, ...]:
    """The images of a folder, with their captions; see `read_folder`.

    Raises:
        ConfigurationError: The folder is missing, empty, or holds too many files.
    """
    return _contents(folder).images


def _contents(folder: Path) -> ImageFolder:
    """A folder's images, without the files of an earlier training."""
    return read_folder(folder, ignored=MADE if (folder / REPORT).is_file() else frozenset())


def folder_run(
    folder: Path, settings: LocalSettings, parameters: HyperParameters, trigger_word: str
) -> TrainingRun:
    """The run on a folder's images, as far as their intake needs it.

    Raises:
        ConfigurationError: The folder or the trigger word is wrong.
    """
    found = _contents(folder)
    auto = isinstance(parameters.epochs, Auto)
    if auto:
        parameters = dataclasses.replace(parameters, epochs=auto_epochs(len(found.images)))
    options: StyleOptions = settings.options[STYLE]
    return TrainingRun(
        task_id="local",
        style_id=0,
        claim=1,
        images=found.images,
        parameters=parameters,
        work_folder="",
        min_images=options.min_images,
        max_image_pixels=options.max_image_pixels,
        trigger_word=_checked(trigger_word),
        epochs_auto=auto,
        notes=found.notes,
    )


def train_folder(
    folder: Path,
    output: Path,
    *,
    settings: LocalSettings,
    parameters: HyperParameters,
    validation: Path | None = None,
    trigger_word: str = "",
    resume: bool,
    on_event: Callable[[Event], None],
    stop: StopSignal,
) -> Finished:
    """Train on a folder of images.

    Args:
        folder: The images.
        output: Receives the model's files, and may be the images' folder; while training also
            its checkpoints, in `.training`.
        settings: The settings that do not depend on the job.
        parameters: Hyper-parameters.
        validation: Folder of images that are looked at and not trained on.
        trigger_word: In front of every prompt, or the empty string.
        resume: Continue from the newest checkpoint in `output`, if there is one.
        on_event: Sees every event of the trainer.
        stop: Ends training at the next step, with a checkpoint.

    Raises:
        ConfigurationError: Something is wrong with a folder, or with the trigger word.
        JobError: Training failed.
        MachineError: This machine cannot train.
    """
    _refuse_unprintable(output, settings.trainer.base_model)
    run = folder_run(folder, settings, parameters, trigger_word)
    _refuse_to_overwrite(run.images, folder, output)
    _look_for_base_model(settings.trainer.base_model)
    machine = require_fit(settings.trainer_environment(), allow_cpu=settings.trainer.allow_cpu)
    held_out = _contents(validation) if validation else ImageFolder((), ())
    work = output.resolve() / _WORK
    _make_folder(work, output, emptied=not resume)
    options: StyleOptions = settings.options[STYLE]
    run = dataclasses.replace(
        run,
        work_folder=str(work),
        resume_from=_newest_checkpoint(work) if resume else None,
        checkpoint_interval=options.checkpoint_interval,
        validation_images=held_out.images,
        sample_steps=options.sample_steps,
        preview_share=options.preview_share,
        tensorboard=options.tensorboard,
        notes=run.notes + held_out.notes,
    )
    finished = _run(STYLE, run, settings, machine, on_event, stop)
    if not finished.stopped:
        _hand_over(finished, output)
        _hand_over_curves(work / CURVES, output / CURVES)
        shutil.rmtree(work, ignore_errors=True)
    return finished


def train_conversations(
    run: LlmRun,
    output: Path,
    *,
    settings: LocalSettings,
    resume: bool,
    on_event: Callable[[Event], None],
    stop: StopSignal,
) -> Finished:
    """Train a language model on a file of conversations.

    Args:
        run: The run; its work folder and its checkpoint are set here.
        output: Receives the model's files; while training also its checkpoints, in `.training`.
        settings: The settings that do not depend on the job.
        resume: Continue from the newest checkpoint in `output`, if there is one.
        on_event: Sees every event of the trainer.
        stop: Ends training at the next step, with a checkpoint.

    Raises:
        ConfigurationError: The output folder cannot be written.
        JobError: Training failed.
        MachineError: This machine cannot train.
    """
    _refuse_unprintable(output, run.base_source)
    machine = require_fit(settings.trainer_environment(), allow_cpu=settings.trainer.allow_cpu)
    work = output.resolve() / _WORK
    _make_folder(work, output, emptied=not resume)
    resume_from = _newest_checkpoint(work) if resume else None
    run = dataclasses.replace(run, work_folder=str(work), resume_from=resume_from)
    finished = _run(LlmKind.name, run, settings, machine, on_event, stop)
    if not finished.stopped:
        _hand_over(finished, output)
        shutil.rmtree(work, ignore_errors=True)
    return finished


def _run(
    kind_name: str,
    run: TrainingRun | LlmRun,
    settings: LocalSettings,
    machine: Machine,
    on_event: Callable[[Event], None],
    stop: StopSignal,
) -> Finished:
    kind = Kinds({}, addresses=_NO_BUCKETS).of(kind_name)
    work = Path(run.work_folder)
    processes = settings.trainer.processes_on(machine.count) if kind.shares_gpus else 1
    environment = settings.trainer_environment(processes=processes)
    trainer = TrainerProcess(
        dataclasses.replace(settings.trainer_options(processes=processes), runner=kind.runner),
        environment | {"TMPDIR": str(work / _TEMPORARY)},
        stall_seconds=settings.trainer.stall_seconds,
        secrets=settings.secrets(),
        confinement=settings.trainer_confinement(work, processes=processes),
    )
    try:
        with _pages(kind, settings, machine, on_event) as see:
            return trainer.run(Run.of(run, kind.runner, {}), see, stop, max_seconds=float("inf"))
    except TrainingServerError:
        if _newest_checkpoint(work) is None:  # nothing to continue from
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        trainer.close()


@contextlib.contextmanager
def _pages(
    kind: JobKind,
    settings: LocalSettings,
    machine: Machine,
    on_event: Callable[[Event], None],
) -> Iterator[Callable[[Event], None]]:
    """Serve the HTTP pages if `HTTP_PORT` is set; training does not depend on them.

    Yields:
        Receives every event, for `on_event` and the pages.
    """
    if "http_port" not in settings.pages.model_fields_set:
        yield on_event
        return
    # pylint: disable-next=import-outside-toplevel  # only needed if HTTP_PORT is set
    from consumer.pages.local import local_pages

    try:
        pages, condition = local_pages(
            settings.pages.http_host,
            settings.pages.http_port,
            kind,
            machine,
            settings.trainer.base_model,
        )
    except ConfigurationError as error:
        log.warning("pages_not_served", reason=str(error))
        yield on_event
        return

    def both(event: Event) -> None:
        condition.saw(event)
        on_event(event)

    with pages:
        yield both


def _hand_over(finished: Finished, output: Path) -> None:
    for name in finished.files:
        os.replace(Path(finished.folder) / name, output / name)


def _hand_over_curves(made: Path, target: Path) -> None:
    """Add the curves to those of earlier trainings.

    TensorBoard shows the newest: steps count from 0 again.
    """
    if made.is_dir():
        target.mkdir(exist_ok=True)
        for file in made.iterdir():
            os.replace(file, target / file.name)


def _make_folder(work: Path, output: Path, *, emptied: bool) -> None:
    try:
        if emptied:
            shutil.rmtree(work, ignore_errors=True)
        (work / _TEMPORARY).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"--output: {output} cannot be written ({error.strerror}). Choose another folder."
        ) from error


def _checked(trigger_word: str) -> str:
    try:
        return checked_trigger_word(trigger_word)
    except ValueError as error:
        raise ConfigurationError(f"the trigger word {error}") from error


def _refuse_to_overwrite(images: tuple[TrainingImage, ...], folder: Path, output: Path) -> None:
    """An image that happens to be named as something that a training writes would be lost."""
    lost = sorted(MADE.intersection(image.source for image in images))
    if lost and output.resolve() == folder.resolve():
        raise ConfigurationError(
            f"{output} holds {', '.join(lost)}, which the training would overwrite: choose "
            "another output folder, or rename it"
        )


def _refuse_unprintable(output: Path, base_model: str) -> None:
    """Refuse a path that is not UTF-8: the libraries that write the model's files take none.

    Without this check, they would fail only after the training.
    """
    for name, path in (("--output", str(output.absolute())), ("BASE_MODEL", base_model)):
        if not is_unicode(path):
            raise ConfigurationError(
                f"{name}: {printable(path)} is not UTF-8. Rename it, or choose another folder."
            )


def _look_for_base_model(name: str) -> None:
    """Refuse a missing folder, or one of another family, before anything starts."""
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ConfigurationError(f"BASE_MODEL: the folder {name} does not exist. Correct the path.")
    if refused := base_models.refusal_of(name):
        raise ConfigurationError(refused)


def _newest_checkpoint(work: Path) -> str | None:
    complete = [manifest.parent for manifest in (work / "checkpoints").glob(f"*/{_MANIFEST}")]
    newest = max(complete, key=lambda folder: order(folder.name), default=None)
    return str(newest) if newest else None
