"""The tables: a workflow; what it records, receives and publishes; and workers.

The CHECK constraints hold the state machine, whatever writes the rows.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    FromClause,
    Identity,
    Index,
    Integer,
    SmallInteger,
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, foreign, mapped_column, relationship, validates
from uuid_utils.compat import uuid7

from sqla_durable.models.base import (
    LONGEST_KEY,
    OPTIONAL_JSON,
    REVISION_COMMENT,
    SCHEMA,
    Base,
    StepStatus,
    WorkflowStatus,
    headers_check,
    name_check,
    shown,
    tags_check,
    times_check,
)

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
    saga: it `compensates`, or the reason why it does now. `headers` are what interceptors have set, and
    `schedule` is the name of the schedule that has started it. `by` is the key of limits and turns in its queue, and
    `place` how long it keeps its place there, where the queue makes claims note that: while it is "running", until it
    is "finished"; or its key's place alone, until it is finished ("key") or until it has not failed ("key_failed").
    `former_key` is the key that a newer workflow of the name has now. `tags` are for those who search:
    `Workflow.tags.contains({"tenant": "7"})`.
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
    schedule: Mapped[str | None]
    by: Mapped[str | None]
    place: Mapped[str | None]
    tags: Mapped[dict[str, str] | None] = mapped_column(OPTIONAL_JSON)
    former_key: Mapped[str | None]

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
        headers_check(),
        name_check("by"),
        tags_check(),
        CheckConstraint("place IN ('running', 'finished', 'key', 'key_failed')", name="place"),
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
        # What a schedule has started and is not finished.
        Index(
            "workflow_schedule_idx",
            "schedule",
            postgresql_where=text("schedule IS NOT NULL AND finished_at IS NULL"),
        ),
        # The claim where keys take turns.
        Index(
            "workflow_by_idx",
            "queue",
            "priority",
            "by",
            "enqueued_at",
            "id",
            postgresql_where=text("status = 'pending' AND by IS NOT NULL"),
        ),
        # What has started in a queue with limits, and goes on there or keeps a place.
        Index(
            "workflow_place_idx",
            "queue",
            "status",
            "by",
            postgresql_where=text(
                "(status = 'pending' AND place IS NOT NULL) OR (status = 'suspended' AND place <> 'running') "
                "OR (status = 'failed' AND place = 'key_failed')"
            ),
        ),
        # What goes on there, in the order of the claim.
        Index(
            "workflow_going_on_idx",
            "queue",
            "priority",
            "enqueued_at",
            "id",
            postgresql_where=text("status = 'pending' AND place IS NOT NULL"),
        ),
        # What has some tags.
        Index(
            "workflow_tags_idx",
            "tags",
            postgresql_using="gin",
            postgresql_ops={"tags": "jsonb_path_ops"},
            postgresql_where=text("tags IS NOT NULL"),
        ),
        # The tree under a workflow.
        Index("workflow_parent_idx", "parent_id", "id", postgresql_where=text("parent_id IS NOT NULL")),
        {"comment": REVISION_COMMENT},
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


class Step(Base):
    """The checkpoint of one step: its outcome, recorded once and returned on every replay.

    `key` is the step's identity in its workflow: name and occurrence (`charge`, `charge#2`), or an explicit key.
    `attempt` is the workflow's attempt that recorded it, `tries` how many tries it took, those of earlier attempts
    included, `position` the order in which the workflow called it. While a step is `retrying`, `error` is that of its
    last try and `wake_at` the time of the next one; while it is `waiting`, `wake_at` is the end of that, if it has one.
    The row becomes the outcome's when there is one. A step that is `running` has a row once it has reported `details`,
    at `finished_at` for the last time; that of a callback is when it was last kept alive.
    """

    __tablename__ = "step"

    workflow_id: Mapped[UUID] = mapped_column(ForeignKey(Workflow.id, ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    position: Mapped[int] = mapped_column(Integer)
    status: Mapped[StepStatus]
    output: Mapped[Any | None] = mapped_column(JSONB)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    attempt: Mapped[int] = mapped_column(Integer)
    tries: Mapped[int] = mapped_column(Integer, server_default="1")
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    wake_at: Mapped[datetime | None]
    details: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True))

    workflow: Mapped[Workflow] = relationship(back_populates="steps")

    __table_args__ = (
        name_check("key", longest=LONGEST_KEY),
        name_check("name", longest=LONGEST_KEY),
        CheckConstraint("status IN ('running', 'retrying', 'waiting', 'succeeded', 'failed')", name="status"),
        CheckConstraint("(status = 'succeeded') = (output IS NOT NULL)", name="output"),
        CheckConstraint(
            "CASE WHEN error IS NULL THEN status <> 'failed' "
            "ELSE status IN ('running', 'retrying', 'failed') "
            "AND pg_catalog.jsonb_typeof(error -> text 'type') IS NOT DISTINCT FROM 'string' END",
            name="error",
        ),
        CheckConstraint(
            "CASE status WHEN 'retrying' THEN wake_at IS NOT NULL WHEN 'waiting' THEN true ELSE wake_at IS NULL END",
            name="wake",
        ),
        CheckConstraint("position >= 1 AND attempt >= 1 AND tries >= 1", name="counts"),
        times_check("started_at", "finished_at", "wake_at", more="finished_at >= started_at AND "),
    )

    def __repr__(self) -> str:
        return shown(self, "key", "status", "workflow_id")


class Signal(Base):
    """Something sent to a workflow: the oldest one of a name is consumed first, once.

    A row is enough to send one: `INSERT INTO durable.signal (workflow_id, name, payload) VALUES (..., 'approved',
    'true')`. `key` is an idempotency key. `delivered_at` is when a worker has delivered it and woken a workflow that
    awaits it; `consumed_by` the key of the step that has taken it. Names that begin with `#` are the engine's:
    `#update:NAME`. They need `is_answer`, `is_update` or `is_notice`, each of which is a right of its own for a role.
    """

    __tablename__ = "signal"

    workflow_id: Mapped[UUID] = mapped_column(ForeignKey(Workflow.id, ondelete="CASCADE"), primary_key=True)
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    name: Mapped[str]
    key: Mapped[str | None]
    payload: Mapped[Any] = mapped_column(JSONB, server_default=text("'null'::jsonb"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    delivered_at: Mapped[datetime | None]
    consumed_by: Mapped[str | None]
    is_answer: Mapped[bool | None]
    is_update: Mapped[bool | None]
    is_notice: Mapped[bool | None]

    workflow: Mapped[Workflow] = relationship(back_populates="signals")

    __table_args__ = (
        name_check("name", longest=LONGEST_KEY),
        name_check("key"),
        CheckConstraint(f"pg_catalog.octet_length(consumed_by) <= {LONGEST_KEY}", name="consumed_by"),
        times_check("created_at", "delivered_at"),
        # Names of the engine's need a column that not everybody may write.
        CheckConstraint(
            "(is_answer IS NOT NULL) = pg_catalog.starts_with(name, '#callback:') "
            "AND (is_update IS NOT NULL) = pg_catalog.starts_with(name, '#update:') "
            "AND (is_notice IS NOT NULL) = "
            "(pg_catalog.starts_with(name, '#') AND is_answer IS NULL AND is_update IS NULL)",
            name="engine",
        ),
        # The same workflow, name and key are the same signal.
        Index(
            "signal_workflow_id_name_key_key",
            "workflow_id",
            "name",
            "key",
            unique=True,
            postgresql_where=text("key IS NOT NULL"),
        ),
        # Undelivered signals.
        Index("signal_new_idx", "created_at", postgresql_where=text("delivered_at IS NULL")),
        # Untaken signals: the oldest of a name is the first, however many were taken before.
        Index("signal_untaken_idx", "workflow_id", "name", "id", postgresql_where=text("consumed_by IS NULL")),
    )

    def __repr__(self) -> str:
        return shown(self, "name", "id", "workflow_id")


class Event(Base):
    """A value that a workflow publishes under a key: the row with the greatest id is the latest.

    `step_key` is the key of the step that set it. The answer to an update has the key `#reply:ID` and the update's id.
    """

    __tablename__ = "event"

    workflow_id: Mapped[UUID] = mapped_column(ForeignKey(Workflow.id, ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    value: Mapped[Any] = mapped_column(JSONB)
    step_key: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())

    workflow: Mapped[Workflow] = relationship(back_populates="events")

    __table_args__ = (
        name_check("key", longest=LONGEST_KEY),
        CheckConstraint(f"pg_catalog.octet_length(step_key) <= {LONGEST_KEY}", name="step_key"),
        times_check("created_at"),
    )

    def __repr__(self) -> str:
        return shown(self, "key", "id", "workflow_id")


class StreamItem(Base):
    """One item of a workflow's stream: `number` counts from 0; a `closed` one is the last, and has no value.

    `step_key`, `attempt` and `try_number` identify the try that wrote it; items of a try that failed stay.
    """

    __tablename__ = "stream_item"

    workflow_id: Mapped[UUID] = mapped_column(ForeignKey(Workflow.id, ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    value: Mapped[Any | None] = mapped_column(JSONB)
    closed: Mapped[bool] = mapped_column(server_default=false())
    step_key: Mapped[str | None]
    attempt: Mapped[int] = mapped_column(Integer)
    try_number: Mapped[int | None] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())

    __table_args__ = (
        name_check("name", longest=LONGEST_KEY),
        CheckConstraint(f"pg_catalog.octet_length(step_key) <= {LONGEST_KEY}", name="step_key"),
        times_check("created_at"),
        CheckConstraint("number >= 0 AND attempt >= 1 AND try_number >= 1", name="counts"),
        CheckConstraint("closed = (value IS NULL)", name="closed"),
    )


class Worker(Base):
    """One live worker or executor and its lease.

    While `lease_expires_at` lies in the future on the database's clock, its running workflows are its own;
    afterwards any worker reclaims them. A worker that leaves in good order deletes its row. `doing` names the steps
    that it has been executing for longer than a beat at `heartbeat_at`: `{workflow: {step: [try, seconds]}}`; see
    `running_steps`. `names` are the workflows that it knows, and `versions` those of the code that it claims, all if
    there are none; `slots` is how many it executes at once.
    """

    __tablename__ = "worker"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    name: Mapped[str]
    queues: Mapped[list[str]]
    started_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    lease_expires_at: Mapped[datetime]
    doing: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    names: Mapped[list[str] | None]
    versions: Mapped[list[str] | None]
    slots: Mapped[int | None] = mapped_column(Integer)

    workflows: Mapped[list[Workflow]] = relationship(
        primaryjoin=lambda: Worker.id == foreign(Workflow.worker_id), viewonly=True
    )

    __table_args__ = (
        CheckConstraint("pg_catalog.octet_length(name) <= 1000", name="name"),
        CheckConstraint("lease_expires_at > heartbeat_at", name="lease"),
        CheckConstraint("pg_catalog.jsonb_typeof(doing) = 'object'", name="doing"),
        times_check("started_at", "heartbeat_at", "lease_expires_at"),
    )

    def __repr__(self) -> str:
        return shown(self, "name", "id")
