"""Cancel, resume, retry, rewind, change and delete workflows in the caller's transaction. `fork` is in `forks`.

The workflows are given by record, by id, or by a `select()`; `id_at` is for selects by time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy import CompoundSelect, Select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

import sqla_durable.api.hints as hints
import sqla_durable.api.sessions as sessions
from sqla_durable.api.options import StartOptions
from sqla_durable.definitions.checks import fault_in
from sqla_durable.definitions.database_errors import first_line, sqlstate
from sqla_durable.errors import ArgumentError, WorkflowReferencedError
from sqla_durable.models import Workflow
from sqla_durable.store import changes, connection_of, manage
from sqla_durable.store.changes import Changes
from sqla_durable.store.manage import workers_of
from sqla_durable.store.selecting import Selection, evaluate

Selected: TypeAlias = "Workflow | UUID | Iterable[Workflow | UUID] | Select[Any] | CompoundSelect[Any]"
"""Which workflows: one record or id, several, or a `select()` or union of `Workflow` or of one column of ids."""

T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_VERSION_7 = (7 << 76) | (2 << 62)  # and the variant. Source: RFC 9562, section 5.7.


_ROUNDS = 5  # how often a cancel releases its locks, to take them again in the order of ids
_REFERENCED = ("23503", "23001")  # foreign_key_violation, restrict_violation


def id_at(moment: datetime) -> UUID:
    """Return the least id of a workflow that was started at this time.

    ```python
    select(Workflow).where(Workflow.id >= manage.id_at(datetime.now(UTC) - timedelta(days=1)))
    ```

    Ids begin with the time of the start, to the millisecond, so the primary key finds what was started in a period.
    The time is that of the clock of whoever started the workflow; the database's, for a plain `INSERT`.

    Args:
        moment: a time with a time zone.

    Raises:
        ArgumentError: it has no time zone, or lies before 1970.
    """
    is_time = isinstance(moment, datetime)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not is_time or moment.tzinfo is None or moment < _EPOCH:
        raise ArgumentError(f"id_at({moment!r}): give a time with a time zone, 1970 or later.")
    return UUID(int=((moment - _EPOCH) // timedelta(milliseconds=1) << 80) | _VERSION_7)


def apply_verb(
    session: Session,
    workflows: Selected,
    verb: Callable[[Session, Selection], T],
    *,
    name: str,
    rights: str = "operator",
) -> T:
    """Call a function of the session and the selected workflows.

    Raises:
        ArgumentError: `workflows` are no workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    return sessions.write(
        session, partial(_apply_verb, workflows=workflows, verb=verb), name=f"manage.{name}", rights=rights
    )


def _apply_verb(session: Session, *, workflows: Selected, verb: Callable[[Session, Selection], T]) -> T:
    session.flush()  # a record that was only just started is not in the table yet
    return verb(session, _wanted(session, workflows))


def _wanted(session: Session, workflows: Selected) -> Selection:
    if isinstance(workflows, (Select, CompoundSelect)):
        return evaluate(session, workflows)
    return Selection(sessions.ids_of(workflows))


def cancel(session: Session, workflows: Selected) -> list[UUID]:
    """Cancel workflows that are pending, running or suspended, with their trees, in the caller's transaction.

    ```python
    manage.cancel(session, order.checkout)
    manage.cancel(session, select(Workflow).where(Workflow.queue == "mail"))
    ```

    Never commits: they are cancelled when the caller commits, and are not when it rolls back. From that commit on,
    nothing of an attempt that is executing one of them is committed any more: no checkpoint, no write of a
    transactional step, no outcome; what was committed before is in its history. After the commit a hint goes
    to the workers that execute some of them: async code is cancelled at once, sync code at its next durable operation.
    Where the hint does not arrive, the worker's heartbeat finds the cancellation.

    Of a cancel and an end in the same instant one is first: a cancel that waited for the end returns no id, and an
    attempt that waited for the cancel has lost its workflow.

    With a workflow its children are cancelled, and theirs, whatever is between them; those that were started detached
    are not, nor those that a compensation has started. A workflow that is finished is left alone with its tree, and one
    that compensates already is left alone itself: a repeated cancel changes nothing.

    Locks the rows, in the order of their ids, until the caller's transaction ends; waits for a transactional step that
    is committing. A worker does not wait for these locks: only the workflows concerned do. Sets a savepoint:
    where a child appears between reading the tree and locking it, the locks are released and taken again, in order.

    A `select()` is evaluated once, before the locks. A row that another transaction has changed by the time it is
    locked is compared with the select again, without LIMIT and OFFSET; if it no longer fits, it is left alone, and no
    other row takes its place.

    Flushes the session. Records in it that were passed or changed are read again.

    Args:
        session: the caller's session.
        workflows: one record or id, several, or a `select()` of `Workflow` or of one column of ids; it may join, order,
            limit, lock, be a union, and name `Workflow` by an alias. The ids that it selects are held in memory, some
            250 bytes each: change millions in portions, by its `limit()`.

    Returns:
        The ids of those that were cancelled, children too; the others are finished, compensate already, or are not
        there.

    Raises:
        ArgumentError: something else is given than workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    return apply_verb(session, workflows, _cancel, name="cancel", rights="canceller")


def resume(session: Session, workflows: Selected) -> list[UUID]:
    """Enqueue workflows again that were cancelled, or stopped because their workers died too often.

    ```python
    manage.resume(session, select(Workflow).where(Workflow.status == WorkflowStatus.CANCELLED))
    ```

    They go on after their last checkpoint, on their old queues, as their next attempt, and may again lose as many
    workers as the worker's `max_attempts` allows. What was cancelled with one of them, by the same `cancel`, is resumed
    with it: its tree goes on as a whole. Never commits; locks rows in the order of ids, as `cancel` does. A workflow
    that failed with an error of its own is not resumed, because it would meet the same recorded error: `retry` it. One
    that was cancelled before its delay was over is enqueued now. A deadline that has passed gives way to the workflow's
    `timeout` from now.

    Args:
        session: the caller's session.
        workflows: one record or id, several, or a `select()`, as for `cancel`.

    Returns:
        The ids of those that were resumed, children too.

    Raises:
        ArgumentError: something else is given than workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    return apply_verb(session, workflows, _resume, name="resume")


def retry(session: Session, workflows: Selected) -> list[UUID]:
    """Enqueue workflows again that failed with an error of their own, from the step that failed.

    ```python
    manage.retry(session, select(Workflow).where(Workflow.status == WorkflowStatus.FAILED, Workflow.name == "checkout"))
    ```

    The failed outcomes that made a workflow fail are forgotten, and those steps are executed again, with all the tries
    of their policies; what succeeded is not. An outcome that the workflow had handled stays: a failed step after which
    it began another one that succeeded, unless its error is the one with which the workflow failed in the end, or is
    shown in that one's traceback as a cause or as one of a group. A signal that a forgotten step had consumed is put
    back in the inbox. Without a failed step, the workflow's function goes on after its last one, with the code of
    today. Timers and waits that were not over go on as they stand; a step that was being tried again begins its tries
    again. Children are not retried with their parents: pass them too, and the parent asks again for their outcome.
    One whose key a newer workflow has is left alone: `fork` it.

    Never commits; locks rows in the order of ids, as `cancel` does. The workflows keep their queues and count an
    attempt. A deadline that has passed gives way to the workflow's `timeout` from now.

    Args:
        session: the caller's session.
        workflows: one record or id, several, or a `select()`, as for `cancel`.

    Returns:
        The ids of those that were retried. Not those that were cancelled, or stopped for their crashes: `resume` them.

    Raises:
        ArgumentError: something else is given than workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    return apply_verb(session, workflows, _retry, name="retry")


def rewind(session: Session, workflows: Selected, *, to_step: str) -> list[UUID]:
    """Return workflows to before a step, whatever their status, and enqueue them again.

    ```python
    manage.rewind(session, order.checkout, to_step="charge#2")
    ```

    The record of that step and of those that were called after it, by their `position`, is deleted, with the events and
    stream items that they wrote; signals that they had consumed are put back in the inbox. The rest is replayed. **What
    the deleted steps did is not undone**: their business writes stand, and so do the children that they started, which
    go on; cancel those first where that is meant.

    An attempt that is executing the workflow loses it, as by `cancel`: nothing more of it is committed, and async code
    of it is cancelled at once. A finished workflow loses its outcome; one whose key a newer workflow has is left alone:
    `fork` it. Never commits; locks rows in the order of ids, as `cancel` does. A deadline that has passed gives way to
    the workflow's `timeout` from now.

    Args:
        session: the caller's session.
        workflows: one record or id, several, or a `select()`, as for `cancel`.
        to_step: the key of a recorded step, as in `Step.key`, which is the first to be executed again: `charge`,
            `charge#2`. There, `#` and `/` of keys that were chosen are `%23` and `%2F`.

    Returns:
        The ids of those that were rewound.

    Raises:
        ArgumentError: one of the workflows has no record of that step, and none was rewound; something else is given
            than workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    fault = fault_in(to_step)
    if fault is not None:
        raise ArgumentError(f"to_step={to_step!r} {fault}: give the key of a recorded step.")
    return apply_verb(session, workflows, partial(_rewind, to_step=to_step), name="rewind")


def change(
    session: Session,
    workflows: Selected,
    *,
    queue: str | None = None,
    priority: int | None = None,
    delay: timedelta | None = None,
    at: datetime | None = None,
) -> list[UUID]:
    """Move workflows that wait to another queue, or change their priority, or when they become due.

    ```python
    manage.change(session, select(Workflow).where(Workflow.queue == "mail"), queue="slow", priority=5)
    manage.change(session, order.reminder, delay=timedelta(0))
    ```

    What is running or finished is left alone. `delay` and `at` are for what has not started, whether its delay is over
    or not: the timer of a suspended workflow is a step of its own, and so one that has started is left alone then, and
    nothing of it is changed. A pending workflow keeps its place among those of its priority.

    Never commits; locks rows in the order of ids, as `cancel` does. Records in the session that were passed or changed
    are read again.

    Args:
        session: the caller's session.
        workflows: one record or id, several, or a `select()`, as for `cancel`.
        queue: the queue to which they go.
        priority: lower is served first; from -32,767 to 32,767.
        delay: how long after now they become due; zero is now. Not together with `at`.
        at: when they become due, with a time zone. A time in the past is now.

    Returns:
        The ids of those that were changed.

    Raises:
        ArgumentError: nothing is to be changed; a value is blank or out of range; something else is given than
            workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    StartOptions(queue=queue, priority=0 if priority is None else priority, delay=delay, at=at)  # which refuses
    given = Changes(queue, priority, at, None if delay is None else delay.total_seconds())
    if given == Changes(None, None, None, None):
        raise ArgumentError("change() was given nothing to change: pass queue, priority, delay or at.")
    return apply_verb(session, workflows, partial(_change, given=given), name="change")


def delete(session: Session, workflows: Selected) -> list[UUID]:
    """Delete finished workflows with their trees, and with their steps, signals, events and streams.

    ```python
    old = select(Workflow).where(Workflow.id < manage.id_at(cutoff), Workflow.finished_at < cutoff)
    manage.delete(session, old.order_by(Workflow.id).limit(1000))
    ```

    A workflow goes with its children, and theirs, if all of them are finished; detached ones stay, without a parent. A
    child goes by itself once its parent is finished, which may ask for its outcome until then. What is not finished is
    left alone: `cancel` it first.

    Never commits; locks rows in the order of ids. Waits for transactions that refer to one of them by a foreign key.
    Of the application's foreign keys, one with `ON DELETE SET NULL` or `CASCADE` is followed, any other refuses; a
    deferred one does that when the caller commits. Everything is in a savepoint: after an error the transaction goes
    on, and nothing is deleted.

    Args:
        session: the caller's session.
        workflows: one record or id, several, or a `select()`, as for `cancel`.

    Returns:
        The ids of those that were deleted, children too; the others are not finished, or not there.

    Raises:
        WorkflowReferencedError: rows of the application refer to one of them.
        ArgumentError: something else is given than workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    return apply_verb(session, workflows, _delete, name="delete")


def _cancel(session: Session, wanted: Selection) -> list[UUID]:
    connection = connection_of(session)
    for _ in range(_ROUNDS):
        with connection.begin_nested() as savepoint:
            locked, complete = manage.lock_unfinished_trees(session, wanted)
            if complete:
                return _cancelled(session, locked, wanted)
            savepoint.rollback()  # which releases the locks
    return _cancelled(session, manage.lock_growing_trees(session, wanted), wanted)


def _cancelled(session: Session, locked: list[UUID], wanted: Selection) -> list[UUID]:
    workers = workers_of(session, locked)
    enqueued = [hints.EVERYWHERE] if manage.cancel(session, locked, wanted) else []
    hints.announce(session, *enqueued, *map(hints.to_worker, workers))
    return locked


def _resume(session: Session, wanted: Selection) -> list[UUID]:
    return _announced(session, manage.resume(session, wanted))


def _retry(session: Session, wanted: Selection) -> list[UUID]:
    return _announced(session, manage.retry(session, wanted))


def _rewind(session: Session, wanted: Selection, *, to_step: str) -> list[UUID]:
    rewound, workers = manage.rewind(session, wanted, to_step=to_step)
    hints.announce(session, *map(hints.to_worker, workers))
    return _announced(session, rewound)


def _change(session: Session, wanted: Selection, *, given: Changes) -> list[UUID]:
    return _announced(session, changes.change(session, wanted, given))


def _announced(session: Session, enqueued: list[UUID]) -> list[UUID]:
    if enqueued:
        hints.announce(session, hints.EVERYWHERE)
    return enqueued


def _delete(session: Session, wanted: Selection) -> list[UUID]:
    try:
        with session.begin_nested():
            locked = manage.lock_deletable_trees(session, wanted)
            manage.delete(session, locked)
    except IntegrityError as error:
        if sqlstate(error) not in _REFERENCED:
            raise
        raise WorkflowReferencedError(
            f"rows of the application refer to workflows that were to be deleted: {first_line(error)}. "
            "Nothing was deleted: delete or change those rows first, or give their foreign key ON DELETE SET NULL."
        ) from error
    return locked
