"""How functions of a caller's session begin: the session is checked, and so are the workflows that are meant.

Functions of `sqla_durable` take a `Session`; those of `sqla_durable.asyncio` call them in `AsyncSession.run_sync`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast
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
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.operations import transaction
from sqla_durable.store import connection_of, keys, schema

P = ParamSpec("P")
T = TypeVar("T")

_SERIALIZATION_FAILURE, _DENIED = "40001", "42501"
_OUR_TABLES = re.compile(rf"to_regclass|\.({'|'.join(each.name for each in Base.metadata.tables.values())})\b")

AnySession: TypeAlias = "Session | AsyncSession"


def write(session: Session, function: Callable[[Session], T], *, name: str, rights: str) -> T:
    """Call a function that writes in the caller's transaction, which is neither flushed nor committed here.

    Args:
        session: the caller's.
        function: what is called.
        name: that of the public function, for messages.
        rights: the set of rights in docs/security.md that it needs, for messages.

    Raises:
        SessionError: this is no `Session`; or it has no PostgreSQL engine; or it is in AUTOCOMMIT.
        SchemaError: its database does not hold the tables.
        DatabaseUnavailableError: its server takes no writes.
    """
    require_sync_session(session, name)
    return _write_checked(session, function, rights=rights)


def read(session: Session, function: Callable[[Session], T], *, name: str) -> T:
    """Call a function that only reads, as `write` does; the session may be in AUTOCOMMIT, or of a standby.

    Raises:
        SessionError: this is no `Session`; or it has no PostgreSQL engine.
        SchemaError: its database does not hold the tables.
    """
    require_sync_session(session, name)
    with explain_missing_rights("reader"):
        schema.require(session)
        return function(session)


def write_in_either(
    session: AnySession, function: Callable[[Session], T], *, rights: str
) -> T | Coroutine[Any, Any, T]:
    """Call a function as `write` does, for methods that take a session of either kind.

    Raises:
        SessionError, SchemaError, DatabaseUnavailableError: as `write`.
    """
    require_session(session)
    if isinstance(session, AsyncSession):
        return session.run_sync(_write_checked, function, rights=rights)
    return _write_checked(session, function, rights=rights)


async def run_sync(
    session: AsyncSession, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Call a function of `sqla_durable` with the `Session` inside an `AsyncSession`, for its twin.

    Raises:
        SessionError: this is no `AsyncSession`.
        Exception: as the function.
    """
    require_async_session(session, public_name(function))
    return await session.run_sync(function, *args, **kwargs)


def public_name(function: Callable[..., Any]) -> str:
    """Return a function's name in either namespace, with that of its module if it is not at the top."""
    return f"manage.{function.__name__}" if ".manage" in function.__module__ else function.__name__


def require_session(session: object) -> None:
    """Refuse what is no session of either kind.

    Raises:
        SessionError: it is something else, such as a sessionmaker.
    """
    if not isinstance(session, (Session, AsyncSession)):
        shown = "a text" if isinstance(session, str) else repr(session)  # the token of a callback is secret
        raise SessionError(f"the caller's Session or AsyncSession comes first, got {shown}. {session_advice(session)}")


def require_sync_session(session: object, name: str) -> None:
    """Refuse what is no `Session`.

    Raises:
        SessionError: it is an `AsyncSession`, or no session.
    """
    require_session(session)
    if not isinstance(session, Session):
        raise SessionError(
            f"sqla_durable.{name} takes a Session, got {session!r}: await sqla_durable.asyncio.{name}, or "
            "call this one in session.run_sync(...)."
        )


def require_async_session(session: object, name: str) -> None:
    """Refuse what is no `AsyncSession`.

    Raises:
        SessionError: it is a `Session`, or no session.
    """
    require_session(session)
    if not isinstance(session, AsyncSession):
        raise SessionError(
            f"sqla_durable.asyncio.{name} takes an AsyncSession, got {session!r}: call sqla_durable.{name}."
        )


def session_advice(session: object) -> str:
    """Return the advice on what to pass instead of what is no session."""
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
def explain_missing_rights(rights: str, *, user: str | None = None) -> Generator[None]:
    """Add to the error of a missing right on the durable tables which set of rights contains it."""
    try:
        yield
    except DBAPIError as error:
        if sqlstate(error) == _DENIED and _OUR_TABLES.search(error.statement or ""):
            who = "the session's role" if user is None else f"the role of {user!r}"
            error.add_note(f"{who} needs the rights of `{rights}`: see docs/security.md, Roles and tenants.")
        raise


@contextmanager
def in_savepoint(session: Session, *, what: str, name: str, key: str | None) -> Generator[None]:
    """Insert under a key in a savepoint, so that the transaction is usable after a conflict with a newer row.

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
    """Return a workflow's id; of a record also when its attributes are expired and its session is closed.

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
    """Return the ids of one workflow or of several, in the order given.

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
            f"no workflow {workflow_id} is visible here: {what} cannot be sent to it. Nothing was sent.",
            workflow_id=workflow_id,
        )
    if status.finished:
        raise WorkflowFinishedError(
            f"{what} cannot be sent to workflow {workflow_id}, which {status.as_predicate}. Nothing was sent.",
            workflow_id=workflow_id,
        )


def _write_checked(session: Session, function: Callable[[Session], T], *, rights: str) -> T:
    try:
        with explain_missing_rights(rights):
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
