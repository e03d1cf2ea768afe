"""Turns invoices into orders and starts their workflows: `python -m shop.importer`.

An order and its workflow are inserted in one transaction: both are there or neither. The invoice number is the
workflow's key, so an import that was cut short is simply run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, sessionmaker

from shop import fulfil, take_back
from shop.database import SessionLocal
from shop.invoices import Invoice, read
from shop.models import Customer, Order, OrderLine, Product
from shop.rules import is_return

OPENING_STOCK = 10_000
"""How many of each product are on the shelf on the first day; the file does not say."""


def import_catalogue(session: Session, invoices: Sequence[Invoice]) -> None:
    """Insert the products and customers of the invoices, those that are not there yet."""
    products = {line.product_code: line.description for each in invoices for line in each.lines if line.description}
    nameless = {line.product_code: "" for each in invoices for line in each.lines}
    customers = sorted({each.customer_id for each in invoices if each.customer_id is not None})
    session.execute(
        insert(Product).on_conflict_do_nothing(),
        [
            {"code": code, "description": description, "stock": OPENING_STOCK}
            for code, description in (nameless | products).items()
        ],
    )
    if customers:
        session.execute(insert(Customer).on_conflict_do_nothing(), [{"id": each} for each in customers])


def place(session: Session, invoice: Invoice) -> Order:
    """Insert an order and start its workflow, in the caller's transaction; a known invoice is left as it is."""
    known = session.get(Order, invoice.number)
    if known is not None:
        return known
    workflow = take_back if is_return(invoice.number) else fulfil
    order = Order(
        number=invoice.number,
        customer_id=invoice.customer_id,
        country=invoice.country,
        placed_at=invoice.placed_at,
        workflow=workflow.options(key=invoice.number).start(session, invoice.number),
        lines=[
            OrderLine(
                position=position, product_code=each.product_code, quantity=each.quantity, unit_pence=each.unit_pence
            )
            for position, each in enumerate(invoice.lines, start=1)
        ],
    )
    session.add(order)
    return order


def import_all(sessions: sessionmaker[Session], invoices: Iterable[Invoice]) -> None:
    """Import invoices, each in a transaction of its own."""
    invoices = list(invoices)
    with sessions.begin() as session:
        import_catalogue(session, invoices)
    for invoice in invoices:
        with sessions.begin() as session:
            place(session, invoice)


if __name__ == "__main__":
    import_all(SessionLocal, read())
