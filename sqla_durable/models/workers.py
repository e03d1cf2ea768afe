"""The models of queues and of workers: settings, and leases."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, foreign, mapped_column, relationship
from uuid_utils.compat import uuid7

from sqla_durable.models.base import Base, name_check, shown, times_check
from sqla_durable.models.workflow import Workflow


class Queue(Base):
    """Settings of one queue. A queue without a row exists as soon as a workflow is enqueued to it."""

    __tablename__ = "queue"

    name: Mapped[str] = mapped_column(primary_key=True)
    paused_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())

    __table_args__ = (name_check("name"), times_check("created_at", "paused_at"))

    def __repr__(self) -> str:
        return shown(self, "name", "paused_at")


class Worker(Base):
    """One live worker or executor and its lease.

    While `lease_expires_at` lies in the future on the database's clock, its running workflows are its own;
    afterwards any worker reclaims them. A worker that leaves in good order deletes its row. `doing` names the steps
    that it has been executing for longer than a beat at `heartbeat_at`: `{workflow: {step: [try, seconds]}}`; see
    `running_steps`.
    """

    __tablename__ = "worker"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    name: Mapped[str]
    queues: Mapped[list[str]]
    started_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    lease_expires_at: Mapped[datetime]
    doing: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))

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
