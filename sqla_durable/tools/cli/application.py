"""The command line as a whole: its commands, and how an error becomes a message and an exit code.

Exit codes: 0 done, 1 failed, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from sqla_durable.definitions.log import one_line
from sqla_durable.definitions.redaction import driver_message, message_of, notes_of
from sqla_durable.errors import DurableError
from sqla_durable.tools.cli.bench import bench
from sqla_durable.tools.cli.target import CommandError
from sqla_durable.tools.cli.torture import torture
from sqla_durable.tools.cli.worker import worker

FAILED, WRONG_COMMAND = 1, 2

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
    except CommandError as error:
        _fail(str(error), WRONG_COMMAND)
    except DurableError as error:
        _fail(str(error), FAILED)
    except SQLAlchemyError as error:
        _fail(" ".join([f"the database refused: {_reason(error)}", *notes_of(error)]), FAILED)


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        typer.echo(f"sqla-durable {version('sqla-durable')}")
        raise typer.Exit


def _fail(message: str, code: int) -> NoReturn:
    """Print one paragraph to stderr and exit."""
    paragraph = one_line(" ".join(message.split()), limit=10_000)
    print(f"sqla-durable: {paragraph}", file=sys.stderr)
    sys.exit(code)


def _reason(error: SQLAlchemyError) -> str:
    """Return the driver's message, without the statement and its parameters, which may hold secrets."""
    return driver_message(error.orig) if isinstance(error, DBAPIError) and error.orig else message_of(error)


app.command("worker")(worker)
app.command("torture")(torture)
app.command("bench")(bench)
