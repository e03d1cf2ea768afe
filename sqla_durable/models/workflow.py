"""The model of a workflow. The CHECK constraints hold the state machine, whatever writes the rows."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, FromClause, Index, Integer, SmallInteger, false, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column, relationship, validates
from uuid_utils.compat import uuid7

from sqla_durable.models.base import LONGEST_KEY, OPTIONAL_JSON, REVISION, SCHEMA, Base, name_check, shown, times_check
from sqla_durable.models.status import WorkflowStatus

if TYPE_CHECKING:
    from sqla_durable.models.history import Event, Signal, Step
    from sqla_durable.models.workers import Worker

_NEW_ID = text(
    "CAST(pg_catalog.lpad(pg_catalog.to_hex(CAST(pg_catalog.floor("
    "extract(epoch FROM pg_catalog.statement_timestamp()) * 1000.0) AS bigint)), 12, '0') || '7' || "
    "pg_catalog.substr(pg_catalog.replace(CAST(pg_catalog.gen_random_uuid() AS text), '-', ''), 14) AS uuid)"
)
"""A UUID of version 7, whose order is that of time: `uuidv7()` is there from PostgreSQL 18 on."""

_UNREADABLE_WAIT = (
    '$[*] ? (@.type() <> "object" || @.signal.type() <> "string" || @.children.type() <> "array" || '
    '@.open.type() <> "number" || @.open < 0 || @.open > 1000000 || @.open.floor() <> @.open || '
    'exists(@.children[*] ? (@.type() <> "string")) || '
    'exists(@.children[*] ? (!(@ like_regex "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"))))'
)
"""What no worker could read in `awaits`, as an SQL/JSON path."""


class Workflow(Base):
    """One durable workflow: its input, its status, and its outcome.

    A row is enough to start one: `INSERT INTO durable.workflow (name, input) VALUES ('checkout', '{"order_id": 1}')`.
    Arguments are stored by parameter name. `token` identifies the attempt that may write while it is running, and that
    finished it. `priority` is served lowest first. One that is suspended with `wake_at` waits for that time. `attempt`
    counts up when a worker dies; `crashes` its last attempts in a row that died before they recorded a step. An `id`
    begins with the time of its start, so their order is that of the starts; see `id_at`. `cancellation` is set for a
    saga: it `compensates`, or the reason why it does now. `headers` are what interceptors have set.
    """

    __tablename__ = "workflow"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7, server_default=_NEW_ID)
    name: Mapped[str]
    key: Mapped[str | None]
    queue: Mapped[str] = mapped_column(server_default="default")
    priority: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    status: Mapped[WorkflowStatus] = mapped_column(server_default=WorkflowStatus.PENDING.value)
    input: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    output: Mapped[Any | None] = mapped_column(JSONB)
    error: Mapped[dict[str, Any] | None] = mapped_column(OPTIONAL_JSON)
    attempt: Mapped[int] = mapped_column(Integer, server_default="1")
    crashes: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    token: Mapped[UUID | None]
    worker_id: Mapped[UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    enqueued_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    wake_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    awaits: Mapped[list[dict[str, Any]] | None] = mapped_column(OPTIONAL_JSON)
    deadline_at: Mapped[datetime | None]
    timeout: Mapped[timedelta | None]
    parent_id: Mapped[UUID | None] = mapped_column(ForeignKey(f"{SCHEMA}.workflow.id", ondelete="SET NULL"))
    parent_key: Mapped[str | None]
    detached: Mapped[bool] = mapped_column(server_default=false())
    forked_from: Mapped[UUID | None]
    version: Mapped[str | None]
    cancellation: Mapped[str | None]
    continued_at: Mapped[datetime | None]
    headers: Mapped[dict[str, str] | None] = mapped_column(OPTIONAL_JSON)

    steps: Mapped[list[Step]] = relationship(
        back_populates="workflow", order_by="Step.position", passive_deletes="all", viewonly=False
    )
    signals: Mapped[list[Signal]] = relationship(
        back_populates="workflow", order_by="Signal.id", passive_deletes="all", viewonly=False
    )
    events: Mapped[list[Event]] = relationship(
        back_populates="workflow", order_by="Event.id", passive_deletes="all", viewonly=False
    )
    parent: Mapped[Workflow | None] = relationship(back_populates="children", remote_side="Workflow.id")
    children: Mapped[list[Workflow]] = relationship(
        back_populates="parent", order_by="Workflow.created_at", passive_deletes="all", viewonly=False
    )
    # No foreign key: a claim would lock the worker's row once for each workflow, and a heartbeat updates that row.
    worker: Mapped[Worker | None] = relationship(primaryjoin="foreign(Workflow.worker_id) == Worker.id", viewonly=True)

    __table_args__ = (
        name_check("name"),
        name_check("key"),
        name_check("queue"),
        CheckConstraint(
            "status IN ('pending', 'running', 'suspended', 'succeeded', 'failed', 'cancelled')", name="status"
        ),
        CheckConstraint("pg_catalog.jsonb_typeof(input) = 'object'", name="input"),
        CheckConstraint("attempt >= 1 AND crashes BETWEEN 0 AND attempt", name="attempt"),
        CheckConstraint(
            "CASE status WHEN 'running' THEN token IS NOT NULL "
            "WHEN 'pending' THEN token IS NULL WHEN 'suspended' THEN token IS NULL ELSE true END",
            name="token",
        ),
        CheckConstraint("status <> 'running' OR (worker_id IS NOT NULL AND started_at IS NOT NULL)", name="running"),
        CheckConstraint(
            "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)", name="finished"
        ),
        CheckConstraint("(status = 'succeeded') = (output IS NOT NULL)", name="output"),
        CheckConstraint(
            "CASE WHEN error IS NULL THEN status <> 'failed' "
            "ELSE status IN ('failed', 'cancelled') "
            "AND pg_catalog.jsonb_typeof(error -> text 'type') IS NOT DISTINCT FROM 'string' END",
            name="error",
        ),
        CheckConstraint("wake_at IS NULL OR status = 'suspended'", name="wake"),
        CheckConstraint(
            "awaits IS NULL OR (status = 'suspended' AND pg_catalog.jsonb_typeof(awaits) = 'array' "
            f"AND NOT pg_catalog.jsonb_path_exists(awaits, '{_UNREADABLE_WAIT}'))",
            name="awaits",
        ),
        name_check("parent_key", longest=LONGEST_KEY),
        CheckConstraint("parent_id <> id", name="parent_id"),
        name_check("version"),
        CheckConstraint("cancellation IN ('compensates', 'requested', 'overdue')", name="cancellation"),
        CheckConstraint(
            "pg_catalog.jsonb_typeof(headers) = 'object' "
            """AND NOT pg_catalog.jsonb_path_exists(headers, '$.* ? (@.type() <> "string")')""",
            name="headers",
        ),
        times_check(
            "created_at",
            "enqueued_at",
            "wake_at",
            "started_at",
            "finished_at",
            "deadline_at",
            "continued_at",
        ),
        # Each part of it: together they may be short, and add up to a time that is out of range on the way.
        CheckConstraint(
            "timeout BETWEEN interval '0' AND interval '36500 days' "
            "AND extract(year FROM timeout) BETWEEN 0.0 AND 100.0 "
            "AND extract(day FROM timeout) BETWEEN 0.0 AND 36500.0",
            name="timeout",
        ),
        # The same workflow and key are the same workflow: this index refuses the second.
        Index("workflow_name_key_key", "name", "key", unique=True, postgresql_where=text("key IS NOT NULL")),
        # The claim: first in, first out within a priority.
        Index(
            "workflow_pending_idx",
            "queue",
            "priority",
            "enqueued_at",
            "id",
            postgresql_where=text("status = 'pending'"),
        ),
        # Reclaim, heartbeat, and what a worker is doing now.
        Index("workflow_running_idx", "worker_id", postgresql_where=text("status = 'running'")),
        # Timers and delayed starts that are due; and, by id and to be counted, what waits without a time.
        Index("workflow_suspended_idx", "wake_at", "id", postgresql_where=text("status = 'suspended'")),
        # What has failed lately.
        Index("workflow_failed_idx", "finished_at", postgresql_where=text("status = 'failed'")),
        # What is to fail when its time has come.
        Index(
            "workflow_deadline_idx",
            "deadline_at",
            postgresql_where=text("finished_at IS NULL AND deadline_at IS NOT NULL"),
        ),
        # The tree under a workflow.
        Index("workflow_parent_idx", "parent_id", "id", postgresql_where=text("parent_id IS NOT NULL")),
        {"comment": f"sqla-durable {REVISION}"},
    )

    @validates("key", "queue", "name")
    def _refuse_blank(self, attribute: str, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError(f"a workflow's {attribute} must not be blank, got {value!r}")
        return value

    def __repr__(self) -> str:
        return shown(self, "name", "status", "id")


def _write_only_what_is_given(table: FromClause) -> None:
    """Leave out of an ORM's INSERT what has no value: with NULL for it, a role would need the right to write it.

    Source: SQLAlchemy, `TypeEngine.evaluates_none`.
    """
    for each in table.c:
        if each.nullable and not each.type.should_evaluate_none:
            each.type = each.type.evaluates_none()


_write_only_what_is_given(Workflow.__table__)
