"""One SQL query over the shop's tables and the engine's: orders, their workflows, and their steps."""

from __future__ import annotations

from decimal import Decimal

from sqlalchemy import Select, extract, func, select

from shop.models import Order, OrderStatus
from sqla_durable import Step, Workflow, WorkflowStatus


def orders_with_steps(*, limit: int) -> Select[str, OrderStatus, WorkflowStatus, int, int, int, Decimal]:
    """Select the orders that were hardest to carry out: those whose workflows were reclaimed most often.

    The columns: number, status of order and workflow, the workflow's attempts, its steps, those of them that a worker
    recorded which died later, and how many seconds it took.
    """
    replayed = func.count().filter(Step.attempt < Workflow.attempt)
    return (
        select(
            Order.number,
            Order.status,
            Workflow.status.label("workflow"),
            Workflow.attempt.label("attempts"),
            func.count(Step.key).label("steps"),
            replayed.label("replayed"),
            func.round(extract("epoch", Workflow.finished_at - Workflow.started_at), 1).label("seconds"),
        )
        .join(Order.workflow)
        .join(Workflow.steps)
        .group_by(Order.number, Workflow.id)
        .order_by(Workflow.attempt.desc(), replayed.desc(), Order.number)
        .limit(limit)
    )
