"""What the verbs are given: a session of either kind, and workflows by record, by id, or by a `select()`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy import CompoundSelect, Select
from sqlalchemy.orm import Session

import sqla_durable.callers as callers
from sqla_durable.errors import SessionError
from sqla_durable.models import Workflow
from sqla_durable.store.selection import Wanted, evaluate

Selected: TypeAlias = "Workflow | UUID | Iterable[Workflow | UUID] | Select[Any] | CompoundSelect[Any]"
"""Which workflows: one record or id, several, or a `select()` or union of `Workflow` or of one column of ids."""

T = TypeVar("T")


def perform(
    session: callers.AnySession, workflows: Selected, verb: Callable[[Session, Wanted], T]
) -> T | Coroutine[Any, Any, T]:
    """Call a verb with the blocking session and what is meant.

    Raises:
        ArgumentError: something else is given than workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables.
    """
    return callers.perform(session, partial(_perform, workflows=workflows, verb=verb))


def _perform(session: Session, *, workflows: Selected, verb: Callable[[Session, Wanted], T]) -> T:
    _require_transaction(session)
    session.flush()  # a record that was only just started is not in the table yet
    return verb(session, _wanted(session, workflows))


def _require_transaction(session: Session) -> None:
    connection = session.connection(bind_arguments={"mapper": Workflow})
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise SessionError(
            f"{session!r} is bound to an engine in AUTOCOMMIT, which commits each statement by itself: what was locked "
            "would be free again before it is changed. Give it an engine with transactions."
        )


def _wanted(session: Session, workflows: Selected) -> Wanted:
    if isinstance(workflows, (Select, CompoundSelect)):
        return evaluate(session, workflows)
    return Wanted(callers.ids_of(workflows))
