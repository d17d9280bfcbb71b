"""The commands for ops, as they are typed. Each is a few lines: what it does is in its own module.

Nothing that these need is imported before one of them runs: `--help` and `train` want neither pika
nor boto3.
"""

# pylint: disable=import-outside-toplevel

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import config
from utils import logger
from utils.errors import ConfigurationError

if TYPE_CHECKING:
    from consumer.ops.order import Order
    from services.s3_service import S3Service

DONE, FAILED, INTERRUPTED = 0, 1, 130
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="More settings, in TOML or JSON; the environment wins."),
]
Json = Annotated[bool, typer.Option("--json", help="For scripts: JSON on standard output.")]


def add_commands(app: typer.Typer, end: Callable[[Callable[[], int]], None]) -> None:
    """Add the commands to the program's.

    Args:
        app: The program's command line.
        end: Runs a command, tells its error as a sentence, and ends with its exit code.
    """

    @app.command()
    def publish(
        folder: Annotated[
            Path, typer.Argument(help="Folder of pictures; `name.txt` captions `name.jpg`.")
        ],
        style_id: Annotated[int, typer.Option(help="The style that is trained.")],
        task_id: Annotated[
            str | None, typer.Option(help="The job's id; made if not given.")
        ] = None,
        tag: Annotated[list[str] | None, typer.Option(help="Once or more.")] = None,
        parameter: Annotated[
            list[str] | None, typer.Option(help="NAME=VALUE, once or more: epochs=200.")
        ] = None,
        wait: Annotated[bool, typer.Option("--wait", help="Until the job has ended.")] = False,
        as_json: Json = False,
        config_file: ConfigFile = None,
    ) -> None:
        """Order a training: pictures to S3, and a message to the queue.

        Exit code 0: it was published, and with --wait has completed; 1: it failed.
        """

        def order() -> int:
            parameters = _parameters(parameter or [])
            return _publish(
                _Server.of(config_file), folder, style_id, task_id, tag, parameters, wait, as_json
            )

        end(order)

    @app.command()
    def jobs(
        tasks: Annotated[list[str] | None, typer.Argument(help="These; none: the newest.")] = None,
        live: Annotated[
            bool, typer.Option("--live", help="Only those that are not settled.")
        ] = False,
        limit: Annotated[int, typer.Option(min=1, help="No more than so many.")] = 50,
        as_json: Json = False,
        config_file: ConfigFile = None,
    ) -> None:
        """Show the jobs' records on S3: state, owner, attempts, ending, and who has heard of it.

        Exit code 1: a record that was asked for is not there, or cannot be read.
        """
        end(lambda: _jobs(_Server.of(config_file), tasks or [], live, limit, as_json))

    @app.command()
    def cancel(
        task: Annotated[str, typer.Argument(help="The job's id.")],
        as_json: Json = False,
        config_file: ConfigFile = None,
    ) -> None:
        """Have a job cancelled, wherever it is; its worker sees it within a quarter of a lease."""
        end(lambda: _cancel(_Server.of(config_file), task, as_json))

    @app.command()
    def redrive(
        tasks: Annotated[list[str] | None, typer.Argument(help="Send these back.")] = None,
        everything: Annotated[bool, typer.Option("--all", help="Send all back.")] = False,
        as_json: Json = False,
        config_file: ConfigFile = None,
    ) -> None:
        """Look into the dead queue, or send messages back from it, each as a fresh attempt.

        Without a task and without --all nothing is changed. Exit code 1: something that was to be
        sent back was not; it lies where it was.
        """
        end(lambda: _redrive(_Server.of(config_file), tasks or [], everything, as_json))


@dataclasses.dataclass(frozen=True, slots=True)
class _Server:
    """What the commands speak of: the settings, and the storage that they name."""

    settings: config.Settings
    s3: S3Service
    state_s3: S3Service

    @classmethod
    def of(cls, config_file: Path | None) -> _Server:
        """As the settings say."""
        from consumer.desk import open_s3, open_state_s3

        settings: config.Settings = config.load(file=config_file)
        logger.configure(level="ERROR", log_format="text", secrets=settings.secrets())
        return cls(settings, open_s3(settings), open_state_s3(settings))

    @property
    def state(self) -> str:
        """The state bucket."""
        return self.settings.state_bucket_name


def _publish(
    server: _Server,
    folder: Path,
    style_id: int,
    task_id: str | None,
    tags: list[str] | None,
    parameters: dict[str, Any],
    wait: bool,
    as_json: bool,
) -> int:
    from consumer.ops import order, screen

    with screen.JobBar() as shown:
        placed = order.place(
            server.settings,
            server.s3,
            folder,
            state_s3=server.state_s3,
            style_id=style_id,
            task_id=task_id,
            tags=tags or (),
            parameters=parameters,
            on_upload=shown.uploaded,
        )
    if wait:
        return _wait(server, placed, as_json)
    if as_json:
        screen.print_json(dataclasses.asdict(placed))
    else:
        screen.say(f"published {placed.task_id}: style {style_id}, {len(placed.images)} pictures")
    return DONE


def _wait(server: _Server, placed: Order, as_json: bool) -> int:
    from consumer.ops import screen
    from consumer.ops.follow import follow

    if not as_json:
        screen.say(f"published {placed.task_id}; Ctrl-C ends the waiting, not the job")
    try:
        with screen.JobBar() as shown:
            job = follow(server.state_s3, server.state, placed.task_id, shown.saw)
    except KeyboardInterrupt:
        screen.say(f"the job goes on: main.py jobs {placed.task_id}")
        return INTERRUPTED
    completed = job.ending == "complete"
    if as_json:
        screen.print_json(dataclasses.asdict(placed) | {"job": dataclasses.asdict(job)})
    else:
        told = ": ".join(filter(None, (placed.task_id, job.ending, job.model_url or job.detail)))
        screen.say(told, "green" if completed else "red")
    return DONE if completed else FAILED


def _jobs(server: _Server, tasks: list[str], live: bool, limit: int, as_json: bool) -> int:
    from consumer.ops import screen
    from consumer.ops.job_view import view
    from services.record_listing import look_up, newest

    if tasks:
        found, more = look_up(server.state_s3, server.state, tasks), 0
    else:
        found, more = newest(server.state_s3, server.state, limit=limit, unsettled_only=live)
    views = [view(one) for one in found]
    screen.jobs(views, more, as_json=as_json)
    return FAILED if any(one.state == "unknown" for one in views) else DONE


def _cancel(server: _Server, task: str, as_json: bool) -> int:
    from consumer.ops import screen
    from consumer.ops.cancel import cancel

    record = cancel(server.state_s3, server.state, task)
    looks_every = record.hold.lease_seconds / 4 if record else None
    if as_json:
        screen.print_json({"task_id": task, "looked_for_every_seconds": looks_every})
    elif looks_every is None:
        screen.say(
            f"{task} will be cancelled as soon as a worker takes it. None has seen it yet: "
            "is the id right?"
        )
    else:
        screen.say(f"{task} will be cancelled; its worker looks every {looks_every:.0f} s")
    return DONE


def _redrive(server: _Server, tasks: list[str], everything: bool, as_json: bool) -> int:
    from consumer.ops import redrive, screen

    if tasks and everything:
        raise ConfigurationError("name tasks or say --all, not both")
    if not tasks and not everything:
        letters, more = redrive.look(server.settings)
        screen.dead(letters, more, as_json=as_json)
        return DONE
    done, more = redrive.send_back(server.settings, server.state_s3, None if everything else tasks)
    screen.redriven(done, more, as_json=as_json)
    missing = set(tasks) - {one.task_id for one in done}
    if missing and not as_json:
        screen.say(f"not in the dead queue: {', '.join(sorted(missing))}", "yellow")
    return FAILED if missing or not all(one.sent_back for one in done) else DONE


def _parameters(given: list[str]) -> dict[str, Any]:
    """`NAME=VALUE`, a value read as JSON where it is that; whether it may be is judged later."""
    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise ConfigurationError(f"--parameter {each}: NAME=VALUE is wanted, epochs=200 say")
        try:
            found[name] = json.loads(value)
            json.dumps(found[name], allow_nan=False)
        except ValueError:  # no JSON, or no number that JSON has: judged as the text that it is
            found[name] = value
    return found
