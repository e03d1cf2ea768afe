"""Bringing workflows to their ends by a worker in the process of the test."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow
from tests.store import races

POLL = timedelta(milliseconds=20)


def finished(engine: Engine, workflow_id: UUID) -> Workflow:
    """Wait for a workflow's outcome and return its record."""

    def record() -> Workflow | None:
        with Session(engine) as session:
            found = session.get_one(Workflow, workflow_id)
            _ = found.steps
            return found if found.status.finished else None

    found = races.wait_until(record, what="the workflow's end")
    assert found is not None
    return found


def run(
    session_factory: sessionmaker[Session], engine: Engine, durable: Durable, name: str, **options: Any
) -> Workflow:
    """Start a workflow without arguments, bring it to its end by a worker, and return its record."""
    with session_factory() as session:
        (workflow_id,) = races.enqueue(session, name=name)
    settings: dict[str, Any] = {"sessionmaker": session_factory, "poll_interval": POLL, **options}
    with Worker(durable, **settings):
        return finished(engine, workflow_id)
