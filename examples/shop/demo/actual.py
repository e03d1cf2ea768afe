"""What happened, read from the shop's tables, the engine's tables, and the payment service's own ledger."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.request import urlopen

from sqlalchemy import Executable, func, select
from sqlalchemy.orm import Session

from shop.demo.facts import Fact, Facts
from shop.models import Notification, Order, OrderLine, Payment, Product, Refund, Shipment, StockMovement
from sqla_durable import Step, Workflow, WorkflowStatus
from sqla_durable.models import Worker


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the workers have come, and which of them are executing workflows at this moment."""

    steps: int
    finished: int
    undone: int
    busy: list[str]


def progress(session: Session) -> Progress:
    """Count the checkpoints, and the workflows that have ended."""
    steps = session.scalar(select(func.count()).select_from(Step))
    finished, undone = session.execute(
        select(
            func.count(Workflow.finished_at),
            func.count().filter(Workflow.status.in_([WorkflowStatus.FAILED, WorkflowStatus.CANCELLED])),
        )
    ).one()
    busy = session.scalars(select(Worker.name).join(Worker.workflows).where(Workflow.status == WorkflowStatus.RUNNING))
    return Progress(steps or 0, finished, undone, sorted(set(busy)))


@dataclass(frozen=True, slots=True)
class Recovery:
    """What the deaths of workers have led to."""

    reclaimed: int
    replayed: int
    tried_again: int


def recovery(session: Session) -> Recovery:
    """Count workflows that another worker finished, steps it did not execute again, and steps that were retried."""
    replayed, tried_again = session.execute(
        select(
            func.count().filter(Step.attempt < Workflow.attempt),
            func.count().filter(Step.tries > 1),
        ).join(Step.workflow)
    ).one()
    reclaimed = session.scalar(select(func.count()).select_from(Workflow).where(Workflow.attempt > 1))
    return Recovery(reclaimed or 0, replayed, tried_again)


def actual(session: Session, ledger: dict[str, Any]) -> Facts:
    """Collect all facts."""
    outcome = Workflow.output
    per_order = select(Order.number, func.count(Step.key)).outerjoin(Order.workflow).outerjoin(Workflow.steps)
    moved = select(OrderLine.order_number, OrderLine.position, StockMovement.quantity).join(StockMovement.line)
    return {
        "order": _facts(session, select(Order.number, Order.status, Order.objection)),
        "workflow": _facts(
            session,
            select(
                Order.number, Workflow.status, outcome["status"].as_string(), outcome["reason"].as_string()
            ).outerjoin(Order.workflow),
        ),
        "steps": _facts(session, per_order.group_by(Order.number)),
        "stock": _facts(session, select(Product.code, Product.stock)),
        "stock movement": _facts(session, moved),
        "payment": _facts(session, select(Payment.order_number, Payment.pence)),
        "refund": _facts(session, select(Refund.order_number, Refund.pence)),
        "shipment": _facts(session, select(Shipment.order_number, Shipment.units)),
        "notification": _facts(session, select(Notification.order_number)),
        "charge": _booked(ledger, "charges"),
        "refund booked": _booked(ledger, "refunds"),
    }


def read_ledger(payments_url: str) -> dict[str, Any]:
    """Ask the payment service for its bookings and its counts."""
    with urlopen(f"{payments_url}/ledger", timeout=10) as response:
        ledger: dict[str, Any] = json.load(response)
    return ledger


def _facts(session: Session, statement: Executable) -> Counter[Fact]:
    return Counter(tuple(_plain(value) for value in row) for row in session.execute(statement))


def _booked(ledger: dict[str, Any], kind: str) -> Counter[Fact]:
    bookings: Iterable[dict[str, Any]] = ledger["bookings"]
    return Counter((each["order"], each["pence"]) for each in bookings if each["kind"] == kind)


def _plain(value: str | int | None) -> str | int | None:
    return str(value) if isinstance(value, str) else value
