"""Rows in states that no INSERT may make: the trigger of the table refuses them, and a test begins with one."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

_REFUSED = frozenset({"token", "finished_at"})
NO_CHECK = "ALTER TABLE durable.workflow DISABLE TRIGGER workflow_new_check"
"""What the owner says where foreign keys are to be checked all the same."""


@contextmanager
def forged(executing: Session | Connection, columns: Collection[str] = _REFUSED) -> Generator[None]:
    """Insert workflows with these columns, in any state; what a session has is flushed at the end.

    As a superuser, who executes no triggers and checks no foreign keys meanwhile, where that is needed at all.
    """
    if _REFUSED.isdisjoint(columns):
        yield
        return
    executing.execute(text("SET LOCAL session_replication_role = replica"))
    yield
    if isinstance(executing, Session):
        executing.flush()
    executing.execute(text("SET LOCAL session_replication_role = origin"))
