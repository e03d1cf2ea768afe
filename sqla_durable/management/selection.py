"""What the verbs are given: a session of either kind, and workflows by record, by id, or by a `select()`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeAlias, TypeVar, cast
from uuid import UUID

from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.errors import ArgumentError, SessionError
from sqla_durable.functions import id_of
from sqla_durable.models import Workflow
from sqla_durable.store import schema
from sqla_durable.store.selection import Wanted

Selected: TypeAlias = "Workflow | UUID | Iterable[Workflow | UUID] | Select[Any]"
"""Which workflows: one record or id, several, or a `select()` of `Workflow` or of one column of ids."""

T = TypeVar("T")


def perform(
    session: Session | AsyncSession, workflows: Selected, verb: Callable[[Session, Wanted], T]
) -> T | Coroutine[Any, Any, T]:
    """Call a verb with the blocking session and what is meant.

    Raises:
        ArgumentError: something else is given than workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables.
    """

    def blocking(sync_session: Session) -> T:
        schema.require(sync_session)
        _require_transaction(sync_session)
        sync_session.flush()  # a record that was only just started is not in the table yet
        return verb(sync_session, _wanted(workflows))

    if isinstance(session, AsyncSession):
        return session.run_sync(blocking)
    if isinstance(session, Session):  # pyright: ignore[reportUnnecessaryIsInstance]
        return blocking(session)
    raise SessionError(f"the caller's Session or AsyncSession comes first, got {session!r}.")


def _require_transaction(session: Session) -> None:
    connection = session.connection(bind_arguments={"mapper": Workflow})
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise SessionError(
            f"{session!r} is bound to an engine in AUTOCOMMIT, which commits each statement by itself: what was locked "
            "would be free again before it is changed. Give it an engine with transactions."
        )


def _wanted(workflows: Selected) -> Wanted:
    match workflows:
        case Select():
            return workflows
        case Workflow() | UUID():
            return [_id(workflows)]
        case _:
            return [_id(each) for each in _several(workflows)]


def _several(workflows: object) -> Iterable[object]:
    if not isinstance(workflows, Iterable) or isinstance(workflows, (str, bytes)):
        raise _refused(workflows)
    return cast("Iterable[object]", workflows)


def _id(workflow: object) -> UUID:
    if not isinstance(workflow, (Workflow, UUID)):
        raise _refused(workflow)
    found = id_of(workflow)
    if not found:  # the column's default has not been applied yet
        raise ArgumentError(f"{workflow!r} is in no database: add it to a session, or start it.")
    return found


def _refused(given: object) -> ArgumentError:
    return ArgumentError(
        f"{given!r} is no workflow: give a Workflow record, its id as a UUID (of a text: UUID(...)), several of "
        "them, or a select() of Workflow."
    )
