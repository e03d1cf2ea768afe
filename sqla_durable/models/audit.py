"""The table of what operators have done: the log of the command line's verbs."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Identity, Index, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, foreign, mapped_column, relationship

from sqla_durable.models.base import Base, name_check, shown
from sqla_durable.models.tables import Workflow


class Audit(Base):
    """What an operator has done: one row for each workflow, queue or schedule, written in the same transaction.

    `who` is the name that the operator gave or has on the machine, and `verb` the command. `workflow_id` is no foreign
    key: the row outlives a workflow that was deleted. `subject` is the name of the workflow, queue or schedule,
    `reason` what the operator said, and `details` what else the command was given.
    """

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    who: Mapped[str]
    verb: Mapped[str]
    workflow_id: Mapped[UUID | None]
    subject: Mapped[str | None]
    reason: Mapped[str | None]
    details: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))

    workflow: Mapped[Workflow | None] = relationship(
        primaryjoin=lambda: foreign(Audit.workflow_id) == Workflow.id, viewonly=True
    )

    __table_args__ = (
        name_check("who"),
        name_check("verb"),
        # What was done to a workflow.
        Index("audit_workflow_id_idx", "workflow_id", postgresql_where=text("workflow_id IS NOT NULL")),
    )

    def __repr__(self) -> str:
        return shown(self, "verb", "subject", "workflow_id", "who")
