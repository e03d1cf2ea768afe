"""The queries of the commands that list: workflows by page, and the views for queues and workers.

What `show` reads is in `details`, and what `tail` and `top` read in `recent`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Boolean, Column, DateTime, Integer, MetaData, Select, Table, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.orm import Session

from sqla_durable import Queue, Schedule, Workflow
from sqla_durable.models import SCHEMA, QueueKey
from sqla_durable.models.base import Text
from sqla_durable.tools.cli.filters import Filters

Row = Mapping[str, Any]

MOST_CHARACTERS = 1_000
"""How much of the message of an error is read."""

_MOST_KEYS = 20
_MOMENT = DateTime(timezone=True)
_VIEWS = MetaData(schema=SCHEMA)

QUEUE_DEPTH = Table(
    "queue_depth",
    _VIEWS,
    Column("queue", Text),
    Column("pending", BigInteger),
    Column("pending_since", _MOMENT),
    Column("running", BigInteger),
    Column("delayed", BigInteger),
    Column("suspended", BigInteger),
)
WORKER_LOAD = Table(
    "worker_load",
    _VIEWS,
    Column("id", PG_UUID(as_uuid=True)),
    Column("name", Text),
    Column("queues", ARRAY(Text)),
    Column("versions", ARRAY(Text)),
    Column("slots", Integer),
    Column("started_at", _MOMENT),
    Column("heartbeat_at", _MOMENT),
    Column("lease_expires_at", _MOMENT),
    Column("is_alive", Boolean),
    Column("executing", BigInteger),
    Column("oldest_started_at", _MOMENT),
)
NOW = func.pg_catalog.statement_timestamp()
SHORT_MESSAGE = func.pg_catalog.left(Workflow.error["message"].astext, MOST_CHARACTERS)


def page(filters: Filters, *, limit: int, after: UUID | None) -> Select[Any]:
    """Return the query for a page of workflows, the newest first, with one row more where there is another page.

    Raises:
        CommandError: a filter cannot be read.
    """
    ended = func.coalesce(Workflow.finished_at, NOW)
    query: Any = filters.select().with_only_columns(
        Workflow.id,
        Workflow.name,
        Workflow.status,
        Workflow.queue,
        Workflow.key,
        Workflow.by,
        Workflow.tags,
        Workflow.schedule,
        Workflow.parent_id,
        Workflow.version,
        Workflow.priority,
        Workflow.attempt,
        Workflow.created_at,
        Workflow.started_at,
        Workflow.finished_at,
        Workflow.wake_at,
        (ended - Workflow.started_at).label("took"),
        (func.coalesce(Workflow.started_at, ended) - Workflow.created_at).label("waited"),
        Workflow.error["type"].astext.label("error_type"),
        SHORT_MESSAGE.label("error_message"),
    )
    found: Select[Any] = (query if after is None else query.where(Workflow.id < after)).limit(limit + 1)
    return found


def queue_rows(session: Session) -> list[Row]:
    """Return what waits and runs in each queue, with its settings and the keys that are paused."""
    settings = [
        each for each in Queue.__table__.columns if each.key not in ("name", "claim", "turn", "passed", "turn_priority")
    ]
    wanted = select(*QUEUE_DEPTH.c, *settings, NOW.label("read_at")).outerjoin_from(
        QUEUE_DEPTH, Queue, Queue.name == QUEUE_DEPTH.c.queue
    )
    keys: dict[str, list[str]] = {}
    paused = select(QueueKey.queue, QueueKey.by).where(QueueKey.paused_at.is_not(None)).order_by(QueueKey.by)
    for queue, by in session.execute(paused.limit(_MOST_KEYS)):
        keys.setdefault(queue, []).append(by)
    found = session.execute(wanted.order_by(QUEUE_DEPTH.c.queue)).mappings()
    return [{**each, "paused_keys": keys.get(each["queue"], [])} for each in found]


def worker_rows(session: Session) -> list[Row]:
    """Return the workers, those that live first, with how many workflows each executes."""
    ordered = select(WORKER_LOAD, NOW.label("read_at")).order_by(
        WORKER_LOAD.c.is_alive.desc(), WORKER_LOAD.c.name, WORKER_LOAD.c.id
    )
    return [dict(each) for each in session.execute(ordered).mappings()]


def schedules(session: Session) -> list[Schedule]:
    """Return the schedules by name."""
    return list(session.scalars(select(Schedule).order_by(Schedule.name)))
