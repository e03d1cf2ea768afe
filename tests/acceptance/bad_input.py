"""What the tests of bad input share: an application, and a caller whose transaction must survive."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable
from tests.support.domain import Entry

Sessions = sessionmaker[Session]
durable = Durable(payload_limit=10_000)


@durable.workflow
def ship(order_id: int, price: Decimal = Decimal(1), note: str = "", weight: float = 1.0) -> str:
    return f"{order_id} {price} {note} {weight}"


@durable.workflow
def carry(anything: Any) -> Any:
    return anything


@durable.workflow
async def aship(order_id: int) -> str:
    return str(order_id)


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="book", cents=cents, note=None))
    return cents


@durable.workflow
def bookkeep(cents: int) -> int:
    return book(cents)


bare = Durable()
bare.workflow(lambda: None, name="bare")
