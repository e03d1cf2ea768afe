"""The command `doctor`: examines a database, and says what is wrong or will hurt."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from sqla_durable.tools.cli.database import App, Schema, Url
from sqla_durable.tools.cli.errors import DONE, FOUND_ERRORS, FOUND_WARNINGS, CommandError
from sqla_durable.tools.cli.output import AsJson, Quiet
from sqla_durable.tools.cli.times import duration_option

if TYPE_CHECKING:
    from sqla_durable.tools.doctor import Finding

_PATIENCE = timedelta(minutes=5)


def doctor(
    url: Url = None,
    app: App = None,
    schema: Schema = None,
    patience: Annotated[
        timedelta, duration_option("--patience", help="From when on a wait is a finding.", default=_PATIENCE)
    ] = _PATIENCE,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", metavar="CODE", help="Leave out this finding; repeat it.")
    ] = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Examine a database: what is wrong with it, or will hurt, and what to do. Reads only.

    Exit codes: 0 nothing, or notes only; 3 warnings; 4 errors.
    """
    from sqla_durable.tools.cli.database import engine_of
    from sqla_durable.tools.doctor import examine

    ignored = _codes(ignore or [])
    engine = engine_of(url, app, schema)
    try:
        found = [each for each in examine(engine, patience=patience) if each.code not in ignored]
    finally:
        engine.dispose()
    _print(found, json=json, quiet=quiet)
    raise typer.Exit(_exit_code(found))


def _codes(names: Sequence[str]) -> set[str]:
    from sqla_durable.tools.doctor import Code

    codes = [each.value for each in Code]
    for name in names:
        if name not in codes:
            raise CommandError(f"--ignore {name!r} is no finding: name one of {', '.join(codes)}.")
    return set(names)


def _print(found: Sequence[Finding], *, json: bool, quiet: bool) -> None:
    from sqla_durable.definitions.log import one_line
    from sqla_durable.tools.cli.output import print_json

    if json:
        columns = "severity", "code", "found", "todo", "values"
        print_json({name: getattr(each, name) for name in columns} for each in found)
    elif quiet:
        for code in dict.fromkeys(each.code for each in found):
            print(code)
    else:
        for each in found:
            print(f"{each.severity}: {each.code}: {one_line(each.found, limit=2_000)}")
            print(f"    {one_line(each.todo, limit=10_000)}")
        print(_summary(found))


def _summary(found: Sequence[Finding]) -> str:
    from sqla_durable.tools.doctor import Severity

    if not found:
        return "Nothing was found."
    numbers = [(sum(each.severity is severity for each in found), severity.value) for severity in Severity]
    return ", ".join(f"{number} {name if number == 1 else name + 's'}" for number, name in numbers if number) + "."


def _exit_code(found: Sequence[Finding]) -> int:
    from sqla_durable.tools.doctor import Severity

    severities = {each.severity for each in found}
    if Severity.ERROR in severities:
        return FOUND_ERRORS
    return FOUND_WARNINGS if Severity.WARNING in severities else DONE
