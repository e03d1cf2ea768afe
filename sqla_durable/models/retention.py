"""The table of retention: which finished workflows are deleted, how long after their end, and how far that is."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, false, func
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from sqla_durable.models.base import Base, Text, name_check, shown, times_check


class Retention(Base):
    """A policy: what is finished for longer than `keep` is deleted by the workers, with its tree and its history.

    A row is enough to make one: `INSERT INTO durable.retention (name, keep) VALUES ('all', '90 days')`. `workflow` is a
    name, or a pattern in which `*` stands for any text, and NULL for all of them; without `statuses` every finished one
    is meant. Of several that fit a workflow the most specific decides. `due_at` is when a worker looks at it next;
    whoever changes the row by SQL sets it to NULL, so that one does at once. Workers walk over the workflows in the
    order of their ids: `position` is the last one that they have seen, NULL between two walks. `deleted` counts the
    workflows that are gone, children too, and `refused` those that the last walk had to leave, because the database
    refused. `declared` is set for one that the application's code declares.
    """

    __tablename__ = "retention"

    name: Mapped[str] = mapped_column(primary_key=True)
    workflow: Mapped[str | None]
    statuses: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    keep: Mapped[timedelta]
    declared: Mapped[bool] = mapped_column(server_default=false())
    created_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    due_at: Mapped[datetime | None]
    last_at: Mapped[datetime | None]
    position: Mapped[UUID | None]
    deleted: Mapped[int] = mapped_column(BigInteger, server_default="0")
    refused: Mapped[int] = mapped_column(BigInteger, server_default="0")

    __table_args__ = (
        name_check("name"),
        name_check("workflow"),
        CheckConstraint(
            "pg_catalog.cardinality(statuses) > 0 AND pg_catalog.array_position(statuses, NULL) IS NULL "
            "AND pg_catalog.cardinality(pg_catalog.array_remove(pg_catalog.array_remove(pg_catalog.array_remove("
            "statuses, text 'succeeded'), text 'failed'), text 'cancelled')) = 0",
            name="statuses",
        ),
        # Each part of it: together they may be short, and add up to a time that is out of range on the way.
        CheckConstraint(
            "keep BETWEEN interval '1 second' AND interval '36500 days' "
            "AND extract(year FROM keep) BETWEEN 0.0 AND 100.0 AND extract(day FROM keep) BETWEEN 0.0 AND 36500.0",
            name="keep",
        ),
        CheckConstraint("deleted >= 0 AND refused >= 0", name="counts"),
        times_check("created_at", "due_at", "last_at"),
    )

    def __repr__(self) -> str:
        return shown(self, "name", "workflow", "keep", "due_at")
