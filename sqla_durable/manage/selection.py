"""Which workflows are meant: by record, by id, or by a `select()`; and `id_at`, for selects by time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy import CompoundSelect, Select
from sqlalchemy.orm import Session

import sqla_durable.api.callers as callers
from sqla_durable.errors import ArgumentError
from sqla_durable.models import Workflow
from sqla_durable.store.selection import Selection, evaluate

Selected: TypeAlias = "Workflow | UUID | Iterable[Workflow | UUID] | Select[Any] | CompoundSelect[Any]"
"""Which workflows: one record or id, several, or a `select()` or union of `Workflow` or of one column of ids."""

T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_VERSION_7 = (7 << 76) | (2 << 62)  # and the variant. Source: RFC 9562, section 5.7.


def id_at(moment: datetime) -> UUID:
    """Return the least id of a workflow that was started at this time.

    ```python
    select(Workflow).where(Workflow.id >= manage.id_at(datetime.now(UTC) - timedelta(days=1)))
    ```

    Ids begin with the time of the start, to the millisecond, so the primary key finds what was started in a period.
    The time is that of the clock of whoever started the workflow; the database's, for a plain `INSERT`.

    Args:
        moment: a time with a time zone.

    Raises:
        ArgumentError: it has no time zone, or lies before 1970.
    """
    is_time = isinstance(moment, datetime)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not is_time or moment.tzinfo is None or moment < _EPOCH:
        raise ArgumentError(f"id_at({moment!r}): give a time with a time zone, 1970 or later.")
    return UUID(int=((moment - _EPOCH) // timedelta(milliseconds=1) << 80) | _VERSION_7)


def perform(
    session: Session,
    workflows: Selected,
    verb: Callable[[Session, Selection], T],
    *,
    name: str,
    rights: str = "operator",
) -> T:
    """Call a function of the session and the selected workflows.

    Raises:
        ArgumentError: `workflows` are no workflows, or a record that is in no database.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    return callers.perform(
        session, partial(_perform, workflows=workflows, verb=verb), name=f"manage.{name}", rights=rights
    )


def _perform(session: Session, *, workflows: Selected, verb: Callable[[Session, Selection], T]) -> T:
    session.flush()  # a record that was only just started is not in the table yet
    return verb(session, _wanted(session, workflows))


def _wanted(session: Session, workflows: Selected) -> Selection:
    if isinstance(workflows, (Select, CompoundSelect)):
        return evaluate(session, workflows)
    return Selection(callers.ids_of(workflows))
