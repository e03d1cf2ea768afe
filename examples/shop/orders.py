"""The workflow of an order, in sync code.

Steps that take a `Session` are transactional: what they write and the fact that they ran commit together, so each
takes effect exactly once, whenever the worker dies. `charge` is a plain step: it calls another system, may run again
after a crash, and relies on its idempotency key. What was done is undone by the steps below it, if the order fails on
its way or is called off.
"""

from __future__ import annotations

from sqlalchemy.orm import Session
from tenacity import retry_if_exception_type, stop_after_attempt, wait_random_exponential

from shop import payments
from shop.database import durable
from shop.models import Notification, Order, OrderStatus, Payment, Product, Refund, Shipment, StockMovement
from shop.rules import is_served
from shop.values import Checked, Item, Outcome
from sqla_durable import Saga, manage


class OutOfStock(Exception):
    """There is less on the shelf than was ordered."""


class ParcelRefused(Exception):
    """No carrier takes the parcel."""


@durable.workflow
def fulfil(number: str) -> Outcome:
    """Carry out an order, or say why it is none; what fails on its way leaves nothing behind."""
    checked = check(number)
    if checked.objection is not None:
        return Outcome(OrderStatus.REJECTED, checked.objection)
    with Saga() as undo:
        undo.add(give_up, number)
        for item in checked.items:
            reserve(item)
            undo.add(restock, item)
        undo.add(refund, number)  # before the charge: one without an answer may have been made
        receipt = charge(number, checked.pence)
        record_payment(number, receipt)
        undo.add(record_refund, number, receipt)
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


@durable.step
def restock(session: Session, item: Item) -> None:
    """Put one line's goods back on the shelf."""
    product = session.get_one(Product, item.product_code, with_for_update=True)
    product.stock += item.quantity
    session.add(StockMovement(line_id=item.line_id, quantity=item.quantity))


patiently = durable.step(
    retry=retry_if_exception_type(payments.PaymentUnavailable),
    stop=stop_after_attempt(20),
    wait=wait_random_exponential(multiplier=0.05, max=2),
)


@patiently
def charge(number: str, pence: int) -> payments.Receipt:
    """Take the money."""
    return payments.book("charges", number, pence)


@patiently
def refund(number: str) -> payments.Receipt:
    """Give back what was taken, if it was, and let nothing be taken any more."""
    return payments.void(number)


@durable.step
def record_payment(session: Session, number: str, receipt: payments.Receipt) -> None:
    """Write down what was paid."""
    session.add(Payment(order_number=number, pence=receipt.pence, reference=receipt.reference))


@durable.step
def record_refund(session: Session, number: str, receipt: payments.Receipt) -> None:
    """Write down that what was paid was given back."""
    session.add(Refund(order_number=number, pence=receipt.pence, reference=receipt.reference))


@durable.step
def ship(session: Session, number: str) -> int:
    """Send the parcel; gives how many pieces are in it."""
    order = session.get_one(Order, number)
    if not is_served(order.country):
        raise ParcelRefused(f"no carrier delivers to {order.country}")
    order.status = OrderStatus.SHIPPED
    units = sum(line.quantity for line in order.lines)
    session.add(Shipment(order=order, units=units))
    return units


@durable.step
def notify(session: Session, number: str, text: str) -> None:
    """Leave a message for the mail program."""
    session.add(Notification(order_number=number, text=text))


@durable.step
def give_up(session: Session, number: str) -> None:
    """Write down that nothing comes of the order."""
    _cancelled(session, session.get_one(Order, number))


def call_off(session: Session, number: str) -> bool:
    """Cancel an order in the caller's transaction; False: it is too late, or there is nothing to cancel.

    Locks the order's row before its workflow's, as its steps do: so either the parcel leaves, or this comes first.
    """
    order = session.get_one(Order, number, with_for_update=True, populate_existing=True)
    if order.workflow is None or order.status not in (OrderStatus.PLACED, OrderStatus.ACCEPTED):
        return False
    if not manage.cancel(session, order.workflow):
        return False
    if order.workflow.finished_at is not None:  # it had nothing to undo
        _cancelled(session, order)
    return True


def _cancelled(session: Session, order: Order) -> None:
    order.status = OrderStatus.CANCELLED
    session.add(Notification(order=order, text=f"Your order {order.number} is cancelled, and nothing is to be paid."))
