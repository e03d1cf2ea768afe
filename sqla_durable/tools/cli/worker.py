"""The command `worker`: claims workflows and executes them until it is stopped."""

from __future__ import annotations

import gc
import logging
import os
import shlex
import signal
import sys
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from sqla_durable.tools.cli.errors import DONE, INTERRUPTED, CommandError
from sqla_durable.tools.cli.times import duration_option

if TYPE_CHECKING:
    from sqla_durable import Worker

_LEASE, _POLL_INTERVAL, _GRACE = timedelta(seconds=30), timedelta(seconds=1), timedelta(seconds=20)
_START_TIMEOUT = timedelta(minutes=1)
_TIME_AFTER_GRACE = timedelta(seconds=20)  # without a database a worker leaves some ten after its grace
_LEVELS = ("debug", "info", "warning", "error")


def worker(
    durable: Annotated[str, typer.Argument(metavar="MODULE:ATTRIBUTE", help="The Durable object: shop:durable.")],
    queue: Annotated[
        list[str] | None,
        typer.Option(help="A queue to claim from, repeatable; by default those of its workflows, and 'default'."),
    ] = None,
    version: Annotated[
        list[str] | None,
        typer.Option(help="A version of the code whose workflows it claims, repeatable; by default all of them."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="How many workflows it executes at once.")] = 100,
    lease: Annotated[
        timedelta, duration_option("--lease", help="How long its claims hold after a heartbeat.", default=_LEASE)
    ] = _LEASE,
    poll_interval: Annotated[
        timedelta,
        duration_option("--poll-interval", help="How long it waits between two polls.", default=_POLL_INTERVAL),
    ] = _POLL_INTERVAL,
    grace: Annotated[
        timedelta, duration_option("--grace", help="How long a stop waits for steps being executed.", default=_GRACE)
    ] = _GRACE,
    start_timeout: Annotated[
        timedelta,
        duration_option(
            "--start-timeout",
            help="How long it waits at its start for an unavailable database.",
            default=_START_TIMEOUT,
        ),
    ] = _START_TIMEOUT,
    listen: Annotated[
        bool | None, typer.Option(help="Whether to listen for hints; by default it does, unless behind a pooler.")
    ] = None,
    max_attempts: Annotated[int, typer.Option(min=1, help="After how many crashes in a row a workflow fails.")] = 10,
    name: Annotated[str | None, typer.Option(help="Its name in the worker table; by default host:pid.")] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="The database; by default that of the Durable object, else DATABASE_URL, which hides the password."
        ),
    ] = None,
    log_level: Annotated[str, typer.Option(help=f"What to log to stderr: {', '.join(_LEVELS)}.")] = "info",
    log_finished: Annotated[
        bool, typer.Option("--log-finished", help="Also log a line for each workflow that succeeds.")
    ] = False,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="Stop when nothing waits in its queues, and it executes nothing.")
    ] = False,
    processes: Annotated[
        str, typer.Option(metavar="N", help="How many worker processes there are; auto: one for each core.")
    ] = "1",
    health_port: Annotated[
        int | None, typer.Option(metavar="PORT", min=0, max=65_535, help="Where to answer /live and /ready over HTTP.")
    ] = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Start again when a Python file changes here; for development.")
    ] = False,
    supervised: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Claim workflows and execute them.

    SIGTERM and SIGINT stop it in good order: running steps are finished and workflows released. A second signal ends
    it at once. With --processes a supervisor starts as many workers, and replaces those that end; SIGHUP makes it
    replace all of them, one after the other.

    Modules are searched in the current directory first, so run it only where nobody else may write; with
    PYTHONSAFEPATH=1 they are searched only in PYTHONPATH and where Python is installed.
    """
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, _stop_before_start)  # until the worker handles them itself
    from sqla_durable.tools.cli.supervisor import Link, process_count

    if reload:
        _run_reloading(grace)
    count = process_count(processes)
    # With `auto` on one core too: SIGHUP has the same meaning on every machine.
    if supervised is None and (count > 1 or processes == "auto"):
        if until_empty:
            raise CommandError("--until-empty is for one process: a supervisor replaces those that end.")
        raise typer.Exit(_supervise(count, grace=grace, log_level=log_level, health_port=health_port))

    from sqla_durable import Worker
    from sqla_durable.tools.cli.supervised import connect
    from sqla_durable.tools.cli.target import load, sessionmakers

    link = Link(supervised) if supervised else None
    if link is not None and name is not None:
        name = f"{name}-{link.number}"
    application = load(durable)
    _set_up_logging(log_level, finished=log_finished)
    opened = sessionmakers(application, url, processes=count)
    try:
        chosen = Worker(
            application,
            sessionmaker=opened.sync,
            async_sessionmaker=opened.asynchronous,
            queues=queue or None,
            versions=version or None,
            concurrency=concurrency,
            lease=lease,
            poll_interval=poll_interval,
            grace=grace,
            start_timeout=start_timeout,
            listen=listen,
            max_attempts=max_attempts,
            name=name,
            until_empty=until_empty,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    gc.collect()
    gc.freeze()  # what is imported stays: the collector need not look at it again and again
    if link is None:
        _run_watched(chosen, health_port)
    else:  # the supervisor answers probes
        connect(link, chosen, opened, count)
        _run(chosen)


def _run_watched(chosen: Worker, health_port: int | None) -> None:
    """Run a worker, and answer those who watch it."""
    from sqla_durable.tools.cli.health import announce, watched

    chosen._started.add_done_callback(announce)  # pyright: ignore[reportPrivateUsage] (it has no public name)
    with watched(health_port, is_live=chosen.responds, is_ready=lambda: chosen.is_serving):
        _run(chosen)


def _run_reloading(grace: timedelta) -> NoReturn:
    """Run this command without `--reload`, and start it again when a Python file changes in the current directory."""
    try:
        import watchfiles
    except ImportError:
        raise CommandError("--reload needs the package watchfiles: pip install watchfiles.") from None
    command = [sys.executable, "-m", "sqla_durable", *(each for each in sys.argv[1:] if each != "--reload")]
    stop_within = int((grace + _TIME_AFTER_GRACE).total_seconds())
    watchfiles.run_process(
        ".",
        target=shlex.join(command),
        target_type="command",
        watch_filter=watchfiles.PythonFilter(),
        sigint_timeout=stop_within,
    )
    raise typer.Exit(DONE)


def _run(chosen: Worker) -> None:
    """Run a worker until it is stopped; exit at once where steps are left behind in threads."""
    try:
        chosen.run()
    except KeyboardInterrupt:  # the second signal
        _exit_without_threads(INTERRUPTED)
    if chosen.left_behind:
        _exit_without_threads(DONE)


def _supervise(count: int, *, grace: timedelta, log_level: str, health_port: int | None) -> int:
    """Supervise worker processes of this command; return the exit code."""
    from sqla_durable.definitions.log import worker_name
    from sqla_durable.tools.cli.health import announce, watched
    from sqla_durable.tools.cli.supervisor import Supervisor, worker_command

    worker_name.set("supervisor")
    _set_up_logging(log_level)
    stop_within = (grace + _TIME_AFTER_GRACE).total_seconds()
    supervisor = Supervisor(worker_command, count, stop_within=stop_within, on_ready=announce)
    with watched(health_port, is_live=lambda: supervisor.all_answer, is_ready=lambda: supervisor.all_serve):
        return supervisor.run()


def _stop_before_start(_number: int, _frame: FrameType | None) -> NoReturn:
    """Exit: there is nothing to release yet."""
    raise SystemExit(DONE)


def _exit_without_threads(code: int) -> NoReturn:
    """End the process without joining threads that are still in a step; they cannot commit anything."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _set_up_logging(level: str, *, finished: bool = False) -> None:
    """Log to stderr, unless the application set up its own logging when it was imported."""
    if level.lower() not in _LEVELS:
        raise CommandError(f"--log-level {level!r} is none of {', '.join(_LEVELS)}.")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(worker)s %(message)s"))
    handler.addFilter(_add_worker_name)
    logging.basicConfig(handlers=[handler])
    logging.getLogger("sqla_durable").setLevel(level.upper())
    if finished:
        logging.getLogger("sqla_durable.finished").setLevel(logging.INFO)


def _add_worker_name(record: logging.LogRecord) -> bool:
    """Add the worker's name to a log record, also to those of the application's own loggers."""
    from sqla_durable.definitions.log import one_line, worker_name

    record.worker = one_line(worker_name.get())
    return True
