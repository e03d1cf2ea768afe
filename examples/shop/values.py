"""What steps and workflows hand each other: plain values, because they are stored as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from shop.models import Objection, Order, OrderStatus
from shop.rules import objection, total_pence


@dataclass(frozen=True, slots=True)
class Item:
    """A line of an order, with all that moving its goods needs."""

    line_id: int
    product_code: str
    quantity: int


@dataclass(frozen=True, slots=True)
class Checked:
    """An invoice that was looked at: what is to be done, or why nothing is."""

    objection: Objection | None
    pence: int
    items: list[Item]

    @classmethod
    def of(cls, order: Order) -> Checked:
        """Look at an order whose lines are loaded."""
        items = [Item(line.id, line.product_code, line.quantity) for line in order.lines]
        return cls(objection(order), total_pence(order), items)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an invoice's workflow ended."""

    status: OrderStatus
    reason: Objection | None = None
