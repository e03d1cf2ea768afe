"""What an invoice must be to be an order, and what it costs: plain functions of plain objects.

Every stock code is a product, postage and bank charges too: the shop counts whatever it sells.
"""

from __future__ import annotations

from shop.models import Objection, Order

NOT_SERVED = {"Atlantis"}
"""The countries that no carrier delivers to."""


def is_return(number: str) -> bool:
    """Tell whether this is the number of a return."""
    return number.startswith("C")


def objection(order: Order) -> Objection | None:
    """Say why an invoice cannot be carried out; None if it can.

    A negative quantity outside a return is a correction of the stock. An order whose every line is free is none; a
    free line among priced ones is a gift: it is reserved and shipped like the others, and costs nothing.
    """
    if not is_return(order.number) and any(line.quantity < 0 for line in order.lines):
        return Objection.STOCK_CORRECTION
    if all(line.unit_pence == 0 for line in order.lines):
        return Objection.PRICE_OF_ZERO
    if order.customer_id is None:
        return Objection.NO_CUSTOMER
    return None


def is_served(country: str) -> bool:
    """Tell whether a parcel can be sent to this country."""
    return country not in NOT_SERVED


def total_pence(order: Order) -> int:
    """Give what the invoice amounts to; a return's is negative."""
    return sum(line.quantity * line.unit_pence for line in order.lines)
