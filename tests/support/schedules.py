"""Schedules in tests: made as plain rows, and brought to their times by SQL instead of by waiting."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from sqla_durable.models import Schedule, Workflow

HOUR = timedelta(hours=1)
AGO = timedelta(seconds=1)


def insert(engine: Engine, name: str = "ticking", **columns: Any) -> str:
    """Insert a schedule of the workflow `checkout` that ticks every hour; return its name."""
    when = {} if "cron" in columns else {"every": HOUR}
    with Session(engine) as session, session.begin():
        session.add(Schedule(name=name, **{"workflow": "checkout", **when, **columns}))
    return name


def insert_due(engine: Engine, name: str = "ticking", *, ago: timedelta = AGO, **columns: Any) -> str:
    """Insert one whose next tick was a moment ago."""
    insert(engine, name, **columns)
    make_due(engine, name, ago=ago)
    return name


def make_due(engine: Engine, name: str = "ticking", *, ago: timedelta = AGO, **columns: Any) -> None:
    """Move a schedule's next tick to a moment ago, on the clock of the database."""
    then = func.statement_timestamp() - ago
    values = {"next_at": then, "due_at": then, **columns}
    with Session(engine) as session, session.begin():
        session.execute(update(Schedule).where(Schedule.name == name).values(values))


def row_of(engine: Engine, name: str = "ticking") -> Schedule:
    """Return the committed row of a schedule."""
    with Session(engine) as session:
        return session.get_one(Schedule, name)


def started_by(engine: Engine, name: str = "ticking") -> list[Workflow]:
    """Return the committed workflows that a schedule has started, in the order of its ticks."""
    with Session(engine) as session:
        return list(session.scalars(select(Workflow).where(Workflow.schedule == name).order_by(Workflow.key)))
