"""The models of what a workflow records, receives and publishes: steps, signals, events and items of streams."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Identity, Index, Integer, false, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column, relationship

from sqla_durable.models.base import LONGEST_KEY, Base, name_check, shown, times_check
from sqla_durable.models.status import StepStatus
from sqla_durable.models.workflow import Workflow


class Step(Base):
    """The checkpoint of one step: its outcome, recorded once and returned on every replay.

    `key` is the step's identity in its workflow: name and occurrence (`charge`, `charge#2`), or an explicit key.
    `attempt` is the workflow's attempt that recorded it, `attempts` how many tries it took, those of earlier attempts
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
    attempts: Mapped[int] = mapped_column(Integer, server_default="1")
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
        CheckConstraint("position >= 1 AND attempt >= 1 AND attempts >= 1", name="counts"),
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

    `step_key`, `attempt` and `step_attempt` identify the try that wrote it; items of a try that failed stay.
    """

    __tablename__ = "stream_item"

    workflow_id: Mapped[UUID] = mapped_column(ForeignKey(Workflow.id, ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    value: Mapped[Any | None] = mapped_column(JSONB)
    closed: Mapped[bool] = mapped_column(server_default=false())
    step_key: Mapped[str | None]
    attempt: Mapped[int] = mapped_column(Integer)
    step_attempt: Mapped[int | None] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())

    __table_args__ = (
        name_check("name", longest=LONGEST_KEY),
        CheckConstraint(f"pg_catalog.octet_length(step_key) <= {LONGEST_KEY}", name="step_key"),
        times_check("created_at"),
        CheckConstraint("number >= 0 AND attempt >= 1 AND step_attempt >= 1", name="counts"),
        CheckConstraint("closed = (value IS NULL)", name="closed"),
    )
