"""The training server's command line. `cli/program.py` lists the exit codes."""

from __future__ import annotations

import typer

from cli.api import app as api_app
from cli.commands import add_commands, worker
from cli.program import EXIT_BROKER, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MACHINE, EXIT_SETTINGS

__all__ = ["EXIT_BROKER", "EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_MACHINE", "EXIT_SETTINGS", "app"]

app = typer.Typer(
    help="Trains a LoRA of an artist's style on Stable Diffusion 1.5.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    """Without a command, `worker` runs."""
    if context.invoked_subcommand is None:
        worker()


add_commands(app)
app.add_typer(api_app, name="api")

if __name__ == "__main__":
    app()
