"""The statement that reads workflows with all that is recorded of them, as JSON that PostgreSQL writes.

So every number and every time is as it is in the database, and no value is decoded on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import aggregate_order_by

from sqla_durable.models.base import Text
from sqla_durable.store.statements import (
    EVENT,
    SIGNAL,
    STEP,
    STREAM_ITEM,
    WORKFLOW,
    Connectable,
    Expression,
    Statement,
    is_among,
    pg,
    scalars,
    text_literal,
)

OF_ATTEMPTS = "token", "worker_id"
"""What is left out: it identifies an attempt, and is of use only where that is executed."""

FORMAT = 1
"""Which form the objects have; another one is not read."""

LISTS = {"steps": STEP, "signals": SIGNAL, "events": EVENT, "stream_items": STREAM_ITEM}
"""The rows that belong to a workflow, by the members of its object."""


def histories(connectable: Connectable, workflow_ids: Sequence[UUID]) -> list[str]:
    """Read workflows, the newest first, each as the text of a JSON object without line breaks. Takes no lock.

    It has its `format`, the columns of the `workflow`, its `steps`, `signals`, `events` and `stream_items`, and of its
    `children` the ids, names and keys. All are from one snapshot; those that do not exist are left out.
    """
    return list(scalars(connectable, _HISTORIES, {"ids": list(workflow_ids)}))


def _statement() -> Any:
    child = WORKFLOW.alias("child")
    order = {
        STEP: [STEP.c.position],
        SIGNAL: [SIGNAL.c.id],
        EVENT: [EVENT.c.id],
        STREAM_ITEM: [STREAM_ITEM.c.name, STREAM_ITEM.c.number],
    }
    parts: dict[str, Expression] = {
        "format": sa.literal_column(f"{FORMAT}", sa.Integer()),
        "workflow": _object([each for each in WORKFLOW.c if each.name not in OF_ATTEMPTS]),
        **{name: _list_of(table, *order[table]) for name, table in LISTS.items()},
        "children": _list([child.c.id, child.c.name, child.c.parent_key], child.c.parent_id, child.c.id),
    }
    arguments = [argument for name, value in parts.items() for argument in (text_literal(name), value)]
    line = sa.cast(pg.json_build_object(*arguments), Text)
    return sa.select(line).where(is_among(WORKFLOW.c.id)).order_by(WORKFLOW.c.id.desc())


def _list_of(table: sa.Table, *order: Expression) -> Expression:
    return _list([each for each in table.c if each.name != "workflow_id"], table.c.workflow_id, *order)


def _list(columns: Sequence[Expression], of: Expression, *order: Expression) -> Expression:
    """Return rows of a workflow as a JSON array."""
    items = pg.json_agg(aggregate_order_by(_object(columns), *order))
    found = sa.select(sa.func.coalesce(items, sa.literal_column("json '[]'"))).where(of == WORKFLOW.c.id)
    return found.correlate(WORKFLOW).scalar_subquery()


def _object(columns: Iterable[Any]) -> Expression:
    """Return columns as a JSON object."""
    return pg.json_build_object(*(argument for each in columns for argument in (text_literal(each.name), each)))


_HISTORIES = Statement(_statement)
