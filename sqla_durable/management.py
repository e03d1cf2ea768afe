"""What operators do with workflows: cancel and resume them, in a transaction of their own or of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeAlias, cast, overload
from uuid import UUID

from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import sqla_durable.hints as hints
from sqla_durable.errors import ArgumentError, SessionError
from sqla_durable.functions import id_of
from sqla_durable.models import Workflow
from sqla_durable.store import management, schema

Selected: TypeAlias = "Workflow | UUID | Iterable[Workflow | UUID] | Select[Any]"


@overload
def cancel(session: Session, workflows: Selected) -> list[UUID]: ...


@overload
def cancel(session: AsyncSession, workflows: Selected) -> Coroutine[Any, Any, list[UUID]]: ...


def cancel(session: Session | AsyncSession, workflows: Selected) -> list[UUID] | Coroutine[Any, Any, list[UUID]]:
    """Cancel workflows that are pending, running or suspended, in the caller's transaction.

    ```python
    cancel(session, order.checkout)
    cancel(session, select(Workflow).where(Workflow.queue == "mail"))
    ```

    Never commits: they are cancelled when the caller commits, and are not when it rolls back. From that commit on,
    nothing of an attempt that is executing one of them is committed any more: no checkpoint, no write of a
    transactional step, no outcome; what was committed before is in its history. The attempt itself notices at its next
    durable operation, or when its worker's heartbeat does.

    Locks the rows, in the order of their ids, until the caller's transaction ends; waits for a transactional step that
    is committing. A worker does not wait for these locks: only the workflows concerned do. What no longer fits the
    `select()` once its row is locked, because it was claimed or finished meanwhile, is left alone.

    Flushes the session. Records in it that were given or changed are read anew.

    Args:
        session: the caller's session; with an `AsyncSession`, await the call.
        workflows: one record or id, several, or a `select()` of `Workflow` or of one column of ids; it may join, order
            and limit, and name `Workflow` by an alias.

    Returns:
        The ids of those that were cancelled; the others are finished, or not there.

    Raises:
        ArgumentError: something else is given than workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables.
    """
    return _perform(session, workflows, management.cancel)


@overload
def resume(session: Session, workflows: Selected) -> list[UUID]: ...


@overload
def resume(session: AsyncSession, workflows: Selected) -> Coroutine[Any, Any, list[UUID]]: ...


def resume(session: Session | AsyncSession, workflows: Selected) -> list[UUID] | Coroutine[Any, Any, list[UUID]]:
    """Enqueue workflows again that were cancelled, or stopped for their crashes or their deadline.

    ```python
    resume(session, select(Workflow).where(Workflow.error["type"].astext == "sqla_durable.errors:MaxAttemptsError"))
    ```

    They go on after their last checkpoint, on their old queues, as their next attempt, and may again lose as many
    workers as the worker's `max_attempts` allows. A deadline that has come is lifted; one that is still to come stands.
    Never commits; locks as `cancel` does. A workflow that failed with an error of its own is not resumed: it would meet
    the same recorded error. One that was cancelled before its delay was over is enqueued now.

    Args:
        session: the caller's session; with an `AsyncSession`, await the call.
        workflows: one record or id, several, or a `select()`, as for `cancel`.

    Returns:
        The ids of those that were resumed.

    Raises:
        ArgumentError: something else is given than workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables.
    """
    return _perform(session, workflows, _resume)


def _resume(session: Session, wanted: management.Wanted) -> list[UUID]:
    resumed = management.resume(session, wanted)
    if resumed:
        hints.announce(session, hints.EVERYWHERE)
    return resumed


def _perform(
    session: Session | AsyncSession, workflows: Selected, verb: Callable[[Session, management.Wanted], list[UUID]]
) -> list[UUID] | Coroutine[Any, Any, list[UUID]]:
    def perform(blocking: Session) -> list[UUID]:
        schema.require(blocking)
        blocking.flush()  # a record that was only just started is not in the table yet
        return verb(blocking, _wanted(workflows))

    if isinstance(session, AsyncSession):
        return session.run_sync(perform)
    if isinstance(session, Session):  # pyright: ignore[reportUnnecessaryIsInstance]
        return perform(session)
    raise SessionError(f"the caller's Session or AsyncSession comes first, got {session!r}.")


def _wanted(workflows: Selected) -> management.Wanted:
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
