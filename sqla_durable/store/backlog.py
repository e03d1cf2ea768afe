"""What waits in queues: in which of them, under names or of versions that a worker does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store.claims import QUEUES, name_parameters, waits_in
from sqla_durable.store.statements import (
    ORDER_IN_QUEUE,
    WORKFLOW,
    Connectable,
    Statement,
    integer,
    pg,
    scalars,
    status_literal,
)


def waiting(
    connectable: Connectable, *, queues: Sequence[str], names: Sequence[str], versions: Sequence[str] = ()
) -> list[str]:
    """Return those of the queues in which something waits, whatever their limits; in their order."""
    found = scalars(connectable, _WAITING, {"queues": list(queues)} | name_parameters(names, versions))
    return sorted(found, key=list(queues).index)


def queue_names(connectable: Connectable) -> list[str]:
    """Return the names of the queues in which something waits."""
    return list(scalars(connectable, _QUEUE_NAMES))


def unknown_names(connectable: Connectable, *, queues: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names of workflows near the head of the queues that are not among `names`."""
    head = (
        sa.select(WORKFLOW.c.name)
        .where(WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING), WORKFLOW.c.queue.in_(queues))
        .where(WORKFLOW.c.name.not_in(names))
        .limit(100)
        .subquery()
    )
    return list(scalars(connectable, sa.select(head.c.name).distinct().order_by(head.c.name)))


def other_versions(connectable: Connectable, *, queues: Sequence[str], versions: Sequence[str]) -> list[str]:
    """Return the versions of workflows near the head of each queue that are not among `versions`."""
    heads = [
        sa.select(WORKFLOW.c.version)
        .where(WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING), WORKFLOW.c.queue == queue)
        .order_by(*ORDER_IN_QUEUE)
        .limit(1_000)
        .subquery()
        for queue in queues
    ]
    found = sa.union(*(sa.select(each.c.version).where(each.c.version.not_in(versions)) for each in heads))
    return sorted(scalars(connectable, found))


def _waiting_statement() -> Any:
    given = pg.unnest(QUEUES).table_valued("name").render_derived("given")
    in_order = sa.select(WORKFLOW.c.id).where(waits_in(given.c.name)).order_by(*ORDER_IN_QUEUE)
    first = in_order.limit(integer(1)).lateral("first")
    return sa.select(given.c.name).select_from(given.join(first, sa.true()))


def _queue_names_statement() -> Any:
    """Look for one name after another: to read all that waits would take as long as there is much of it."""
    pending = WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING)
    first = sa.select(WORKFLOW.c.queue).where(pending).order_by(WORKFLOW.c.queue, *ORDER_IN_QUEUE).limit(integer(1))
    names = sa.select(first.subquery("first").c.queue).cte("names", recursive=True)
    later = first.where(WORKFLOW.c.queue > names.c.queue).correlate(names).lateral("later")
    names = names.union_all(sa.select(later.c.queue).select_from(names.join(later, sa.true())))
    return sa.select(names.c.queue)


_QUEUE_NAMES = Statement(_queue_names_statement)
_WAITING = Statement(_waiting_statement)
