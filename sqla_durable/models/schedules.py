"""The table of schedules: what each one starts and when, and how far it is."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Index, SmallInteger, false, func, text
from sqlalchemy.orm import Mapped, foreign, mapped_column, relationship

from sqla_durable.models.base import OPTIONAL_JSON, Base, headers_check, name_check, shown, tags_check, times_check
from sqla_durable.models.tables import Workflow

_NO_TEXTS = text("'{}'::text[]")
_LONGEST = "interval '36500 days'"


class Schedule(Base):
    """Starts a workflow again and again: by `cron` expressions in the time zone `tz`, or `every` so often.

    A row is enough to make one: `INSERT INTO durable.schedule (name, workflow, cron) VALUES ('nightly', 'report',
    '{0 3 * * *}')`. `next_at` is its next tick, `last_at` the last one that started a workflow, and `queued_at` one
    that waits for the workflow of an earlier one to end. `due_at` is when a worker looks at it next, `jitter`
    included; whoever changes the row by SQL sets it and `next_at` to NULL, so that a worker plans again. It has
    `ended_at` when no tick is left. `skipped` counts ticks that started nothing; those that were
    missed together count as one. `declared` is set for one that the application's code declares.
    """

    __tablename__ = "schedule"

    name: Mapped[str] = mapped_column(primary_key=True)
    workflow: Mapped[str]
    input: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    queue: Mapped[str] = mapped_column(server_default="default")
    priority: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    by: Mapped[str | None]
    timeout: Mapped[timedelta | None]
    version: Mapped[str | None]
    tags: Mapped[dict[str, str] | None] = mapped_column(OPTIONAL_JSON)
    headers: Mapped[dict[str, str] | None] = mapped_column(OPTIONAL_JSON)
    cron: Mapped[list[str]] = mapped_column(server_default=_NO_TEXTS)
    every: Mapped[timedelta | None]
    tz: Mapped[str] = mapped_column(server_default="UTC")
    excluding: Mapped[list[str]] = mapped_column(server_default=_NO_TEXTS)
    starts_at: Mapped[datetime | None]
    ends_at: Mapped[datetime | None]
    jitter: Mapped[timedelta | None]
    overlap: Mapped[str] = mapped_column(server_default="skip")
    missed: Mapped[str] = mapped_column(server_default="run_one")
    missed_within: Mapped[timedelta | None]
    declared: Mapped[bool] = mapped_column(server_default=false())
    paused_at: Mapped[datetime | None]
    pause_reason: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    next_at: Mapped[datetime | None]
    due_at: Mapped[datetime | None]
    last_at: Mapped[datetime | None]
    queued_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    skipped: Mapped[int] = mapped_column(BigInteger, server_default="0")

    workflows: Mapped[list[Workflow]] = relationship(
        primaryjoin=lambda: Schedule.name == foreign(Workflow.schedule), order_by=lambda: Workflow.id, viewonly=True
    )

    __table_args__ = (
        name_check("name"),
        name_check("workflow"),
        name_check("queue"),
        name_check("by"),
        name_check("version"),
        name_check("tz"),
        CheckConstraint("pg_catalog.jsonb_typeof(input) = 'object'", name="input"),
        tags_check(),
        headers_check(),
        CheckConstraint("(pg_catalog.cardinality(cron) > 0) = (every IS NULL)", name="when"),
        CheckConstraint(
            "pg_catalog.cardinality(cron) <= 100 AND pg_catalog.array_position(cron, NULL) IS NULL "
            "AND pg_catalog.cardinality(excluding) <= 10000 AND pg_catalog.array_position(excluding, NULL) IS NULL",
            name="lists",
        ),
        CheckConstraint(f"every BETWEEN interval '1 second' AND {_LONGEST}", name="every"),
        CheckConstraint(f"timeout BETWEEN interval '0' AND {_LONGEST}", name="timeout"),
        CheckConstraint(f"jitter BETWEEN interval '0' AND {_LONGEST}", name="jitter"),
        CheckConstraint(f"missed_within BETWEEN interval '0' AND {_LONGEST}", name="missed_within"),
        CheckConstraint("overlap IN ('skip', 'queue_one', 'allow', 'cancel_running')", name="overlap"),
        CheckConstraint("missed IN ('skip', 'run_one', 'run_all')", name="missed"),
        CheckConstraint("starts_at <= ends_at", name="span"),
        CheckConstraint("skipped >= 0", name="skipped"),
        times_check(
            "created_at",
            "starts_at",
            "ends_at",
            "paused_at",
            "next_at",
            "due_at",
            "last_at",
            "queued_at",
            "ended_at",
        ),
        # What a worker is to look at.
        Index("schedule_due_idx", "due_at", postgresql_where=text("paused_at IS NULL AND ended_at IS NULL")),
    )

    def __repr__(self) -> str:
        return shown(self, "name", "workflow", "next_at", "paused_at")
