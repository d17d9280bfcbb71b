"""The commands and their options, as a person types them.

Each command imports what it needs when it runs: `--help` and `train` need neither pika nor boto3.
"""

# pylint: disable=import-outside-toplevel

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.program import end
from utils.errors import ConfigurationError

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="More settings, in TOML or JSON; the environment wins."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Yes = Annotated[bool, typer.Option("--yes", help="Answer yes to all questions.")]
_SHORT = "The first characters of an id are enough if they match one id only."


def _epochs(given: str) -> int:
    """A number, or `auto` as `jobs.fields.AUTO`."""
    from jobs.fields import AUTO, AUTO_WORD

    if given == AUTO_WORD:
        return AUTO
    if not given.isdecimal():
        raise typer.BadParameter("must be a whole number or auto")
    return int(given)


def add_commands(app: typer.Typer) -> None:
    """Add all commands to the program."""
    for command in (
        worker,
        up,
        doctor,
        inspect,
        train,
        publish,
        jobs,
        cancel,
        pause,
        resume,
        redrive,
    ):
        # Line breaks inside a paragraph of a docstring would show in the help.
        paragraphs = (command.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(each.split()) for each in paragraphs)
        app.command(help=text)(command)


def worker(
    once: Annotated[
        bool, typer.Option("--once", help="Take one training message, then exit.")
    ] = False,
    idle_seconds: Annotated[
        float,
        typer.Option(min=0, help="With --once: exit after this many seconds without a message."),
    ] = 60.0,
    config_file: ConfigFile = None,
) -> None:
    """Take training jobs from RabbitMQ until SIGTERM or Ctrl-C.

    Settings come from the environment and `.env`; `.env.example` documents each.
    """
    from cli.worker import run

    run(config_file, idle_seconds if once else None)


def up(
    data: Annotated[Path, typer.Option(help="Folder of all data; kept over restarts.")] = Path(
        "data"
    ),
    stand_in: Annotated[
        bool,
        typer.Option(
            "--stand-in", help="Train a toy in place of a base model: its images are noise."
        ),
    ] = False,
) -> None:
    """Run everything on this machine: API, worker, RabbitMQ and S3.

    Prints the address and a key, and runs until Ctrl-C. The next start continues with the same
    jobs, models and key. API_PORT changes the port; settings of training come from the
    environment and `.env`.

    Exit code 1: a server did not start; 2: it runs already, or no base model can be trained.
    """

    def start() -> int:
        from cli.up import run

        return run(data, stand_in=stand_in)

    end(start)


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
    """Test everything that a worker needs, and print a remedy for each problem.

    Exit code 0: a worker can be started; 1: a test failed; 2: the settings are wrong.
    """
    from cli.doctor import command

    if policy:
        sys.exit(command.print_policy(config_file=config_file))
    sys.exit(command.run(as_json=as_json, show_all=show_all, config_file=config_file))


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
    from cli.inspect import run

    sys.exit(run(file, as_json=as_json, show_all=show_all))


def train(  # pylint: disable=too-many-locals  # one for each option
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of images (`name.txt` captions `name.jpg`), or a file of conversations."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder that receives the model, report and samples.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            parser=_epochs,
            metavar="N|auto",
            help="Passes over the images; auto: by the number of images.",
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per forward pass.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the training images.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Alpha of the LoRA.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    deliver: Annotated[
        str | None, typer.Option(help="Which checkpoint becomes the model: last or best.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Folder of images that measure quality and are not trained on."),
    ] = None,
    trigger_word: Annotated[
        str, typer.Option(help="A word in front of every caption, which later calls the style.")
    ] = "",
    resume: Annotated[  # pylint: disable=redefined-outer-name  # the command below
        bool, typer.Option(help="Continue from the newest checkpoint in OUTPUT.")
    ] = False,
    validate_only: Annotated[
        bool, typer.Option("--validate-only", help="Report on the data, and do not train.")
    ] = False,
    kind: Annotated[str, typer.Option(help="style (images) or llm (conversations).")] = "style",
    base_model: Annotated[
        str | None, typer.Option(help="Base of a language model: a hub name or a local folder.")
    ] = None,
    config_file: ConfigFile = None,
) -> None:
    """Train on a folder of images: no broker, no S3, no backend.

    All other settings come from the environment and `.env`, as for the worker.

    Exit code 0: trained, or with --validate-only enough images can be used; 1: it failed, or too
    few can; 2: the settings or arguments are wrong; 4: this machine cannot train; 130: it was
    interrupted.
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
    how = {"validation": validation, "trigger_word": trigger_word, "resume": resume}

    def work() -> int:
        from cli.training import language
        from cli.training import style as style_training

        if kind == "llm":
            return language.train(
                folder,
                output,
                overrides | {"resolution": None},
                config_file,
                base_model=base_model,
                validation=validation,
                resume=resume,
                validate_only=validate_only,
            )
        if kind != "style":
            raise ConfigurationError(f"--kind: {kind} is not style or llm.")
        if validate_only:
            return style_training.validate(
                folder, overrides, config_file, validation=validation, trigger_word=trigger_word
            )
        if output is None:
            raise ConfigurationError("--output is missing. Name the folder for the model.")
        return style_training.run(folder, output, overrides, config_file, how)

    end(work)


def publish(
    folder: Annotated[
        Path, typer.Argument(help="Folder of images; `name.txt` captions `name.jpg`.")
    ],
    style_id: Annotated[int, typer.Option(help="The style to train.")],
    task_id: Annotated[
        str | None, typer.Option(help="The job's id; a random one by default.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag; may be repeated.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, such as epochs=200; may be repeated.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the job until it has ended.")
    ] = False,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Order a training: upload images to S3 and publish a message.

    If the style already has a published model and this job fails or is cancelled, the
    platform's backend marks the whole style as failed.

    Exit code 0: it was published, and with --wait has completed; 1: it failed.
    """

    def order() -> int:
        from cli import actions

        return actions.publish(
            _server(config_file),
            folder,
            style_id,
            task_id=task_id,
            tags=tag or (),
            parameters=_parameters(parameter or []),
            wait=wait,
            as_json=as_json,
        )

    end(order)


def jobs(
    tasks: Annotated[
        list[str] | None, typer.Argument(help=f"Show every detail of these jobs. {_SHORT}")
    ] = None,
    style: Annotated[int | None, typer.Option(help="Only the jobs of this style.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Only jobs that are not settled.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="The most jobs to show.")] = 50,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """List jobs by their records on S3, or show every detail of some.

    A refused message is found by its task id.

    Exit code 1: a requested record does not exist or cannot be read.
    """

    def show() -> int:
        from cli import actions

        return actions.jobs(
            _server(config_file), tasks or [], style, live=live, limit=limit, as_json=as_json
        )

    end(show)


def cancel(
    task: Annotated[str | None, typer.Argument(help=f"The job's id. {_SHORT}")] = None,
    style: Annotated[
        int | None,
        typer.Option(help="Cancel the live job of this style. Asks if there are several."),
    ] = None,
    newest: Annotated[
        bool, typer.Option("--newest", help="With --style: the newest job only.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="With --style: all live jobs.")] = False,
    yes: Yes = False,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Cancel a job. Its worker sees the request within a quarter of a lease.

    If the style already has a published model, the platform's backend marks the whole style as
    failed when a new training of it is cancelled.
    """

    def ask() -> int:
        from cli import actions

        if style is None and (newest or everything):
            raise ConfigurationError(
                "--newest and --all choose among the jobs of a style. Add --style N, or leave the "
                "option out."
            )
        if newest and everything:
            raise ConfigurationError("Use --newest or --all, not both.")
        meant = None if style is None else actions.Style(style, newest, everything)
        return actions.cancel(_server(config_file), task, meant, yes=yes, as_json=as_json)

    end(ask)


def pause(
    task: Annotated[str, typer.Argument(help=f"The job's id. {_SHORT}")],
    yes: Yes = False,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Pause a job. Its worker saves a checkpoint and takes the next job.

    A paused job waits until it is resumed or cancelled. The time counts in no limit.
    """

    def ask() -> int:
        from cli import actions

        return actions.pause(_server(config_file), task, yes=yes, as_json=as_json)

    end(ask)


def resume(
    task: Annotated[str, typer.Argument(help=f"The job's id. {_SHORT}")],
    yes: Yes = False,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Resume a paused job. It waits in the queue and continues from its last checkpoint."""

    def ask() -> int:
        from cli import actions

        return actions.resume(_server(config_file), task, yes=yes, as_json=as_json)

    end(ask)


def redrive(
    tasks: Annotated[
        list[str] | None, typer.Argument(help=f"Task ids to send back. {_SHORT}")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Send back everything in the dead queue.")
    ] = False,
    include_superseded: Annotated[
        bool,
        typer.Option(
            "--include-superseded",
            help="With --all: also jobs of styles that have a later order.",
        ),
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """List messages and jobs that were given up, or send some back.

    Each job that is sent back gets a new attempt. An ending that the backend refused is only sent
    again. A job without a message in the dead queue is sent back by its record if its task id is
    given. Without a task and without --all, nothing changes.

    If a style has a later order, the model of a job that is sent back is only archived. If a
    style has a published model and the new attempt fails, the platform's backend marks the whole
    style as failed.

    Exit code 1: at least one was not sent back; it stays in its place.
    """

    def send() -> int:
        from cli import actions

        return actions.redrive(
            _server(config_file),
            tasks or [],
            everything=everything,
            include_superseded=include_superseded,
            yes=yes,
            as_json=as_json,
        )

    end(send)


def _server(config_file: Path | None) -> Any:
    from cli.server import Server

    return Server.of(config_file)


def _parameters(given: list[str]) -> dict[str, Any]:
    """`NAME=VALUE`, a value read as JSON where it is that; whether it may be is judged later."""
    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise ConfigurationError(f"--parameter {each}: must be NAME=VALUE, such as epochs=200")
        try:
            found[name] = json.loads(value)
            json.dumps(found[name], allow_nan=False)
        except ValueError:  # no JSON, or no number that JSON has: judged as the text that it is
            found[name] = value
    return found
