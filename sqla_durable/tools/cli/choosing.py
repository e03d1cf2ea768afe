"""Which workflows a command changes, how many at once, and the loop over them: one transaction for each portion."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias
from uuid import UUID

import typer

from sqla_durable.tools.cli.acting import Act, counted, warn
from sqla_durable.tools.cli.errors import FAILED, CommandError
from sqla_durable.tools.cli.filters import Filters, parsed_id
from sqla_durable.tools.cli.output import Yes, confirm, print_json

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.orm import Session

    from sqla_durable import Workflow

Ids = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Which workflows; or use options.")]

Changed: TypeAlias = "Mapping[UUID, UUID]"
"""What a verb did: of each workflow that was changed its id, or that of the one that was made of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bulk:
    """The options of commands that change many workflows."""

    everything: Annotated[bool, typer.Option("--all", help="All that it applies to, if nothing else chooses.")] = False
    yes: Yes = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count them.")] = False
    batch: Annotated[int, typer.Option("--batch", min=1, max=5_000, help="How many in one transaction.")] = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """What a command does with workflows.

    Attributes:
        name: its name.
        done: what it has done, as a participle.
        applies: the condition of what it applies to.
        change: does it with the workflows of a select, in the caller's transaction.
        describe: why it does not apply to a workflow.
        asks: whether it asks before.
        deletes: whether the workflows are gone afterwards.
        takes_children: whether the same is done to the children of each.
        details: what else the audit log is to have.
    """

    name: str
    done: str
    applies: Callable[[], ColumnElement[bool]]
    change: Callable[[Session, Select[Any]], Changed]
    describe: Callable[[Workflow], str]
    asks: bool = True
    deletes: bool = False
    takes_children: bool = False
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """Workflows that are named, or chosen by options.

    Attributes:
        ids: those that are named.
        filters: the options.
    """

    ids: tuple[UUID, ...]
    filters: Filters

    @classmethod
    def of(cls, ids: Sequence[str] | None, filters: Filters, *, everything: bool) -> Choice:
        """Return the choice of a command line.

        Raises:
            CommandError: it is made twice, or not at all; or an id is none.
        """
        named = tuple(dict.fromkeys(map(parsed_id, ids or ())))
        if sum((bool(named), not filters.is_empty, everything)) > 1:
            raise CommandError(
                "name workflows by their ids, or choose them by options, or use --all: only one of them."
            )
        if not named and filters.is_empty and not everything:
            raise CommandError(
                "no workflows are chosen: name them by their ids, choose them by options such as --name, or use --all."
            )
        return cls(named, filters)

    def select(self) -> Select[Any]:
        """Return the query for them, the newest first.

        Raises:
            CommandError: an option cannot be read.
        """
        from sqla_durable import Workflow

        chosen = self.filters.select()
        return chosen.where(Workflow.id.in_(self.ids)) if self.ids else chosen


def carry_out(verb: Verb, choice: Choice, *, act: Act, bulk: Bulk) -> None:
    """Do it, one transaction for each portion, and print what was done.

    Raises:
        CommandError: nobody can be asked whether to do it.
        typer.Exit: the answer is no, or it was done to some of the named workflows only; the exit code is 1.
    """
    from sqlalchemy import func, select

    from sqla_durable import Workflow

    with act.session() as session:
        # What is started from now on, forks of these among it, is not meant.
        began = session.scalar(select(func.pg_catalog.statement_timestamp()))
        meant = choice.select().where(verb.applies(), Workflow.created_at <= began)
        count = counted_rows(session, meant)
        session.rollback()  # no snapshot is kept while somebody thinks
        if bulk.dry_run:
            changed = set(session.scalars(_ids_of(meant))) if choice.ids else set[UUID]()
            most = "at most " if verb.deletes else ""
            would = f"{most}{counted(count)} would be {verb.done}{' with any children' if verb.takes_children else ''}."
            act.print(would, value=count, verb=verb.name, workflows=count, dry_run=True)
        else:
            if count and verb.asks:
                children = " with any children" if verb.takes_children else ""
                confirm(f"{counted(count)} will be {verb.done}{children}. Continue?", yes=bulk.yes)
            changed = set[UUID]()
            if count:
                changed = _change_all(session, verb, meant, count=count, choice=choice, act=act, batch=bulk.batch)
            elif not (act.quiet or act.as_json):
                print(f"{counted(count)} {verb.done}.")
        missed = _missed(session, verb, choice.ids, changed)
    if missed:
        warn(missed)
        raise typer.Exit(FAILED)


def counted_rows(session: Session, meant: Select[Any]) -> int:
    """Return how many workflows a query means."""
    from sqlalchemy import select

    from sqla_durable.store.statements import count_rows

    return session.scalar(select(count_rows()).select_from(meant.order_by(None).subquery())) or 0


def _change_all(
    session: Session, verb: Verb, meant: Select[Any], *, count: int, choice: Choice, act: Act, batch: int
) -> set[UUID]:
    """Change portion after portion; return the ids of those that were named and have changed."""
    details = {**(verb.details or {}), "filters": choice.filters.given or None}
    changed: set[UUID] = set()
    number = 0
    with _progress(verb, count) as advance:
        try:
            for ids in portions(session, meant, batch):
                with act.transaction(session):
                    found, noted = _change(session, verb, meant, ids, act=act, details=details)
                number += len(noted)
                _print_changed(verb, noted, found, act=act)
                if choice.ids:
                    changed |= found.keys()
                advance(len(ids))
        except BaseException:  # an interruption too
            if number:
                warn([f"{counted(number)} had been {verb.done} before this, and still are."])
            raise
    if not (act.quiet or act.as_json):
        print(f"{counted(number)} {verb.done}.")
    return changed


def _change(
    session: Session, verb: Verb, meant: Select[Any], ids: Sequence[UUID], *, act: Act, details: Mapping[str, Any]
) -> tuple[Changed, list[Any]]:
    """Change one portion and write it into the audit log, in the caller's transaction."""
    from sqla_durable import Workflow
    from sqla_durable.store.manage import names_in_trees

    names = names_in_trees(session, ids) if verb.deletes else None
    found = verb.change(session, meant.where(Workflow.id.in_(ids)))
    return found, act.note_workflows(session, list(found.values()), verb.name, details, names=names)


def _print_changed(verb: Verb, noted: Sequence[Any], changed: Changed, *, act: Act) -> None:
    made_of = {made: source for source, made in changed.items() if made != source}  # forks
    if act.as_json:
        of: dict[object, dict[str, object]] = {made: {"forked_from": source} for made, source in made_of.items()}
        rows = ({"verb": verb.name, "id": each.workflow_id, "name": each.subject} for each in noted)
        print_json({**row, **of.get(row["id"], {})} for row in rows)
        return
    for each in noted:
        if act.quiet:
            print(each.workflow_id)
        elif each.workflow_id in made_of:
            print(f"{made_of[each.workflow_id]} → {each.workflow_id}")


def portions(session: Session, meant: Select[Any], size: int) -> Iterator[list[UUID]]:
    """Read the ids of what is meant, the newest first, so many at once; in no transaction when they are yielded.

    What is started meanwhile is newer, and is not among them.
    """
    from sqla_durable import Workflow

    ids_of, last = _ids_of(meant), None
    while True:
        query = ids_of if last is None else ids_of.where(Workflow.id < last)
        ids = list(session.scalars(query.limit(size)))
        session.rollback()
        if not ids:
            return
        yield ids
        last = ids[-1]


def _ids_of(meant: Select[Any]) -> Select[Any]:
    from sqla_durable import Workflow

    return meant.with_only_columns(Workflow.id)


def _missed(session: Session, verb: Verb, named: Sequence[UUID], changed: set[UUID]) -> list[str]:
    """Return a line for each named workflow that was not changed: why."""
    from sqlalchemy import select

    from sqla_durable import Workflow

    missed = [each for each in named if each not in changed]
    query = select(Workflow).where(Workflow.id.in_(missed))
    found = {each.id: each for each in session.scalars(query)} if missed else {}
    return [
        f"{each} was not {verb.done}: {_reason(verb, found[each])}"
        if each in found
        else f"no workflow {each} is visible here: it was not {verb.done}."
        for each in missed
    ]


def _reason(verb: Verb, workflow: Workflow) -> str:
    return f"workflow {workflow.name!r} {verb.describe(workflow)}"


@contextmanager
def _progress(verb: Verb, count: int) -> Generator[Callable[[int], None]]:
    """Show a progress bar on a terminal; yield what advances it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb.name, total=count)
        yield lambda number: progress.advance(task, number)
