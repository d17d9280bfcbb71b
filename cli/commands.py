"""The commands for ops, as they are typed.

Nothing that these need is imported before one of them runs: `--help` and `train` want neither pika
nor boto3.
"""

# pylint: disable=import-outside-toplevel

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from utils.errors import ConfigurationError

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="More settings, in TOML or JSON; the environment wins."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; the answer is yes.")]
_SHORT = "The beginning of an id is enough if no other id begins like it."


def add_commands(app: typer.Typer, end: Callable[[Callable[[], int]], None]) -> None:
    """Add the commands to the program's.

    Args:
        app: The program's command line.
        end: Runs a command, prints its error as a sentence, and ends with its exit code.
    """

    @app.command()
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
        """Order a training: images to S3, and a message to the queue.

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

    @app.command()
    def jobs(
        tasks: Annotated[
            list[str] | None, typer.Argument(help=f"Show every detail of these. {_SHORT}")
        ] = None,
        style: Annotated[int | None, typer.Option(help="Only the jobs of this style.")] = None,
        live: Annotated[
            bool, typer.Option("--live", help="Only those that are not settled.")
        ] = False,
        limit: Annotated[int, typer.Option(min=1, help="The most jobs to show.")] = 50,
        as_json: Json = False,
        config_file: ConfigFile = None,
    ) -> None:
        """Show the jobs' records on S3, one line each, or every detail of some.

        A refused message is found by the task id that it gave. Exit code 1: a record that was
        asked for does not exist, or cannot be read.
        """

        def show() -> int:
            from cli import actions

            return actions.jobs(
                _server(config_file), tasks or [], style, live=live, limit=limit, as_json=as_json
            )

        end(show)

    @app.command()
    def cancel(
        task: Annotated[str | None, typer.Argument(help=f"The job's id. {_SHORT}")] = None,
        style: Annotated[
            int | None, typer.Option(help="The live job of this style; asks if there are several.")
        ] = None,
        newest: Annotated[
            bool, typer.Option("--newest", help="With --style: the newest job only.")
        ] = False,
        everything: Annotated[
            bool, typer.Option("--all", help="With --style: all live jobs.")
        ] = False,
        yes: Yes = False,
        as_json: Json = False,
        config_file: ConfigFile = None,
    ) -> None:
        """Have a job cancelled, wherever it is; its worker sees it within a quarter of a lease.

        If the style already has a published model, the platform's backend marks the whole style as
        failed when a retrain of it is cancelled.
        """

        def ask() -> int:
            from cli import actions

            if style is None and (newest or everything):
                raise ConfigurationError("--newest and --all go with --style N.")
            if newest and everything:
                raise ConfigurationError("Use --newest or --all, not both.")
            meant = None if style is None else actions.Style(style, newest, everything)
            return actions.cancel(_server(config_file), task, meant, yes=yes, as_json=as_json)

        end(ask)

    @app.command()
    def redrive(
        tasks: Annotated[
            list[str] | None, typer.Argument(help=f"Send these back. {_SHORT}")
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
        """List the dead queue and jobs that were given up, or send some back.

        Each is sent back as a fresh attempt; a refused ending is only sent again. A job without a
        copy in the dead queue is sent back by its record, if its task id is given. Without a task
        and without --all nothing is changed.

        If a style has a later order, the model of a job that is sent back goes into the archive
        only. If a style has a published model and the new attempt fails, the platform's backend
        marks the whole style as failed.

        Exit code 1: something that was to be sent back was not; it is where it was.
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
