"""Where a process is killed: around one of the commits that it makes.

What happens here happens in the process that dies. Which points there are, `everywhere` finds out.
"""

from __future__ import annotations

import os
import re
import signal
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn
from uuid import UUID

from sqlalchemy import Connection, Engine, ExceptionContext, event
from sqlalchemy.orm import Session

from sqla_durable.models import SCHEMA, Step, Worker, Workflow
from sqla_durable.models.status import WorkflowStatus

_WROTE, _BEGUN = "sqla_durable.testing.wrote", "sqla_durable.testing.begun"
_WRITES = re.compile(
    r"(?:\binsert\s+into|(?<!for )(?<!key )(?<!do )\bupdate|\bdelete\s+from|\bmerge\s+into)\s+(\S+)", re.I
)
_OF_THE_ENGINE = ("workflow", "step", "signal")  # its statements name all of them, whatever they write
_QUERY_MESSAGE = b"Q" + struct.pack("!I", 11) + b"COMMIT\0"  # PostgreSQL manual, Message Formats: Query


class Moment(StrEnum):
    """When a process dies, as seen from one of its commits; a statement in autocommit is one.

    `before` the COMMIT is sent; `inside`: it is sent, and the answer not read, so that the process cannot know what
    became of it; `after` its answer.
    """

    BEFORE = "before"
    INSIDE = "inside"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """A point at which a worker is killed.

    Attributes:
        commit: the number of the commit, from 1, among those of its process that change anything but its lease.
        moment: when, as seen from that commit.
        writes: what the commit contains, in words; empty as long as nobody was killed there.
    """

    commit: int
    moment: Moment
    writes: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.moment} commit {self.commit}" + (f" ({self.writes})" if self.writes else "")


class Fuse:
    """Kills this process at a point, if it gets there.

    It watches every engine of the process. Commits that change nothing do not count, and neither do those that change
    the lease of a worker only, or workflows of others, which any worker takes over: when they come is a matter of time.

    Args:
        point: where to die.
        workflow_id: the workflow whose progress describes the commit; None where its id is not known before: then
            commits count whatever they are about.
        tell: called with what the commit contains, before it is sent.
    """

    def __init__(self, point: CrashPoint, *, workflow_id: UUID | None, tell: Callable[[str], None]) -> None:
        self._point = point
        self._workflow_id = workflow_id
        self._tell = tell
        self._count = 0
        self._lock = threading.Lock()

    def light(self) -> None:
        """Watch from now on."""
        event.listen(Engine, "begin", _forget)
        event.listen(Engine, "before_cursor_execute", _begin)
        event.listen(Engine, "after_cursor_execute", _note)
        event.listen(Engine, "after_cursor_execute", self._on_statement)
        event.listen(Engine, "handle_error", _roll_back)
        event.listen(Engine, "commit", self._on_commit)

    def _on_commit(self, connection: Connection) -> None:
        tables: set[str] = connection.info.pop(_WROTE, set())
        if tables and not _is_autocommit(connection) and self._counts(connection, tables) and self._due():
            self._die(connection, tables)

    def _on_statement(self, connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        """Commit a statement that is a transaction of its own, or die around that."""
        if not connection.info.pop(_BEGUN, False):
            return
        tables = _changed_by(connection, statement) if _has_written(connection) else set[str]()
        if tables and self._counts(connection, tables) and self._due():
            self._die(connection, tables)
        _execute(connection, "COMMIT")

    def _counts(self, connection: Connection, tables: set[str]) -> bool:
        others = tables - {f"{_schema(connection)}.{each}" for each in _OF_THE_ENGINE}
        return bool(others) or self._workflow_id is None or _has_changed(connection, self._workflow_id)

    def _due(self) -> bool:
        with self._lock:
            self._count += 1
            return self._count == self._point.commit

    def _die(self, connection: Connection, tables: set[str]) -> NoReturn:
        # Told first: whoever sees the commit knows then that this process dies.
        self._tell(_described(connection, self._workflow_id, tables))
        try:
            match self._point.moment:
                case Moment.BEFORE:
                    pass
                case Moment.INSIDE:
                    _send_commit(connection)
                case Moment.AFTER:
                    if _is_autocommit(connection):
                        _execute(connection, "COMMIT")
                    else:
                        connection.dialect.do_commit(connection.connection)
        finally:
            die()


def die() -> NoReturn:
    """End this process as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)
    while True:  # until the signal is delivered
        signal.pause()


def can_die_inside(engine: Engine) -> bool:
    """Tell whether the engine's driver can send a COMMIT without waiting for the answer."""
    return engine.dialect.driver in ("psycopg", "asyncpg")


def _send_commit(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        driver._transport.write(_QUERY_MESSAGE)
    else:
        driver.pgconn.send_query(b"COMMIT")
        driver.pgconn.flush()


def _forget(connection: Connection) -> None:
    connection.info.pop(_WROTE, None)


def _note(connection: Connection, cursor: Any, statement: str, *_: object) -> None:
    """Remember the tables that a statement has changed."""
    if cursor.rowcount != 0 and not _is_autocommit(connection) and (tables := _changed_by(connection, statement)):
        connection.info.setdefault(_WROTE, set()).update(tables)


def _begin(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
    """Begin the transaction that a statement in autocommit is: so that there is a moment before its commit."""
    if _is_autocommit(connection) and _changed_by(connection, statement):
        _execute(connection, "BEGIN")
        connection.info[_BEGUN] = True


def _roll_back(context: ExceptionContext) -> None:
    if context.connection is not None and context.connection.info.pop(_BEGUN, False):
        with suppress(Exception):  # the connection may be lost
            _execute(context.connection, "ROLLBACK")


def _has_written(connection: Connection) -> bool:
    """Tell whether the transaction has changed or locked anything; rows that it returns say nothing about that."""
    return bool(_execute(connection, "SELECT pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL"))


def _has_changed(connection: Connection, workflow_id: UUID) -> bool:
    """Tell whether the transaction has written rows of a workflow, or of its children and theirs."""
    schema = _schema(connection)
    rows = " UNION ALL ".join(
        f"SELECT FROM {schema}.{name} AS row JOIN tree ON row.{key} = tree.id "
        "WHERE row.xmin = pg_catalog.pg_current_xact_id()::xid"
        for name, key in (("workflow", "id"), ("step", "workflow_id"), ("signal", "workflow_id"))
    )
    return bool(
        _execute(
            connection,
            f"WITH RECURSIVE tree AS (SELECT '{workflow_id}'::uuid AS id UNION "  # noqa: S608
            f"SELECT child.id FROM {schema}.workflow AS child JOIN tree ON child.parent_id = tree.id) "
            f"SELECT EXISTS ({rows})",
        )
    )


def _execute(connection: Connection, statement: str) -> Any:
    """Execute on the driver's cursor, past all listeners; give the first column of the first row."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement)
        row = cursor.fetchone() if cursor.description else None
        return None if row is None else row[0]
    finally:
        cursor.close()


def _is_autocommit(connection: Connection) -> bool:
    return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))


def _changed_by(connection: Connection, statement: str) -> set[str]:
    """Give the tables that a statement changes, but for that of the leases; a CTE that changes hides in a SELECT."""
    lease = f"{_schema(connection)}.{Worker.__tablename__}"
    return {each.replace('"', "").partition("(")[0] for each in _WRITES.findall(statement)} - {lease}


def _schema(connection: Connection) -> str:
    names: dict[str, str] = connection.get_execution_options().get("schema_translate_map") or {}
    return names.get(SCHEMA) or SCHEMA


def _described(connection: Connection, workflow_id: UUID | None, tables: set[str]) -> str:
    """Say what a transaction is about to commit; it is part of the message only, so no failure of it counts."""
    ours = {each.rpartition(".")[2] for each in tables}
    words = [f"rows of {each}" for each in sorted(tables) if each.rpartition(".")[2] not in _OF_THE_ENGINE]
    with suppress(Exception):
        workflow = None if workflow_id is None else Session(connection).get(Workflow, workflow_id)
        if workflow is not None and Step.__tablename__ in ours:
            words += [f"checkpoint of step {each!r}" for each in _newest(workflow.steps)]
        if workflow is not None and Workflow.__tablename__ in ours:
            words.append(_standing(workflow.status))
    return ", ".join(words)


def _newest(steps: list[Step]) -> list[str]:
    latest = max((each.finished_at for each in steps), default=None)
    return [each.key for each in steps if each.finished_at == latest]


def _standing(status: WorkflowStatus) -> str:
    return {WorkflowStatus.RUNNING: "claim", WorkflowStatus.SUSPENDED: "wait"}.get(status, f"outcome: {status}")
