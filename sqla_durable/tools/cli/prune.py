"""The command `prune`: deletes now, and once, what is finished for long enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqla_durable.tools.cli.acting import Act, counted
from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.groups import grouped
from sqla_durable.tools.cli.output import Yes, confirm, print_json
from sqla_durable.tools.cli.times import parsed_duration

if TYPE_CHECKING:
    from datetime import timedelta

    from sqlalchemy.orm import Session

    from sqla_durable.store.retention import Wanted

_BATCH = 200  # workflows of a transaction, without their children


@dataclass(frozen=True, slots=True)
class _Sweep:
    """What is to be deleted.

    Attributes:
        policy: for which policy; None for the command's own options.
        wanted: which workflows.
    """

    policy: str | None
    wanted: Wanted


@grouped
def prune(
    *,
    keep: Annotated[
        str | None,
        typer.Option("--keep", metavar="DURATION", help="What is finished for longer: 90d; else the policies."),
    ] = None,
    name: Annotated[list[str] | None, typer.Option("--name", help="Of workflows of a name or pattern; repeatable.")] = (
        None
    ),
    status: Annotated[
        list[str] | None, typer.Option("--status", help="succeeded, failed or cancelled; repeatable.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many, not counting their children.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be deleted.")] = False,
    yes: Yes = False,
    act: Act,
) -> None:
    """Delete finished workflows with their trees and histories: what --keep says, else what the policies say."""
    kept, statuses = _options(keep, name or None, status or None)
    given = {"keep": keep, "name": name or None, "status": statuses, "limit": limit}
    with act.session() as session:
        sweeps = _sweeps(session, kept, name or None, statuses)
        counts = _counts(session, sweeps, limit) if dry_run or not yes else []
        if dry_run:
            _show(sweeps, [{"would_delete": each} for each in counts], act)
            return
        if not yes:
            confirm(f"{counted(sum(counts))} will be deleted, with histories. Continue?", yes=False)
            sweeps = _sweeps(session, kept, name or None, statuses)  # policies may have changed meanwhile
        _show(sweeps, list(_delete(session, sweeps, limit, given, act)), act)


def _options(
    keep: str | None, names: list[str] | None, status: list[str] | None
) -> tuple[timedelta | None, list[str] | None]:
    """Return how long workflows are kept, and with which end they are meant.

    Raises:
        CommandError: an option cannot be read, or says nothing without another one.
    """
    from sqla_durable.definitions.retention import finished_statuses, require_keep
    from sqla_durable.errors import ArgumentError

    if keep is None and (names or status):
        raise CommandError("--name and --status say whose workflows --keep is about: add --keep, such as --keep 90d.")
    try:
        statuses = finished_statuses(status)
        kept = None if keep is None else require_keep(parsed_duration("--keep", keep))
    except ArgumentError as error:
        raise CommandError(str(error)) from None
    return kept, None if statuses is None else list(statuses)


def _sweeps(
    session: Session, keep: timedelta | None, names: Sequence[str] | None, statuses: Sequence[str] | None
) -> list[_Sweep]:
    from sqla_durable.store import retention

    if keep is not None:
        return [_Sweep(None, retention.finished_for(session, keep, names=names, statuses=statuses))]
    found = [_Sweep(each.name, each.wanted) for each in retention.policies(session)]
    if not found:
        raise CommandError(
            "there is no policy of retention in this database: say --keep 90d, or declare one in the code by "
            "Durable.retention. Nothing was deleted."
        )
    return found


def _counts(session: Session, sweeps: Sequence[_Sweep], limit: int | None) -> list[int]:
    """Count what each would delete, children too; what the application's rows hold is among it."""
    from sqla_durable.store import retention

    counts: list[int] = []
    roots = 0
    for sweep in sweeps:
        number, after, is_last = 0, None, False
        while not is_last and (limit is None or roots < limit):
            found = retention.find(session, sweep.wanted, after=after, limit=_size(limit, roots))
            trees = retention.lock_trees(session, found.roots, sweep.wanted)
            session.rollback()  # the locks are for nothing
            number, roots = number + sum(map(len, trees.values())), roots + len(trees)
            after, is_last = found.seen, found.is_last
        counts.append(number)
    return counts


def _delete(
    session: Session, sweeps: Sequence[_Sweep], limit: int | None, given: dict[str, Any], act: Act
) -> Iterator[dict[str, int]]:
    """Delete, each batch in a transaction; the first that deletes something has the row of the audit log."""
    from sqla_durable.manage.retention import delete_batch
    from sqla_durable.store import connection_of

    is_noted, roots = False, 0
    for sweep in sweeps:
        deleted, refused, after, is_last = 0, 0, None, False
        while not is_last and (limit is None or roots < limit):
            batch = delete_batch(connection_of(session), sweep.wanted, after=after, limit=_size(limit, roots))
            if batch.deleted and not is_noted:
                act.note_subject(session, None, "prune", given)
                is_noted = True
            session.commit()
            deleted, refused, roots = deleted + batch.deleted, refused + batch.refused, roots + batch.roots
            after, is_last = batch.seen, batch.is_last
        yield {"deleted": deleted, "refused": refused}


def _size(limit: int | None, done: int) -> int:
    return _BATCH if limit is None else min(_BATCH, limit - done)


def _show(sweeps: Sequence[_Sweep], counts: Sequence[dict[str, int]], act: Act) -> None:
    if act.as_json:
        print_json({"policy": each.policy, **count} for each, count in zip(sweeps, counts, strict=True))
        return
    for each, count in zip(sweeps, counts, strict=True) if not act.quiet else ():
        said = ", ".join(
            f"{number:,} {what.replace('would_delete', 'would be deleted')}" for what, number in count.items()
        )
        print(said if each.policy is None else f"{each.policy}: {said}")
