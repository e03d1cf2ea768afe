"""The command line as a whole: its commands, and what happens to their errors.

What a command needs is imported when it is executed, so that `--help` imports neither SQLAlchemy nor a worker.
"""

from __future__ import annotations

from typing import Annotated

import typer

import sqla_durable
from sqla_durable.tools.cli.bench import bench
from sqla_durable.tools.cli.errors import fail
from sqla_durable.tools.cli.prune import prune
from sqla_durable.tools.cli.torture import torture
from sqla_durable.tools.cli.worker import worker

app = typer.Typer(
    name="sqla-durable",
    help="Durable workflows in your own PostgreSQL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line of this process and exit.

    Raises:
        SystemExit: always, with the exit code.
    """
    try:
        app()
    except Exception as error:
        fail(error)


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        typer.echo(f"sqla-durable {sqla_durable.__version__}")
        raise typer.Exit


app.command("worker")(worker)
app.command("prune")(prune)
app.command("torture")(torture)
app.command("bench")(bench)
