"""What commands that change something have in common: who does it and why, the audit log, and what is printed.

A change and its rows of the audit log are one transaction: `Act.transaction`.
"""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast
from uuid import UUID

import typer

from sqla_durable.tools.cli.database import App, Schema, Url, session_of
from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.output import AsJson, Quiet, print_json

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from sqla_durable.store.audit import Note, Noted


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """The options of every command that changes something."""

    reason: Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why, for the audit log.")] = None
    who: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Who does it; by default the user of this process.")
    ] = None
    url: Url = None
    app: App = None
    schema: Schema = None
    as_json: AsJson = False
    quiet: Quiet = False

    @contextmanager
    def session(self) -> Generator[Session]:
        """Yield a session of the database, whose transactions are those of `transaction`.

        Raises:
            CommandError: there is no database, or a text cannot be stored.
            SchemaError: the tables are missing, or older or newer than this package.
        """
        from sqla_durable.definitions.checks import fault_in

        for option, text, longest in (("--as", self.who, 1_000), ("--reason", self.reason, None)):
            fault = None if text is None else fault_in(text, longest=longest)
            if fault is not None:
                raise CommandError(f"{option} {text!r} {fault}.")
        with session_of(self.url, self.app, self.schema) as session:
            session.rollback()  # which looked at the tables
            yield session

    @contextmanager
    def transaction(self, session: Session) -> Generator[None]:
        """Commit what the block does, or nothing of it."""
        with session.begin():
            yield
        session.expunge_all()

    def note_workflows(
        self,
        session: Session,
        ids: Sequence[UUID],
        verb: str,
        details: Mapping[str, Any] | None = None,
        *,
        names: Mapping[UUID, str] | None = None,
    ) -> list[Noted]:
        """Write in the session's transaction what was done to workflows; return their ids and names."""
        from sqla_durable.api.sessions import explain_missing_rights
        from sqla_durable.store import audit

        if not ids:
            return []
        with explain_missing_rights("operator"):
            return audit.note_workflows(session, ids, self._note(verb, details), names=names)

    def note_subject(
        self, session: Session, name: str | None, verb: str, details: Mapping[str, Any] | None = None
    ) -> None:
        """Write in the session's transaction what was done to a queue or a schedule, or to something without a name."""
        from sqla_durable.api.sessions import explain_missing_rights
        from sqla_durable.store import audit

        with explain_missing_rights("operator"):
            audit.note_subject(session, name, self._note(verb, details))

    def print(self, message: str, *, value: object, **row: object) -> None:
        """Print what was done: a sentence, a JSON object, or with --quiet a value; one that is None is left out."""
        if self.as_json:
            print_json([row])
        elif not self.quiet:
            print(message)
        elif value is not None:
            print(value)

    def _note(self, verb: str, details: Mapping[str, Any] | None) -> Note:
        from sqla_durable.store.audit import Note

        found = {name: value for name, value in (details or {}).items() if value is not None}
        return Note(verb, self.who or _user(), self.reason, found or None)


def warn(lines: Iterable[str]) -> None:
    """Print lines to stderr."""
    for each in lines:
        typer.echo(each, err=True)


def parsed_json(option: str, text: str) -> Any:
    """Return the value of a JSON text; `-` reads it from stdin, so that it is in no list of processes.

    Raises:
        CommandError: it is none.
    """
    given = sys.stdin.read() if text == "-" else text
    try:
        return json.loads(given)
    except ValueError as error:
        raise CommandError(f"{option} is not JSON: {error}. A text needs its quotes: '\"yes\"'.") from None


def parsed_object(option: str, text: str) -> dict[str, Any]:
    """Return the value of the text of a JSON object, as `parsed_json` does.

    Raises:
        CommandError: it is something else.
    """
    found = parsed_json(option, text)
    if not isinstance(found, dict):
        raise CommandError(
            f"{option} is no JSON object: write arguments by their names, such as '{{\"order_id\": 7}}'."
        )
    return cast("dict[str, Any]", found)


def counted(number: int, noun: str = "workflow") -> str:
    """Return a number of things: `1 workflow`, `2,000 workflows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _user() -> str | None:
    """Return the user of this process; None where it has no name, as in some containers."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return None
