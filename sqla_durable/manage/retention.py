"""Make, change and drop policies of retention in the caller's transaction; and the batches that carry them out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import chain
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import sqla_durable.api.sessions as sessions
from sqla_durable.definitions.checks import require_text
from sqla_durable.definitions.database_errors import is_out_of_time, is_transient, sqlstate
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.retention import RetentionOptions, Statuses
from sqla_durable.models import Retention
from sqla_durable.store import retention, schedules
from sqla_durable.store.retention import DuePolicy, Wanted

PAUSES = 4
"""How many times as long as a batch has taken the next one of its policy waits: a fifth of the time at most."""

_LOCK_NOT_AVAILABLE = "55P03"
_MOST_WAITS = 3
_PAUSE_AFTER_SKIP = 60.0


def put_retention(
    session: Session, name: str, *, keep: timedelta, workflow: str | None = None, status: Statuses = None
) -> Retention:
    """Make a policy of retention, or change the one of that name, in the caller's transaction; return its record.

    ```python
    manage.put_retention(session, "orders", workflow="checkout", status="succeeded", keep=timedelta(days=90))
    ```

    Never commits; locks the policy's row. From the caller's commit on, workers do what it says.

    Args:
        session: the caller's session.
        name: that of the policy.
        keep: how long after its end a workflow is kept.
        workflow: whose: a name, or a pattern in which `*` stands for any text; by default every one.
        status: with which end: "succeeded", "failed", "cancelled", or several; by default every one.

    Raises:
        ArgumentError: an option is wrong.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    require_text(name, what="policy's name")
    wanted = RetentionOptions.of(workflow=workflow, status=status, keep=keep)

    def put(session: Session) -> Retention:
        session.flush()
        retention.put(session, name, wanted, declared=False)
        return session.get_one(Retention, name, populate_existing=True)

    return sessions.write(session, put, name="manage.put_retention", rights="operator")


def drop_retention(session: Session, name: str) -> bool:
    """Drop a policy of retention: from the caller's commit on nothing more is deleted for it.

    Never commits; locks the policy's row, and waits for a worker that is deleting a batch for it.

    Returns:
        Whether there was one of that name.

    Raises:
        ArgumentError: the name is blank, or cannot be stored.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    require_text(name, what="policy's name")

    def drop(session: Session) -> bool:
        session.flush()
        was_there = retention.drop(session, name)
        known = session.identity_map.get(session.identity_key(Retention, name))
        if known is not None:
            session.expire(known)
        return was_there

    return sessions.write(session, drop, name="manage.drop_retention", rights="operator")


@dataclass(frozen=True, slots=True)
class Batch:
    """What a batch has done.

    Attributes:
        roots: how many workflows are gone that were no children.
        deleted: how many are gone, children too.
        refused: how many roots were left because the database refuses to delete them.
        seen: the id up to which everything was looked at.
        is_last: whether nothing comes after it.
    """

    roots: int
    deleted: int
    refused: int
    seen: UUID
    is_last: bool


def prune(connection: Connection, policy: DuePolicy, *, limit: int) -> Batch:
    """Delete a batch for a policy whose row is locked, and write down how far it is. Waits for nobody, or briefly."""
    began = time.monotonic()
    batch = delete_batch(connection, policy.wanted, after=policy.position, limit=limit)
    retention.note(
        connection,
        policy,
        position=None if batch.is_last else batch.seen,
        deleted=batch.deleted,
        refused=batch.refused,
        pause=policy.pause if batch.is_last else PAUSES * (time.monotonic() - began),
    )
    return batch


def skip_one(connection: Connection, name: str) -> UUID | None:
    """Let the walk of a policy pass over what comes next, which cannot be deleted in the time of a batch.

    Returns:
        What was passed over.
    """
    policy = retention.take(connection, name)
    if policy is None:
        return None
    found = retention.find(connection, policy.wanted, after=policy.position, limit=1)
    position, pause = (None, policy.pause) if found.is_last else (found.seen, _PAUSE_AFTER_SKIP)
    retention.note(connection, policy, position=position, deleted=0, refused=len(found.roots), pause=pause)
    return found.roots[0] if found.roots else None


def delete_batch(connection: Connection, wanted: Wanted, *, after: UUID | None, limit: int) -> Batch:
    """Delete at most so many finished workflows with their trees, among the next ones in the order of ids.

    In a transaction of the connection's, which its caller commits. What others lock is left. What the database refuses
    to delete, such as for a foreign key of the application, is left and counted.
    """
    schedules.limit_lock_waits(connection)
    retention.check_at_once(connection)
    found = retention.find(connection, wanted, after=after, limit=limit)
    trees = retention.lock_trees(connection, found.roots, wanted)
    deletion = _Deletion(connection)
    deletion.delete(list(trees.values()))
    return Batch(deletion.roots, deletion.deleted, deletion.refused, found.seen, found.is_last)


class _Deletion:
    """Deletes trees together; what fails, in halves, so that one that is refused does not keep the others."""

    def __init__(self, connection: Connection) -> None:
        self.roots, self.deleted, self.refused, self._waits = 0, 0, 0, 0
        self._connection = connection

    def delete(self, trees: Sequence[Sequence[UUID]]) -> None:
        """Delete trees whose rows are locked."""
        if not trees or self._waits >= _MOST_WAITS:
            return
        failure = self._try(list(chain(*trees)))
        if failure is None:
            self.roots += len(trees)
            self.deleted += sum(map(len, trees))
        elif len(trees) > 1:
            half = len(trees) // 2
            self.delete(trees[:half])
            self.delete(trees[half:])
        elif sqlstate(failure) == _LOCK_NOT_AVAILABLE:
            self._waits += 1
        else:
            self.refused += 1

    def _try(self, ids: Sequence[UUID]) -> DBAPIError | None:
        """Delete these, or nothing; return the error of what refuses."""
        try:
            with self._connection.begin_nested():
                retention.delete(self._connection, ids)
        except DBAPIError as error:
            if is_transient(error) or is_out_of_time(error):
                raise
            return error
        return None
