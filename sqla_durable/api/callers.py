"""What callers give first: a session of their own, of either kind, and the workflows that are meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast
from uuid import UUID

from sqlalchemy import Connection, Engine, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqla_durable.definitions.database_errors import is_read_only, sqlstate
from sqla_durable.errors import (
    ArgumentError,
    DatabaseUnavailableError,
    NotFoundError,
    SessionError,
    WorkflowFinishedError,
)
from sqla_durable.models import Base, Workflow
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.operations import transaction
from sqla_durable.store import connection_of, keys, schema

T = TypeVar("T")

_SERIALIZATION_FAILURE, _DENIED = "40001", "42501"
_OUR_TABLES = re.compile(rf"to_regclass|\.({'|'.join(each.name for each in Base.metadata.tables.values())})\b")

AnySession: TypeAlias = "Session | AsyncSession"


def perform(session: AnySession, function: Callable[[Session], T], *, rights: str) -> T | Coroutine[Any, Any, T]:
    """Call a function that writes in the caller's transaction: of an `AsyncSession` with the `Session` inside it.

    Neither commits nor flushes. With an `AsyncSession`, await the call.

    Args:
        session: the caller's.
        function: what is called.
        rights: which set of rights in docs/security.md it needs, for who lacks them.

    Raises:
        SessionError: this is no session; or it has no PostgreSQL engine; or it is in AUTOCOMMIT.
        SchemaError: its database does not hold the tables.
        DatabaseUnavailableError: its server takes no writes.
    """
    return _call(session, partial(_write, function=function, rights=rights))


def read(session: AnySession, function: Callable[[Session], T]) -> T | Coroutine[Any, Any, T]:
    """Call a function that only reads, as `perform` does; the session may be in AUTOCOMMIT, or of a standby.

    Raises:
        SessionError: this is no session; or it has no PostgreSQL engine.
        SchemaError: its database does not hold the tables.
    """
    return _call(session, partial(_read, function=function))


def require_session(session: object) -> None:
    """Refuse what is no session.

    Raises:
        SessionError: it is something else, such as a sessionmaker.
    """
    if not isinstance(session, (Session, AsyncSession)):
        shown = "a text" if isinstance(session, str) else repr(session)  # the token of a callback is secret
        raise SessionError(f"the caller's Session or AsyncSession comes first, got {shown}. {cure(session)}")


def cure(session: object) -> str:
    """Return the advice on what to give instead of what is no session."""
    if isinstance(session, (scoped_session, async_scoped_session)):  # such as `db.session` of Flask-SQLAlchemy
        return "Of a scoped session, call it for the session of this scope: write db.session() for db.session."
    if isinstance(session, (sessionmaker, async_sessionmaker)):
        start, kind = (
            ("with", "sessionmaker") if isinstance(session, sessionmaker) else ("async with", "async_sessionmaker")
        )
        return f"Of a sessionmaker, open one by `{start} {kind}() as session`."
    if isinstance(session, (Engine, Connection)):
        return f"Of an engine or a connection, make one: Session({type(session).__name__.lower()})."
    if isinstance(session, (AsyncEngine, AsyncConnection)):
        return "Of an engine or a connection, make one: AsyncSession(...) of it."
    if hasattr(session, "session"):  # Flask-SQLAlchemy's `db`
        return "Of Flask-SQLAlchemy's db, write db.session()."
    return "Write, for example, workflow.start(session, 1) for workflow.start(1)."


@contextmanager
def noting_rights(rights: str, *, user: str | None = None) -> Generator[None]:
    """Add to an error that a right on the durable tables is missing in which set of rights it is."""
    try:
        yield
    except DBAPIError as error:
        if sqlstate(error) == _DENIED and _OUR_TABLES.search(error.statement or ""):
            who = "the session's role" if user is None else f"the role of {user!r}"
            error.add_note(f"{who} needs the rights of `{rights}`: see docs/security.md, Roles and tenants.")
        raise


@contextmanager
def in_savepoint(session: Session, *, what: str, name: str, key: str | None) -> Generator[None]:
    """Insert under a key in a savepoint, so that the transaction goes on after a conflict with a row that is newer.

    Raises:
        KeyNotVisibleError: there is a row with the key that is newer than the transaction's snapshot.
    """
    try:
        with connection_of(session).begin_nested():
            yield
    except DBAPIError as error:
        if sqlstate(error) != _SERIALIZATION_FAILURE:
            raise
        raise keys.newer_than_snapshot(what, name=name, key=key or "") from error


def id_of(workflow: object) -> UUID:
    """Give a workflow's id; of a record also when its attributes are expired and its session is closed.

    Raises:
        ArgumentError: this is no workflow, such as the text of an id; or a record that has no id yet.
    """
    if isinstance(workflow, UUID):
        return workflow
    if not isinstance(workflow, Workflow):
        raise ArgumentError(
            f"{workflow!r} is no workflow: give a Workflow record, or its id as a UUID (of a text: UUID(...))."
        )
    identity = inspect(workflow).identity
    if identity is not None:
        return UUID(str(identity[0]))
    if not workflow.id:  # the column's default is applied when it is inserted
        raise ArgumentError(f"{workflow!r} is in no database: add it to a session and flush, or start it.")
    return workflow.id


def ids_of(workflows: object) -> list[UUID]:
    """Give the ids of one workflow or of several, in the order given.

    Raises:
        ArgumentError: one of them is no workflow.
    """
    if isinstance(workflows, Iterable) and not isinstance(workflows, (str, bytes)):
        return [id_of(each) for each in cast("Iterable[object]", workflows)]
    return [id_of(workflows)]


def require_receiver(what: str, workflow_id: UUID, status: WorkflowStatus | None) -> None:
    """Refuse to send something to a workflow that will not take it.

    Args:
        what: the signal or the update, for the message.
        workflow_id: the receiver.
        status: where it stands; None if it is not there.

    Raises:
        NotFoundError: it is not there.
        WorkflowFinishedError: it has an outcome.
    """
    if status is None:
        raise NotFoundError(
            f"{what} cannot be sent to workflow {workflow_id}: it is not visible here. Nothing was sent.",
            workflow_id=workflow_id,
        )
    if status.finished:
        raise WorkflowFinishedError(
            f"{what} cannot be sent to workflow {workflow_id}, which {status.as_predicate}. Nothing was sent.",
            workflow_id=workflow_id,
        )


def _call(session: AnySession, function: Callable[[Session], T]) -> T | Coroutine[Any, Any, T]:
    require_session(session)
    return session.run_sync(function) if isinstance(session, AsyncSession) else function(session)


def _read(session: Session, function: Callable[[Session], T]) -> T:
    with noting_rights("reader"):
        schema.require(session)
        return function(session)


def _write(session: Session, function: Callable[[Session], T], *, rights: str) -> T:
    try:
        with noting_rights(rights):
            schema.require(session)
            schema.require_transaction(session)
            return function(session)
    except DBAPIError as error:
        if not is_read_only(error) or transaction.is_step_session(session):  # a step is tried again, on the new primary
            raise
        raise DatabaseUnavailableError(
            f"nothing can be written with {session!r}: its server is a standby, or its transaction is read only. Give "
            "a session of the primary, and roll this one back."
        ) from error
