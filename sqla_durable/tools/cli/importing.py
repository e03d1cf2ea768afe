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
    from sqlalchemy.orm import Session

_AT_ONCE = 50
"""How many workflows one transaction inserts."""
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

    from sqla_durable.definitions.redaction import driver_message

    number = cancelled = 0
    parents: dict[UUID, UUID] = {}
    with act.session() as session, _opened(file) as lines:
        for portion in _portions(_parsed(lines, file)):
            try:
                with act.transaction(session):
                    done = _import(session, portion, parents, act=act, file=file, skip_existing=skip_existing)
            except DBAPIError as error:
                first, last = portion[0].number, portion[-1].number
                raise CommandError(
                    f"lines {first} to {last} of {file} were not imported, and nothing after them; {counted(number)} "
                    f"before them were: {driver_message(error.orig) if error.orig else error}. If they are there "
                    "already, use --skip-existing."
                ) from None
            number, cancelled = number + done[0], cancelled + done[1]
    if parents:
        warn([f"The parents of {counted(len(parents))} are not in this database: they have none now."])
    more = f", of which {cancelled:,} were unfinished and are cancelled: `resume` lets them go on" if cancelled else ""
    message = f"{counted(number)} imported{more}."
    act.print(message, value=number, verb="import", workflows=number, cancelled=cancelled)


def _import(
    session: Session, portion: Sequence[_Line], parents: dict[UUID, UUID], *, act: Act, file: Path, skip_existing: bool
) -> tuple[int, int]:
    """Import a portion in the caller's transaction; return how many workflows that are, and how many were unfinished.

    Args:
        parents: those of earlier lines whose parents were not there yet; it has them afterwards, too.
    """
    from sqla_durable.store import imports

    known = imports.existing(session, [each.id for each in portion]) if skip_existing else set[UUID]()
    new = [each for each in portion if each.id not in known]
    if not new:
        return 0, 0
    done = imports.add(session, [each.text for each in new])
    parents |= {each.id: each.parent_id for each in new if each.parent_id is not None}
    there = imports.existing(session, [*{*parents.values()}])
    imports.link(session, {child: parent for child, parent in parents.items() if parent in there})
    for child in [child for child, parent in parents.items() if parent in there]:
        del parents[child]
    imports.reserve_ids(session, done)
    act.note_workflows(session, done.ids, "import", {"file": file.name})
    return len(done.ids), done.cancelled


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
