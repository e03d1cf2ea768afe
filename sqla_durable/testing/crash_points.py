"""Where a process is killed: before, inside or after one of the commits that it makes.

This module runs in the process that is killed. `crashes` finds out which points there are.
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
from sqla_durable.models.base import WorkflowStatus

_WROTE, _BEGUN = "sqla_durable.testing.wrote", "sqla_durable.testing.begun"
_WRITES = re.compile(
    r"(?:\binsert\s+into|(?<!for )(?<!key )(?<!do )\bupdate|\bdelete\s+from|\bmerge\s+into)\s+(\S+)", re.I
)
_WORKFLOW_TABLES = ("workflow", "step", "signal")  # the statements of the package name all of them, whatever they write
_QUERY_MESSAGE = b"Q" + struct.pack("!I", 11) + b"COMMIT\0"  # PostgreSQL manual, Message Formats: Query


class Moment(StrEnum):
    """When a process is killed, relative to one of its commits; a statement in autocommit counts as one.

    `before`: the COMMIT is not sent yet. `inside`: it is sent and its answer not read, so that the process cannot know
    whether it succeeded. `after`: its answer was read.
    """

    BEFORE = "before"
    INSIDE = "inside"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """A point at which a worker is killed.

    Attributes:
        commit: the number of the commit, from 1, among those of its process that change more than a lease.
        moment: when, relative to that commit.
        writes: a description of what the commit contains; empty until a worker was killed there.
    """

    commit: int
    moment: Moment
    writes: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.moment} commit {self.commit}" + (f" ({self.writes})" if self.writes else "")


class ProcessKiller:
    """Kills this process at a point, if the process reaches it.

    It watches every engine of the process. Not counted are commits that change nothing, and those that change only the
    lease of a worker, or other workflows, which any worker may reclaim: their number depends on timing.

    Args:
        point: where to kill the process.
        workflow_id: the workflow whose commits count; None where its id is not known in advance: then all commits
            count.
        on_point: called with a description of what the commit contains, before the process is killed.
    """

    def __init__(self, point: CrashPoint, *, workflow_id: UUID | None, on_point: Callable[[str], None]) -> None:
        self._point = point
        self._workflow_id = workflow_id
        self._on_point = on_point
        self._count = 0
        self._lock = threading.Lock()

    def install(self) -> None:
        """Watch all engines of this process from now on."""
        event.listen(Engine, "begin", _clear_written)
        event.listen(Engine, "before_cursor_execute", _begin_autocommit)
        event.listen(Engine, "after_cursor_execute", _remember_written)
        event.listen(Engine, "after_cursor_execute", self._on_statement)
        event.listen(Engine, "handle_error", _roll_back_autocommit)
        event.listen(Engine, "commit", self._on_commit)

    def _on_commit(self, connection: Connection) -> None:
        tables: set[str] = connection.info.pop(_WROTE, set())
        if tables and not _is_autocommit(connection) and self._counts(connection, tables) and self._is_reached():
            self._kill(connection, tables)

    def _on_statement(self, connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        """Commit a statement in autocommit, or kill the process before, inside or after that."""
        if not connection.info.pop(_BEGUN, False):
            return
        tables = _changed_by(connection, statement) if _has_written(connection) else set[str]()
        if tables and self._counts(connection, tables) and self._is_reached():
            self._kill(connection, tables)
        _execute(connection, "COMMIT")

    def _counts(self, connection: Connection, tables: set[str]) -> bool:
        others = tables - {f"{_schema(connection)}.{each}" for each in _WORKFLOW_TABLES}
        return bool(others) or self._workflow_id is None or _has_changed(connection, self._workflow_id)

    def _is_reached(self) -> bool:
        with self._lock:
            self._count += 1
            return self._count == self._point.commit

    def _kill(self, connection: Connection, tables: set[str]) -> NoReturn:
        # First: when the test sees the commit, it must know already that this process is killed.
        self._on_point(_described(connection, self._workflow_id, tables))
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
            kill_this_process()


def kill_this_process() -> NoReturn:
    """Kill this process with SIGKILL, as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)
    while True:  # until the signal is delivered
        signal.pause()


def supports_inside(engine: Engine) -> bool:
    """Return whether the engine's driver can send a COMMIT without waiting for the answer."""
    return engine.dialect.driver in ("psycopg", "asyncpg")


def _send_commit(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        driver._transport.write(_QUERY_MESSAGE)
    else:
        driver.pgconn.send_query(b"COMMIT")
        driver.pgconn.flush()


def _clear_written(connection: Connection) -> None:
    connection.info.pop(_WROTE, None)


def _remember_written(connection: Connection, cursor: Any, statement: str, *_: object) -> None:
    """Remember the tables that a statement has changed."""
    if cursor.rowcount != 0 and not _is_autocommit(connection) and (tables := _changed_by(connection, statement)):
        connection.info.setdefault(_WROTE, set()).update(tables)


def _begin_autocommit(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
    """Begin a transaction for a statement in autocommit, so that there is a moment before its commit."""
    if _is_autocommit(connection) and _changed_by(connection, statement):
        _execute(connection, "BEGIN")
        connection.info[_BEGUN] = True


def _roll_back_autocommit(context: ExceptionContext) -> None:
    if context.connection is not None and context.connection.info.pop(_BEGUN, False):
        with suppress(Exception):  # the connection may be lost
            _execute(context.connection, "ROLLBACK")


def _has_written(connection: Connection) -> bool:
    """Return whether the transaction has changed or locked anything; the rows that it returned do not show that."""
    return bool(_execute(connection, "SELECT pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL"))


def _has_changed(connection: Connection, workflow_id: UUID) -> bool:
    """Return whether the transaction has written rows of a workflow or of its descendants."""
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
    """Execute on the driver's cursor, past all listeners; return the first column of the first row."""
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
    """Return the tables that a statement changes, without that of the leases; a SELECT may change some in its CTEs."""
    lease = f"{_schema(connection)}.{Worker.__tablename__}"
    return {each.replace('"', "").partition("(")[0] for each in _WRITES.findall(statement)} - {lease}


def _schema(connection: Connection) -> str:
    names: dict[str, str] = connection.get_execution_options().get("schema_translate_map") or {}
    return names.get(SCHEMA) or SCHEMA


def _described(connection: Connection, workflow_id: UUID | None, tables: set[str]) -> str:
    """Describe what a transaction is about to commit; it is only for the message, so its failures are ignored."""
    tables_of_schema = {each.rpartition(".")[2] for each in tables}
    words = [f"rows of {each}" for each in sorted(tables) if each.rpartition(".")[2] not in _WORKFLOW_TABLES]
    with suppress(Exception):
        workflow = None if workflow_id is None else Session(connection).get(Workflow, workflow_id)
        if workflow is not None and Step.__tablename__ in tables_of_schema:
            words += [f"checkpoint of step {each!r}" for each in _latest_steps(workflow.steps)]
        if workflow is not None and Workflow.__tablename__ in tables_of_schema:
            words.append(_status_words(workflow.status))
    return ", ".join(words)


def _latest_steps(steps: list[Step]) -> list[str]:
    latest = max((each.finished_at for each in steps), default=None)
    return [each.key for each in steps if each.finished_at == latest]


def _status_words(status: WorkflowStatus) -> str:
    return {WorkflowStatus.RUNNING: "claim", WorkflowStatus.SUSPENDED: "wait"}.get(status, f"outcome: {status}")
