"""The workflow of a return, in async code; the same worker executes it beside the orders.

It awaits its steps, the sync `notify` of the orders too: that one is executed in a thread.
"""

from __future__ import annotations

import asyncio

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload
from tenacity import retry_if_exception_type, stop_after_attempt, wait_random_exponential

from shop import payments
from shop.database import durable
from shop.models import Order, OrderStatus, Product, Refund, StockMovement
from shop.orders import notify
from shop.values import Checked, Item, Outcome
from sqla_durable.asyncio import to_thread


@durable.workflow
async def take_back(number: str) -> Outcome:
    """Take goods back and give the money back, or say why not."""
    inspected = await inspect(number)
    if inspected.objection is not None:
        return Outcome(OrderStatus.REJECTED, inspected.objection)
    for item in inspected.items:
        await take_in(item)
    receipt = await pay_back(number, -inspected.pence)
    await record_payback(number, receipt)
    await to_thread(notify, number, f"We have refunded £{receipt.pence / 100:,.2f} for {number}.")
    return Outcome(OrderStatus.RETURNED)


@durable.step
async def inspect(session: AsyncSession, number: str) -> Checked:
    """Accept the return or reject it."""
    # populate_existing: an executor's session may know the order already, without its lines.
    order = await session.get_one(Order, number, options=[selectinload(Order.lines)], populate_existing=True)
    inspected = Checked.of(order)
    order.objection = inspected.objection
    order.status = OrderStatus.REJECTED if inspected.objection else OrderStatus.ACCEPTED
    return inspected


@durable.step
async def take_in(session: AsyncSession, item: Item) -> int:
    """Put one line's goods back on the shelf; gives what is there now."""
    product = await session.get_one(Product, item.product_code, with_for_update=True)
    product.stock -= item.quantity  # a return's quantities are negative
    session.add(StockMovement(line_id=item.line_id, quantity=-item.quantity))
    return product.stock


@durable.step(
    retry=retry_if_exception_type(payments.PaymentUnavailable),
    stop=stop_after_attempt(20),
    wait=wait_random_exponential(multiplier=0.05, max=2),
)
async def pay_back(number: str, pence: int) -> payments.Receipt:
    """Give the money back, by a client that blocks, so in a thread."""
    return await asyncio.to_thread(payments.book, "refunds", number, pence)


@durable.step
async def record_payback(session: AsyncSession, number: str, receipt: payments.Receipt) -> None:
    """Write down what was given back."""
    order = await session.get_one(Order, number)
    order.status = OrderStatus.RETURNED
    session.add(Refund(order=order, pence=receipt.pence, reference=receipt.reference))
