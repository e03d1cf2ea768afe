"""Workflows that were finished long ago, and what is left of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from sqla_durable import Workflow, WorkflowStatus, manage
from sqla_durable.models import Retention
from tests.support.forged import forged

DAY = timedelta(days=1)
REFERRING = "CREATE TABLE invoice (id uuid PRIMARY KEY REFERENCES durable.workflow (id) {})"
"""A table of the application whose rows hold workflows."""


def ended(
    session: Session, *, days: float = 10, name: str = "checkout", status: str = "succeeded", **more: Any
) -> UUID:
    """Insert a workflow that was started and finished so many days ago; return its id."""
    then = datetime.now(UTC) - days * DAY
    started = UUID(int=manage.id_at(then).int | uuid4().int & (1 << 62) - 1)
    columns: dict[str, Any] = {"id": started, "name": name, "status": WorkflowStatus(status), "finished_at": then}
    columns |= {"output": 1} if status == "succeeded" else {}
    columns |= {"error": {"type": "builtins:ValueError", "message": "no"}} if status == "failed" else {}
    record = Workflow(**columns | more)
    with forged(session):
        session.add(record)
    session.commit()
    return record.id


def left(engine: Engine) -> set[UUID]:
    """Return the committed ids of all workflows."""
    with Session(engine) as session:
        return set(session.scalars(select(Workflow.id)))


def row_of(engine: Engine, name: str) -> Retention:
    """Return the committed row of a policy."""
    with Session(engine) as session:
        return session.get_one(Retention, name)


def hold(session: Session, *ids: UUID, how: str = "") -> None:
    """Let rows of the application refer to workflows by a foreign key that keeps them there."""
    session.execute(text(REFERRING.format(how).replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS")))
    for each in ids:
        session.execute(text("INSERT INTO invoice VALUES (:id)"), {"id": each})
    session.commit()
