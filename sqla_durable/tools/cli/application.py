"""The command line as a whole: its commands, and what happens to their errors.

What a command needs is imported when it is executed, so that `--help` imports neither SQLAlchemy nor a worker.
"""

from __future__ import annotations

from typing import Annotated

import typer

import sqla_durable
from sqla_durable.tools.cli.bench import bench
from sqla_durable.tools.cli.doctor import doctor
from sqla_durable.tools.cli.errors import fail
from sqla_durable.tools.cli.exporting import export
from sqla_durable.tools.cli.importing import import_
from sqla_durable.tools.cli.listing import list_workflows, queues, schedules, workers
from sqla_durable.tools.cli.metrics import metrics
from sqla_durable.tools.cli.migrating import migrate
from sqla_durable.tools.cli.prune import prune
from sqla_durable.tools.cli.queueing import queue
from sqla_durable.tools.cli.roles import roles
from sqla_durable.tools.cli.scheduling import schedule
from sqla_durable.tools.cli.sending import signal, start, update
from sqla_durable.tools.cli.showing import show
from sqla_durable.tools.cli.torture import torture
from sqla_durable.tools.cli.verbs import cancel, change, delete, fork, resume, retry, rewind
from sqla_durable.tools.cli.watching import tail, top
from sqla_durable.tools.cli.worker import worker

app = typer.Typer(
    name="sqla-durable",
    help="Durable workflows in your own PostgreSQL.",
    no_args_is_help=True,
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
app.command("roles")(roles)
app.command("doctor")(doctor)
app.command("list")(list_workflows)
app.command("show")(show)
app.command("tail")(tail)
app.command("top")(top)
app.command("queues")(queues)
app.command("workers")(workers)
app.command("schedules")(schedules)
for _each in (start, signal, update, cancel, resume, retry, rewind, fork, change, delete, export, migrate):
    app.command(_each.__name__)(_each)
app.command("import")(import_)
app.add_typer(queue)
app.add_typer(schedule)
app.command("metrics")(metrics)
app.command("prune")(prune)
app.command("torture")(torture)
app.command("bench")(bench)
