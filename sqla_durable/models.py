"""The database on one page: four declarative models in a schema of their own, `durable`.

An application refers to them by class, `ForeignKey(Workflow.id)` and `relationship(Workflow)`: the string form does
not find a class of another metadata. The CHECK constraints hold the state machine, whoever writes the rows.
What the statements are is in `store`; how the tables come into a database is in `migrations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    CheckConstraint,
    Connection,
    DateTime,
    Enum,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    event,
    func,
    inspect,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.orm import DeclarativeBase, Mapped, foreign, mapped_column, relationship, validates
from sqlalchemy.schema import CreateSchema
from uuid_utils.compat import uuid7

from sqla_durable.status import StepStatus, WorkflowStatus

SCHEMA = "durable"
REVISION = "durable_0001"
"""The migration that these models correspond to; kept as the comment of the workflow table."""

NAMING_CONVENTION = {
    "pk": "%(table_name)s_pkey",
    "fk": "%(table_name)s_%(column_0_name)s_fkey",
    "ck": "%(table_name)s_%(constraint_name)s_check",
}

# Workflows change several times in their short lives, and every claim walks over the index entries of rows that no
# longer qualify until vacuum has removed them. So vacuum comes after a fixed number of changes instead of a share of a
# growing table, and does not pause. Pages keep room for updates beside the row. Checkpoints are inserted,
# and updated only while a step is tried again.
STORAGE: dict[str, dict[str, float]] = {
    "workflow": {
        "fillfactor": 70,
        "autovacuum_vacuum_scale_factor": 0.01,
        "autovacuum_vacuum_threshold": 1000,
        "autovacuum_vacuum_cost_delay": 0,
        "autovacuum_analyze_scale_factor": 0.02,
        "autovacuum_analyze_threshold": 1000,
    },
    "worker": {"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 100},
}
"""The storage parameters of our tables, for which SQLAlchemy 2.0 has no place in a `Table`."""


def _text_of(statuses: type[StrEnum]) -> Enum:
    """Store a status as short text; which texts are legal is a named CHECK constraint, not a PostgreSQL enum."""
    return Enum(statuses, native_enum=False, length=16, values_callable=_values, validate_strings=True)


def _values(statuses: type[StrEnum]) -> list[str]:
    return [each.value for each in statuses]


class Base(DeclarativeBase):
    """The declarative base of this package; its metadata is `sqla_durable.metadata`."""

    metadata = MetaData(schema=SCHEMA, naming_convention=NAMING_CONVENTION)
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy declares it as an instance attribute)
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        str: Text,
        UUID: PG_UUID(as_uuid=True),
        list[str]: ARRAY(Text),
        WorkflowStatus: _text_of(WorkflowStatus),
        StepStatus: _text_of(StepStatus),
    }


class Workflow(Base):
    """One durable workflow: what was asked, where it stands, and how it ended.

    A row is enough to start one: `INSERT INTO durable.workflow (name, input) VALUES ('checkout', '{"order_id": 1}')`.
    Arguments are stored by parameter name. `token` identifies the attempt that may write while the workflow is running,
    and that finished it. `priority` is served lowest first. A suspended workflow with `wake_at` waits for that time.
    `attempt` counts up when a worker dies; `crashes` counts its last attempts in a row whose worker died before they
    had recorded a step.
    """

    __tablename__ = "workflow"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7, server_default=func.gen_random_uuid())
    name: Mapped[str]
    key: Mapped[str | None]
    queue: Mapped[str] = mapped_column(server_default="default")
    priority: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    status: Mapped[WorkflowStatus] = mapped_column(server_default=WorkflowStatus.PENDING.value)
    input: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    output: Mapped[Any | None] = mapped_column(JSONB)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    attempt: Mapped[int] = mapped_column(Integer, server_default="1")
    crashes: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    token: Mapped[UUID | None]
    worker_id: Mapped[UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.statement_timestamp())
    enqueued_at: Mapped[datetime] = mapped_column(server_default=func.statement_timestamp())
    wake_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    steps: Mapped[list[Step]] = relationship(
        back_populates="workflow", order_by="Step.position", passive_deletes="all", viewonly=False
    )
    # No foreign key: a claim would lock the worker's row once for each workflow, and a heartbeat updates that row.
    worker: Mapped[Worker | None] = relationship(
        primaryjoin=lambda: foreign(Workflow.worker_id) == Worker.id, viewonly=True
    )

    __table_args__ = (
        CheckConstraint("name ~ '[^[:space:]]'", name="name"),
        CheckConstraint("key ~ '[^[:space:]]'", name="key"),
        CheckConstraint("queue ~ '[^[:space:]]'", name="queue"),
        CheckConstraint(
            "status IN ('pending', 'running', 'suspended', 'succeeded', 'failed', 'cancelled')", name="status"
        ),
        CheckConstraint("jsonb_typeof(input) = 'object'", name="input"),
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
            "AND jsonb_typeof(error -> 'type') IS NOT DISTINCT FROM 'string' END",
            name="error",
        ),
        CheckConstraint("wake_at IS NULL OR status = 'suspended'", name="wake"),
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
        # Timers and delayed starts that are due.
        Index(
            "workflow_wake_idx",
            "wake_at",
            postgresql_where=text("status = 'suspended' AND wake_at IS NOT NULL"),
        ),
        {"comment": f"sqla-durable {REVISION}"},
    )

    @validates("key", "queue", "name")
    def _refuse_blank(self, attribute: str, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError(f"a workflow's {attribute} must not be blank, got {value!r}")
        return value

    def __repr__(self) -> str:
        return _shown(self, "name", "status", "id")


class Step(Base):
    """The checkpoint of one step: its outcome, recorded once and returned on every replay.

    `key` is the step's identity in its workflow: name and occurrence (`charge`, `charge#2`), or an explicit key.
    `attempt` is the workflow's attempt that recorded it, `attempts` how many tries it took, those of earlier attempts
    included, `position` the order in which the workflow called it. While a step is `retrying`, `error` is that of its
    last try and `wake_at` the time of the next one; the row becomes the outcome's when there is one.
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
    attempts: Mapped[int] = mapped_column(Integer, server_default="1")
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime] = mapped_column(server_default=func.statement_timestamp())
    wake_at: Mapped[datetime | None]

    workflow: Mapped[Workflow] = relationship(back_populates="steps")

    __table_args__ = (
        CheckConstraint("key ~ '[^[:space:]]'", name="key"),
        CheckConstraint("name ~ '[^[:space:]]'", name="name"),
        CheckConstraint("status IN ('retrying', 'succeeded', 'failed')", name="status"),
        CheckConstraint("(status = 'succeeded') = (output IS NOT NULL)", name="output"),
        CheckConstraint(
            "CASE WHEN error IS NULL THEN status <> 'failed' "
            "ELSE status IN ('retrying', 'failed') AND jsonb_typeof(error -> 'type') IS NOT DISTINCT FROM 'string' END",
            name="error",
        ),
        CheckConstraint("(status = 'retrying') = (wake_at IS NOT NULL)", name="wake"),
        CheckConstraint("position >= 1 AND attempt >= 1 AND attempts >= 1", name="counts"),
        CheckConstraint("finished_at >= started_at", name="times"),
    )

    def __repr__(self) -> str:
        return _shown(self, "key", "status", "workflow_id")


class Queue(Base):
    """Settings of one queue. A queue without a row exists as soon as a workflow is enqueued to it."""

    __tablename__ = "queue"

    name: Mapped[str] = mapped_column(primary_key=True)
    paused_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.statement_timestamp())

    __table_args__ = (CheckConstraint("name ~ '[^[:space:]]'", name="name"),)

    def __repr__(self) -> str:
        return _shown(self, "name", "paused_at")


class Worker(Base):
    """One live worker or executor and its lease.

    While `lease_expires_at` lies in the future on the database's clock, its running workflows are its own;
    afterwards any worker reclaims them. A worker that leaves in good order deletes its row.
    """

    __tablename__ = "worker"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    name: Mapped[str]
    queues: Mapped[list[str]]
    started_at: Mapped[datetime] = mapped_column(server_default=func.statement_timestamp())
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.statement_timestamp())
    lease_expires_at: Mapped[datetime]

    workflows: Mapped[list[Workflow]] = relationship(
        primaryjoin=lambda: Worker.id == foreign(Workflow.worker_id), viewonly=True
    )

    __table_args__ = (CheckConstraint("lease_expires_at > heartbeat_at", name="lease"),)

    def __repr__(self) -> str:
        return _shown(self, "name", "id")


def _shown(record: Base, *attributes: str) -> str:
    """Show what is loaded, and the primary key of what has expired: a repr must not go to the database."""
    state = inspect(record)
    values = {name: state.dict[name] for name in attributes if state.dict.get(name) is not None}
    loaded = [repr(value) if name in ("name", "key") else str(value) for name, value in values.items()]
    known = loaded or [str(each) for each in state.identity or ()]
    return f"<{type(record).__name__} {' '.join(known)}>"


metadata = Base.metadata
"""The metadata of the models, for `target_metadata = [Base.metadata, sqla_durable.metadata]` in Alembic."""


def storage_statements(schema: str = SCHEMA) -> list[str]:
    """Give the statements that set the storage parameters, for a migration that autogenerate wrote."""
    quoted = '"' + schema.replace('"', '""') + '"'
    return [
        f"ALTER TABLE {quoted}.{table} SET ({', '.join(f'{name} = {value}' for name, value in settings.items())})"
        for table, settings in STORAGE.items()
    ]


@event.listens_for(metadata, "before_create")
def _create_schema(_target: MetaData, connection: Connection, **_: object) -> None:
    """Let `metadata.create_all` work in an empty database, under the translated name of the schema."""
    name = _translated(connection)
    # Asked first: IF NOT EXISTS needs the right to create schemas even where there is nothing to create.
    if not inspect(connection).has_schema(name):
        connection.execute(CreateSchema(name, if_not_exists=True))


@event.listens_for(metadata, "after_create")
def _set_storage(_target: MetaData, connection: Connection, *, tables: Sequence[Table], **_: object) -> None:
    if Workflow.__table__ in tables:
        for statement in storage_statements(_translated(connection)):
            connection.exec_driver_sql(statement)


def _translated(connection: Connection) -> str:
    names: dict[str, str] = connection.get_execution_options().get("schema_translate_map") or {}
    return names.get(SCHEMA) or SCHEMA
