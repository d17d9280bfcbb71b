"""`main.py api`: serve the API, and its commands for operators.

Each command imports what it needs when it runs, because other commands need no web server.
"""

# pylint: disable=import-outside-toplevel

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.program import console, end
from utils.errors import ConfigurationError

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="More settings, in TOML or JSON; the environment wins."),
]

app = typer.Typer(
    help="Serve the API: order, follow and steer jobs over HTTP.", no_args_is_help=False
)
keys_app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


@app.callback(invoke_without_command=True)
def serve(context: typer.Context, config_file: ConfigFile = None) -> None:
    """Serve the API until SIGTERM or Ctrl-C.

    Without API_DATABASE_URL the database is SQLite in data/api.db. The first start prints an admin
    key, once.
    """
    if context.invoked_subcommand is not None:
        return

    def run() -> int:
        from api.app import create, first_key
        from api.serve import serve as serve_app

        settings = _settings(config_file)
        application = create(settings)
        if secret := first_key(application, settings):
            console.print(
                f"The first start has made an admin key, which is shown only now: {secret}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        if settings.api.api_open:
            console.print("API_OPEN=true: every caller on this machine is served without a key.")
        address = f"http://{settings.api.api_host}:{settings.api.api_port}"
        console.print(f"API: {address} (page at /, docs at /docs)", highlight=False)
        serve_app(application, settings.api.api_host, settings.api.api_port)
        return 0

    _end(run)


@app.command()
def migrate(config_file: ConfigFile = None) -> None:
    """Bring the database's tables to this version. A starting server does the same."""

    def run() -> int:
        from api.app import database_url
        from api.store.database import Database
        from api.store.migrating import migrate as run_migrations

        version = run_migrations(Database(database_url(_settings(config_file))))
        typer.echo(f"The tables have the version {version}.")
        return 0

    _end(run)


@app.command()
def reconcile(config_file: ConfigFile = None) -> None:
    """Compare all jobs with their records on S3, and restore jobs that the database lost.

    Run it after the database was restored from a backup. It cancels nothing.
    """

    def run() -> int:
        from api.app import open_services
        from api.life.restore import reconcile as compare

        services, _ = open_services(_settings(config_file))
        found = compare(services)
        typer.echo(
            f"{found.restored} jobs restored, {found.changed} changed, {found.looked_at} looked at."
        )
        return 0

    _end(run)


@keys_app.command("create")
def create_key(
    org: Annotated[str, typer.Option(help="The organisation; made if it does not exist.")],
    name: Annotated[str, typer.Option(help="A name for people.")] = "key",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="admin, train, infer or read; may be repeated. The default is train."),
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, help="Days until the key expires.")] = None,
    config_file: ConfigFile = None,
) -> None:
    """Create an API key and print it, once."""

    def run() -> int:
        from api.gate.administration import create_key as create

        secret = create(_services(config_file), org, name, scope or ["train"], days)
        typer.echo(secret)
        return 0

    _end(run)


@keys_app.command("list")
def list_keys(
    org: Annotated[str | None, typer.Option(help="Only keys of this organisation.")] = None,
    config_file: ConfigFile = None,
) -> None:
    """List API keys as JSON lines, without the keys themselves."""

    def run() -> int:
        from api.gate.administration import list_keys as listed

        for each in listed(_services(config_file), org):
            typer.echo(json.dumps(each))
        return 0

    _end(run)


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The id of the key, `key_…`.")],
    config_file: ConfigFile = None,
) -> None:
    """Revoke an API key. Servers notice it within a second."""

    def run() -> int:
        from api.gate.administration import revoke_key as revoke

        if not revoke(_services(config_file), key_id):
            raise ConfigurationError(f"There is no key {key_id} that can be revoked.")
        return 0

    _end(run)


def _end(run: Callable[[], int]) -> None:
    """As `end`, with a sentence if the API is not installed, as in a worker's image."""

    def guarded() -> int:
        try:
            return run()
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"The API is not installed here: the module {error.name} is missing. Use the image "
                "of the target api, or install requirements-api.txt."
            ) from error

    end(guarded)


def _settings(config_file: Path | None) -> Any:
    import config

    return config.load_api(file=config_file)


def _services(config_file: Path | None) -> Any:
    from api.app import open_services

    return open_services(_settings(config_file))[0]
