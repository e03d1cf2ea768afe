"""The tables of queues: their limits, settings of single keys, and what was started of late where a rate counts it."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, Integer, SmallInteger, false, func, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from sqla_durable.models.base import SCHEMA, Base, name_check, shown, times_check

_LONGEST = "interval '366 days'"


class Queue(Base):
    """The settings of one queue; one without a row has none, and exists as soon as a workflow is enqueued to it.

    A row is enough: `INSERT INTO durable.queue (name, concurrency) VALUES ('mail', 10)`. Running workers obey a change
    from their next poll on. `concurrency` is how many of its workflows run at once over all workers, `per_worker` in
    one, `per_key` with the same `by`. Of `rate`, so many start in any `rate_period`; of `key_rate`, with the same
    `by`. With `while_suspended` "hold", what has started keeps its place until it is finished. With `fifo`, of each
    `by` one at a time is executed, in order, and one that fails is to "skip" or to "block" those behind it. With
    `fair`, the values of `by` take turns. For each `aging` that it waits, a workflow counts as one priority higher.
    """

    __tablename__ = "queue"

    name: Mapped[str] = mapped_column(primary_key=True)
    paused_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    concurrency: Mapped[int | None] = mapped_column(Integer)
    per_worker: Mapped[int | None] = mapped_column(Integer)
    per_key: Mapped[int | None] = mapped_column(Integer)
    rate: Mapped[int | None] = mapped_column(Integer)
    rate_period: Mapped[timedelta | None]
    key_rate: Mapped[int | None] = mapped_column(Integer)
    key_rate_period: Mapped[timedelta | None]
    while_suspended: Mapped[str] = mapped_column(server_default="release")
    fifo: Mapped[str | None]
    fair: Mapped[bool] = mapped_column(server_default=false())
    aging: Mapped[timedelta | None]
    claim: Mapped[UUID | None]
    turn: Mapped[str | None]
    passed: Mapped[str | None]
    turn_priority: Mapped[int | None] = mapped_column(SmallInteger)

    keys: Mapped[list[QueueKey]] = relationship(
        back_populates="settings", order_by="QueueKey.by", passive_deletes="all"
    )

    __table_args__ = (
        name_check("name"),
        CheckConstraint(
            "least(concurrency, per_worker, per_key) >= 1 AND greatest(concurrency, per_worker, per_key) <= 1000000",
            name="limits",
        ),
        CheckConstraint(
            "least(rate, key_rate) >= 1 AND greatest(rate, key_rate) <= 100000",
            name="rates",
        ),
        CheckConstraint(
            "(rate IS NULL) = (rate_period IS NULL) AND (key_rate IS NULL) = (key_rate_period IS NULL)",
            name="rate_periods",
        ),
        CheckConstraint(
            "least(rate_period, key_rate_period, aging) >= interval '1 millisecond' "
            f"AND greatest(rate_period, key_rate_period, aging) <= {_LONGEST}",
            name="periods",
        ),
        CheckConstraint(
            "while_suspended = 'release' OR (while_suspended = 'hold' AND fifo IS NULL "
            "AND pg_catalog.num_nonnulls(concurrency, per_key) > 0)",
            name="while_suspended",
        ),
        CheckConstraint("fifo IS NULL OR (fifo IN ('skip', 'block') AND coalesce(per_key, 1) = 1)", name="fifo"),
        times_check("created_at", "paused_at"),
    )

    def __repr__(self) -> str:
        return shown(self, "name", "paused_at")


class QueueKey(Base):
    """Settings of one key of a queue, the `by` of its workflows: its weight where keys take turns, or a pause."""

    __tablename__ = "queue_key"

    queue: Mapped[str] = mapped_column(ForeignKey(f"{SCHEMA}.queue.name", ondelete="CASCADE"), primary_key=True)
    by: Mapped[str] = mapped_column(primary_key=True)
    weight: Mapped[int] = mapped_column(Integer, server_default="1")
    paused_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())

    settings: Mapped[Queue] = relationship(back_populates="keys")

    __table_args__ = (
        name_check("by"),
        CheckConstraint("weight BETWEEN 1 AND 1000", name="weight"),
        times_check("created_at", "paused_at"),
        # Whether any is paused.
        Index("queue_key_paused_idx", "queue", postgresql_where=text("paused_at IS NOT NULL")),
    )

    def __repr__(self) -> str:
        return shown(self, "queue", "by", "weight", "paused_at")


class QueueUse(Base):
    """How many workflows one claim has started, for a queue with a rate.

    One row for each key, where a rate is per key; else, and for those without a key, one whose `by` is empty. A claim
    deletes what is older than the periods of its queue.
    """

    __tablename__ = "queue_use"

    queue: Mapped[str] = mapped_column(ForeignKey(f"{SCHEMA}.queue.name", ondelete="CASCADE"), primary_key=True)
    used_at: Mapped[datetime] = mapped_column(primary_key=True)
    by: Mapped[str] = mapped_column(primary_key=True)
    claim: Mapped[UUID] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(Integer)

    __table_args__ = (
        CheckConstraint("number >= 1", name="number"),
        # What was used of a key in its period; the primary key finds that of the queue, and what is older.
        Index("queue_use_by_idx", "queue", "by", "used_at"),
    )

    def __repr__(self) -> str:
        return shown(self, "queue", "by", "used_at", "number")
