"""What waits in queues: in which of them, under names or of versions that a worker does not know."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store.claims import NAMES, QUEUES, VERSIONS, name_parameters, waits_in
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


def unknown_names(connectable: Connectable, *, queues: Collection[str], names: Sequence[str]) -> list[str]:
    """Return the names of workflows near the head of the queues that are not among `names`."""
    return sorted(scalars(connectable, _UNKNOWN_NAMES, {"queues": list(queues), "names": list(names)}))


def other_versions(connectable: Connectable, *, queues: Collection[str], versions: Sequence[str]) -> list[str]:
    """Return the versions of workflows near the head of each queue that are not among `versions`."""
    return sorted(scalars(connectable, _OTHER_VERSIONS, {"queues": list(queues), "versions": list(versions)}))


def _waiting_statement() -> Any:
    given = _given_queues()
    in_order = sa.select(WORKFLOW.c.id).where(waits_in(given.c.name)).order_by(*ORDER_IN_QUEUE)
    first = in_order.limit(integer(1)).lateral("first")
    return sa.select(given.c.name).select_from(given.join(first, sa.true()))


def _unknown_names_statement() -> Any:
    is_here = WORKFLOW.c.queue == sa.func.any(QUEUES), WORKFLOW.c.name != sa.func.all(NAMES)
    head = sa.select(WORKFLOW.c.name).where(_IS_PENDING, *is_here).limit(integer(100)).subquery("head")
    return sa.select(head.c.name).distinct()


def _other_versions_statement() -> Any:
    given = _given_queues()
    pending = sa.select(WORKFLOW.c.version).where(_IS_PENDING, WORKFLOW.c.queue == given.c.name)
    head = pending.order_by(*ORDER_IN_QUEUE).limit(integer(1_000)).lateral("head")
    found = sa.select(head.c.version).select_from(given.join(head, sa.true()))
    return found.where(head.c.version != sa.func.all(VERSIONS)).distinct()


def _given_queues() -> Any:
    return pg.unnest(QUEUES).table_valued("name").render_derived("given")


def _queue_names_statement() -> Any:
    """Look for one name after another: to read all that waits would take as long as there is much of it."""
    first = sa.select(WORKFLOW.c.queue).where(_IS_PENDING).order_by(WORKFLOW.c.queue, *ORDER_IN_QUEUE).limit(integer(1))
    names = sa.select(first.subquery("first").c.queue).cte("names", recursive=True)
    later = first.where(WORKFLOW.c.queue > names.c.queue).correlate(names).lateral("later")
    names = names.union_all(sa.select(later.c.queue).select_from(names.join(later, sa.true())))
    return sa.select(names.c.queue)


_IS_PENDING = WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING)
_QUEUE_NAMES = Statement(_queue_names_statement)
_WAITING = Statement(_waiting_statement)
_UNKNOWN_NAMES = Statement(_unknown_names_statement)
_OTHER_VERSIONS = Statement(_other_versions_statement)
