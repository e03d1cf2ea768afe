"""The command `import`: workflows with their histories, from what `export` has written."""

from __future__ import annotations

import gzip
import io
import json
import sys
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cache
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
_NOT_IMPORTED = f"Its group of {_AT_ONCE} lines and all that follow were not imported."
_LINKED_AT_ONCE = 1_000


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

    from sqla_durable.definitions.database_errors import is_outage
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
                    new = _new(session, portion, file, skip_existing=skip_existing)
                    done = imports.add(session, [each.text for each in new], moment=moment)
                    _link(session, portion, orphans, file)
                    imports.reserve_ids(session, done)
                    act.note_workflows(session, done.ids, "import", {"file": file.name})
            except DBAPIError as error:
                if is_outage(error) or not new:
                    raise
                raise _refused(session, new, error, moment=moment, file=file, before=number) from None
            number, cancelled = number + len(done.ids), cancelled + done.cancelled
    if orphans:
        count = sum(map(len, orphans.values()))
        has = "it has" if count == 1 else "they have"
        warn([f"The parents of {counted(count)} are not in this database: {has} none now."])
    message = f"{counted(number)} imported{_cancelled_in_words(cancelled)}."
    act.print(message, value=number, verb="import", workflows=number, cancelled=cancelled)


def _cancelled_in_words(number: int) -> str:
    match number:
        case 0:
            return ""
        case 1:
            return ", of which 1 was unfinished and is cancelled: `resume` lets it go on"
        case _:
            return f", of which {number:,} were unfinished and are cancelled: `resume` lets them go on"


def _new(session: Session, portion: Sequence[_Line], file: Path, *, skip_existing: bool) -> Sequence[_Line]:
    """Return the lines whose workflows are to be inserted.

    Raises:
        CommandError: two of them have the same id, and none is to be skipped.
    """
    from sqla_durable.store import imports

    found: dict[UUID, _Line] = {}
    for each in portion:
        earlier = found.setdefault(each.id, each)
        if earlier is not each and not skip_existing:
            raise CommandError(
                f"line {each.number} of {file} has the id of line {earlier.number}, {each.id}: remove one of them, or "
                f"skip the second by --skip-existing. {_NOT_IMPORTED}"
            )
    there = imports.existing(session, [*found]) if skip_existing else set[UUID]()
    return [each for each in found.values() if each.id not in there]


def _link(session: Session, portion: Sequence[_Line], orphans: dict[UUID, list[UUID]], file: Path) -> None:
    """Link children of a portion with parents that are there, and earlier children with parents of the portion.

    Args:
        session: which has inserted them.
        portion: the lines.
        orphans: by parents that were not there yet, their children of earlier lines; it has them afterwards, too.
        file: where they are from.

    Raises:
        CommandError: one is among its own parents.
    """
    from sqla_durable.store import imports

    firsts = {each.id: each for each in reversed(portion)}  # of an id that comes twice the first line is inserted
    parents = {each.id: each.parent_id for each in firsts.values() if each.parent_id is not None}
    there = imports.existing(session, [*{*parents.values()}])
    for child, parent in parents.items():
        if parent not in there:
            orphans.setdefault(parent, []).append(child)
    linked = {child: parent for child, parent in parents.items() if parent in there}
    linked |= {child: each.id for each in portion for child in orphans.pop(each.id, [])}
    remaining = iter(linked.items())
    while some := dict(islice(remaining, _LINKED_AT_ONCE)):
        if in_cycles := imports.link(session, some):
            raise CommandError(
                f"workflow {in_cycles[0]} in {file} is its own ancestor: correct the parent_id in one of these lines, "
                f"or leave one of them out. {_NOT_IMPORTED}"
            )


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
    were = "was" if before == 1 else "were"
    return CommandError(
        f"{which} be imported: {reason}.{hint} {counted(before)} before it {were} imported. {_NOT_IMPORTED}"
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
            except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
                raise CommandError(
                    f"line {number} of {file} is not a workflow as `sqla-durable export` of this release writes it: "
                    f"{_reason(error)}. {_NOT_IMPORTED}"
                ) from None


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _line(number: int, text: str) -> _Line:
    """Return a line whose members and columns this release knows: nothing of it is left out silently."""
    from sqla_durable.store.histories import FORMAT

    found: dict[str, Any] = json.loads(text)
    if not isinstance(found, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError("it is not a JSON object")
    if found["format"] != FORMAT:
        raise ValueError(f"its format is {found['format']!r}, and this release reads {FORMAT}")
    columns = _columns()
    _refuse_unknown(found, {"format", "children", *columns}, of="the line")
    row = cast("dict[str, Any]", found["workflow"])
    _refuse_unknown(row, columns["workflow"], of="workflow")
    for each in ("name", "status", "input", "attempt", "created_at"):
        row[each]
    for each in columns.keys() - {"workflow"}:
        rows: list[dict[str, Any]] = found[each]
        if not isinstance(rows, list):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{each} is not a list")
        for one in rows:
            _refuse_unknown(one, columns[each], of=each)
    own, parent = UUID(row["id"]), None if row.get("parent_id") is None else UUID(row["parent_id"])
    if own == parent:
        raise ValueError("it is its own parent")
    return _Line(number, text, own, parent)


@cache
def _columns() -> Mapping[str, Set[str]]:
    """Return the columns of the workflow and of its rows, by the member of a line that has them."""
    from sqla_durable.store.histories import LISTS, OF_ATTEMPTS
    from sqla_durable.store.statements import WORKFLOW

    lists = {member: {*table.c.keys()} - {"workflow_id"} for member, table in LISTS.items()}
    return {"workflow": {*WORKFLOW.c.keys()} - {*OF_ATTEMPTS}, **lists}


def _refuse_unknown(given: dict[str, Any], known: Set[str], *, of: str) -> None:
    if not isinstance(given, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{of} is not made of JSON objects")
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{of} has names that this release does not know: {', '.join(unknown)}")


@contextmanager
def _opened(file: Path) -> Generator[IO[str]]:
    try:
        if str(file) == "-":
            cast("io.TextIOWrapper", sys.stdin).reconfigure(encoding="utf-8", errors="strict")
            yield sys.stdin
            return
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            yield cast("IO[str]", lines)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise CommandError(f"{file}: {error}.") from None
