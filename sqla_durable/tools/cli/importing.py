"""The command `import`: workflows with their histories, from what `export` has written."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NamedTuple, cast
from uuid import UUID

import typer

from sqla_durable.tools.cli.acting import Act, counted, warn
from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.groups import grouped

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.orm import Session

_AT_ONCE = 50
"""How many workflows one transaction inserts."""
_UNIQUE_VIOLATION = "23505"
_LISTS = "steps", "signals", "events", "stream_items"


class _Line(NamedTuple):
    number: int
    text: str
    id: UUID
    parent_id: UUID | None


@grouped
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What export has written, .gz too; - reads stdin.")],
    *,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave out workflows whose ids are there already.")
    ] = False,
    act: Act,
) -> None:
    """Insert workflows with their histories from JSON lines, 50 in each transaction.

    What was unfinished becomes cancelled, so that two databases never execute it: `resume` lets it go on. Needs the
    rights of the owner of the tables.
    """
    from sqlalchemy.exc import DBAPIError

    from sqla_durable.store import imports

    number = cancelled = 0
    orphans: dict[UUID, list[UUID]] = {}
    with act.session() as session, _opened(file) as lines:
        with session.begin():
            moment = imports.now(session)
        for portion in _portions(_parsed(lines, file)):
            new: Sequence[_Line] = portion
            try:
                with act.transaction(session):
                    known = imports.existing(session, [each.id for each in portion]) if skip_existing else set[UUID]()
                    new = list({each.id: each for each in portion if each.id not in known}.values())
                    done = imports.add(session, [each.text for each in new], moment=moment)
                    _link(session, portion, orphans)
                    imports.reserve_ids(session, done)
                    act.note_workflows(session, done.ids, "import", {"file": file.name})
            except DBAPIError as error:
                raise _refused(session, new, error, moment=moment, file=file, before=number) from None
            number, cancelled = number + len(done.ids), cancelled + done.cancelled
    if orphans:
        count = sum(map(len, orphans.values()))
        warn([f"The parents of {counted(count)} are not in this database: they have none now."])
    more = f", of which {cancelled:,} were unfinished and are cancelled: `resume` lets them go on" if cancelled else ""
    message = f"{counted(number)} imported{more}."
    act.print(message, value=number, verb="import", workflows=number, cancelled=cancelled)


def _link(session: Session, portion: Sequence[_Line], orphans: dict[UUID, list[UUID]]) -> None:
    """Link children of a portion with parents that are there, and earlier children with parents of the portion.

    Args:
        orphans: by parents that were not there yet, their children of earlier lines; it has them afterwards, too.
    """
    from sqla_durable.store import imports

    parents = {each.id: each.parent_id for each in portion if each.parent_id is not None}
    there = imports.existing(session, [*{*parents.values()}])
    for child, parent in parents.items():
        if parent not in there:
            orphans.setdefault(parent, []).append(child)
    linked = {child: parent for child, parent in parents.items() if parent in there}
    linked |= {child: each.id for each in portion for child in orphans.pop(each.id, [])}
    imports.link(session, linked)


def _refused(
    session: Session, lines: Sequence[_Line], error: DBAPIError, *, moment: datetime, file: Path, before: int
) -> CommandError:
    """Return the error that names the first of these lines that the database refuses also by itself."""
    from sqlalchemy.exc import DBAPIError

    from sqla_durable.definitions.database_errors import sqlstate
    from sqla_durable.definitions.redaction import driver_message
    from sqla_durable.store import imports

    which = f"lines {lines[0].number} to {lines[-1].number} of {file} cannot"
    for each in lines:
        try:
            imports.add(session, [each.text], moment=moment)
        except DBAPIError as of_line:
            which, error = f"line {each.number} of {file} cannot", of_line
            break
        finally:
            session.rollback()
    reason = driver_message(error.orig) if error.orig else str(error)
    hint = " --skip-existing leaves out what is there already." if sqlstate(error) == _UNIQUE_VIOLATION else ""
    return CommandError(
        f"{which} be imported: {reason}.{hint} {counted(before)} before it were imported, and nothing of its "
        f"{_AT_ONCE} lines and after them."
    )


def _portions(lines: Iterator[_Line]) -> Iterator[Sequence[_Line]]:
    while portion := list(islice(lines, _AT_ONCE)):
        yield portion


def _parsed(lines: IO[str], file: Path) -> Iterator[_Line]:
    """Yield the lines that are not empty.

    Raises:
        CommandError: one is not what `export` writes.
    """
    for number, text in enumerate(lines, 1):
        if text.strip():
            try:
                yield _line(number, text)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CommandError(
                    f"line {number} of {file} is not a workflow as `sqla-durable export` writes it ({error!r}): "
                    f"neither it nor what comes after it was imported, nor the lines before it in its {_AT_ONCE}."
                ) from None


def _line(number: int, text: str) -> _Line:
    found: dict[str, Any] = json.loads(text)
    row = cast("dict[str, Any]", found["workflow"])
    for each in ("name", "status", "input", "attempt", "created_at"):
        row[each]
    for each in _LISTS:
        if not isinstance(found[each], list):
            raise TypeError(f"{each} is no list")
    parent = row.get("parent_id")
    return _Line(number, text, UUID(row["id"]), None if parent is None else UUID(parent))


@contextmanager
def _opened(file: Path) -> Generator[IO[str]]:
    if str(file) == "-":
        yield sys.stdin
        return
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            yield cast("IO[str]", lines)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CommandError(f"{file}: {error}.") from None
