"""What a dashboard watches: how much waits in each queue and since when, and what the workers alive execute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models import SCHEMA
from sqla_durable.store.statements import Connectable, Expression, Statement, execute, pg


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How many workflows a queue holds; `oldest_pending_age` is in seconds, and 0 where nothing is pending."""

    queue: str
    pending: int
    running: int
    delayed: int
    suspended: int
    oldest_pending_age: float


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """The workers whose leases are live: how many they are, what they execute, and how many slots they have."""

    alive: int
    executing: int
    slots: int


def queue_depths(connectable: Connectable) -> Sequence[QueueDepth]:
    """Read what each queue holds, in the order of their names. Takes no lock; reads all that is unfinished."""
    return [QueueDepth(**row) for row in execute(connectable, _QUEUE_DEPTHS).mappings()]


def worker_load(connectable: Connectable) -> WorkerLoad:
    """Read what the workers alive execute. Takes no lock."""
    return WorkerLoad(**execute(connectable, _WORKER_LOAD).mappings().one())


def _seconds_since(moment: Expression) -> Expression:
    seconds = sa.extract("epoch", pg.statement_timestamp() - moment)
    return sa.cast(
        sa.func.greatest(sa.func.coalesce(seconds, sa.literal_column("0")), sa.literal_column("0")), sa.Float
    )


def _queue_depths_statement() -> Any:
    names = [each.name for each in fields(QueueDepth)][:-1]
    columns = [sa.column(each, sa.Text()) for each in names]
    view = sa.table("queue_depth", *columns, sa.column("pending_since"), schema=SCHEMA)
    age = _seconds_since(view.c.pending_since).label("oldest_pending_age")
    return sa.select(*(view.c[each] for each in names), age).order_by(view.c.queue)


def _worker_load_statement() -> Any:
    columns = [sa.column(each, sa.Boolean()) for each in ("executing", "slots", "is_alive")]
    view = sa.table("worker_load", *columns, schema=SCHEMA)

    def total(name: str) -> Expression:
        return sa.cast(sa.func.coalesce(pg.sum(view.c[name]), sa.literal_column("0")), sa.BigInteger).label(name)

    alive = pg.count(view.c.is_alive).label("alive")
    return sa.select(alive, total("executing"), total("slots")).where(view.c.is_alive)


_QUEUE_DEPTHS = Statement(_queue_depths_statement)
_WORKER_LOAD = Statement(_worker_load_statement)
