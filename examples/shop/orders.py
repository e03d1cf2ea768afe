"""The workflow of an order, in sync code.

Steps that take a `Session` are transactional: what they write and the fact that they ran commit together, so each
takes effect exactly once, whenever the worker dies. `charge` is a plain step: it calls another system, may run again
after a crash, and relies on its idempotency key.
"""

from __future__ import annotations

from sqlalchemy.orm import Session
from tenacity import retry_if_exception_type, stop_after_attempt, wait_random_exponential

from shop import payments
from shop.database import durable
from shop.models import Notification, Order, OrderStatus, Payment, Product, Shipment, StockMovement
from shop.values import Checked, Item, Outcome


class OutOfStock(Exception):
    """There is less on the shelf than was ordered."""


@durable.workflow
def fulfil(number: str) -> Outcome:
    """Carry out an order, or say why it is none."""
    checked = check(number)
    if checked.objection is not None:
        return Outcome(OrderStatus.REJECTED, checked.objection)
    for item in checked.items:
        reserve(item)
    receipt = charge(number, checked.pence)
    record_payment(number, receipt)
    units = ship(number)
    notify(number, f"Your order {number} is on its way: {units} pieces.")
    return Outcome(OrderStatus.SHIPPED)


@durable.step
def check(session: Session, number: str) -> Checked:
    """Accept the order or reject it."""
    order = session.get_one(Order, number)
    checked = Checked.of(order)
    order.objection = checked.objection
    order.status = OrderStatus.REJECTED if checked.objection else OrderStatus.ACCEPTED
    return checked


@durable.step
def reserve(session: Session, item: Item) -> int:
    """Take one line's goods off the shelf; gives what is left there."""
    product = session.get_one(Product, item.product_code, with_for_update=True)
    if product.stock < item.quantity:
        raise OutOfStock(f"{item.quantity} of {item.product_code} were ordered, {product.stock} are there")
    product.stock -= item.quantity
    session.add(StockMovement(line_id=item.line_id, quantity=-item.quantity))
    return product.stock


@durable.step(
    retry=retry_if_exception_type(payments.PaymentUnavailable),
    stop=stop_after_attempt(20),
    wait=wait_random_exponential(multiplier=0.05, max=2),
)
def charge(number: str, pence: int) -> payments.Receipt:
    """Take the money."""
    return payments.book("charges", number, pence)


@durable.step
def record_payment(session: Session, number: str, receipt: payments.Receipt) -> None:
    """Write down what was paid."""
    session.add(Payment(order_number=number, pence=receipt.pence, reference=receipt.reference))


@durable.step
def ship(session: Session, number: str) -> int:
    """Send the parcel; gives how many pieces are in it."""
    order = session.get_one(Order, number)
    order.status = OrderStatus.SHIPPED
    units = sum(line.quantity for line in order.lines)
    session.add(Shipment(order=order, units=units))
    return units


@durable.step
def notify(session: Session, number: str, text: str) -> None:
    """Leave a message for the mail program."""
    session.add(Notification(order_number=number, text=text))
