"""The shop's importer, workflows and migrations, on a database."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Generator
from dataclasses import replace
from itertools import islice
from uuid import UUID

import pytest
from sqlalchemy import NullPool, create_engine, func, make_url, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from shop import call_off, fulfil, orders, payments
from shop.importer import OPENING_STOCK, import_all, import_catalogue, place
from shop.invoices import Invoice, read
from shop.models import Base, Objection, Order, OrderStatus, Payment, Product, StockMovement
from shop.orders import OutOfStock, ParcelRefused, charge
from shop.payment_service import Service
from shop.report import orders_with_steps
from shop.returns import take_back
from shop.values import Outcome
from sqla_durable import Executor, Workflow, errors, models
from sqla_durable.asyncio import AsyncExecutor
from tests.examples.conftest import EXAMPLES

ORDER, RETURN, NOBODYS = "536365", "C536379", "536414"


@pytest.fixture
def sessions(empty_database_url: str) -> Generator[sessionmaker[Session]]:
    """A database with the tables of both."""
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        models.metadata.create_all(connection)
        Base.metadata.create_all(connection)
    yield sessionmaker(engine)
    engine.dispose()


@pytest.fixture
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[Service]:
    """A payment service, as unreliable as the parameter says."""
    with Service(0, unreliability=getattr(request, "param", 0), seed=1) as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("PAYMENTS_URL", f"http://127.0.0.1:{service.server_port}")
        yield service
        service.shutdown()
        thread.join()


def invoices(*chosen: str) -> list[Invoice]:
    return [each for each in read() if each.number in chosen]


def stock(session: Session, number: str) -> set[int]:
    """Return what is left in stock of the products of an order."""
    order = session.get_one(Order, number)
    return {line.product.stock + line.quantity for line in order.lines}


def bookings(service: Service) -> list[tuple[str, str, int]]:
    return [(each["kind"], each["order"], each["pence"]) for each in service.ledger.as_json()["bookings"]]


@pytest.mark.parametrize("service", [0, 0.4], indirect=True)
def test_order_is_reserved_charged_shipped_and_its_customer_notified(
    sessions: sessionmaker[Session], service: Service
) -> None:
    import_all(sessions, invoices(ORDER))
    with sessions() as session:
        workflow_id = session.get_one(Order, ORDER).workflow_id
        assert workflow_id is not None
        assert Executor(session).execute(fulfil, workflow_id) == Outcome(OrderStatus.SHIPPED)
        order = session.get_one(Order, ORDER)
        assert order.status is OrderStatus.SHIPPED
        assert [payment.pence for payment in order.payments] == [13_912]
        assert [shipment.units for shipment in order.shipments] == [40]
        assert [note.text for note in order.notifications] == ["Your order 536365 is on its way: 40 pieces."]
        assert stock(session, ORDER) == {OPENING_STOCK}
    assert bookings(service) == [("charges", ORDER, 13_912)]


@pytest.mark.parametrize("service", [0, 0.4], indirect=True)
async def test_return_is_restocked_and_refunded(
    sessions: sessionmaker[Session], empty_database_url: str, service: Service
) -> None:
    import_all(sessions, invoices(RETURN))
    engine = create_async_engine(make_url(empty_database_url))
    async with async_sessionmaker(engine)() as session:
        order = await session.get_one(Order, RETURN)
        assert order.workflow_id is not None
        assert await AsyncExecutor(session).execute(take_back, order.workflow_id) == Outcome(OrderStatus.RETURNED)
        assert await session.run_sync(stock, RETURN) == {OPENING_STOCK}
        assert await session.run_sync(_refunded, RETURN) == [2_750]
    await engine.dispose()
    assert bookings(service) == [("refunds", RETURN, 2_750)]


def _refunded(session: Session, number: str) -> list[int]:
    return [each.pence for each in session.get_one(Order, number).refunds]


@pytest.mark.parametrize("service", [0, 0.4], indirect=True)
def test_order_whose_goods_run_out_leaves_nothing_behind(sessions: sessionmaker[Session], service: Service) -> None:
    (invoice,) = invoices(ORDER)
    *lines, last = invoice.lines
    import_all(sessions, [replace(invoice, lines=(*lines, replace(last, quantity=OPENING_STOCK + 1)))])
    with sessions() as session, pytest.raises(OutOfStock):
        Executor(session).execute(fulfil, workflow_of(session))
    assert left_behind(sessions) == (len(lines), [], [])
    assert bookings(service) == []


@pytest.mark.parametrize("service", [0, 0.4], indirect=True)
def test_order_whose_parcel_is_refused_is_refunded(sessions: sessionmaker[Session], service: Service) -> None:
    import_all(sessions, [replace(each, country="Atlantis") for each in invoices(ORDER)])
    with sessions() as session, pytest.raises(ParcelRefused, match="Atlantis"):
        Executor(session).execute(fulfil, workflow_of(session))
    assert left_behind(sessions) == (7, [13_912], [13_912])
    assert bookings(service) == [("charges", ORDER, 13_912), ("refunds", ORDER, 13_912)]


@pytest.mark.parametrize(("module", "name", "recorded"), [(payments, "book", []), (orders, "is_served", [13_912])])
def test_order_that_is_called_off_in_a_step_is_undone_with_what_that_step_did(
    sessions: sessionmaker[Session],
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
    recorded: list[int],
) -> None:
    import_all(sessions, invoices(ORDER))
    original = getattr(module, name)

    def called_off_meanwhile(*args: object) -> object:
        outcome = original(*args)
        with sessions.begin() as session:
            assert call_off(session, ORDER)
        return outcome

    monkeypatch.setattr(module, name, called_off_meanwhile)
    with sessions() as session:
        with pytest.raises(errors.AttemptLostError):
            Executor(session).execute(fulfil, workflow_of(session))
        with pytest.raises(errors.WorkflowCancelledError):
            Executor(session).execute(fulfil, workflow_of(session))
    assert left_behind(sessions) == (7, recorded, recorded)
    assert bookings(service) == [("charges", ORDER, 13_912), ("refunds", ORDER, 13_912)]


def test_order_is_called_off_before_its_workflow_begins_and_not_after_its_parcel_has_left(
    sessions: sessionmaker[Session], service: Service
) -> None:
    import_all(sessions, [*invoices(ORDER), *(replace(each, number="X") for each in invoices(ORDER))])
    with sessions.begin() as session:
        assert call_off(session, ORDER)
        assert not call_off(session, ORDER)
    assert left_behind(sessions) == (0, [], [])
    with sessions() as session:
        Executor(session).execute(fulfil, workflow_of(session, "X"))
        assert not call_off(session, "X")
        assert session.get_one(Order, "X").status is OrderStatus.SHIPPED
    assert bookings(service) == [("charges", "X", 13_912)]


def workflow_of(session: Session, number: str = ORDER) -> UUID:
    workflow_id = session.get_one(Order, number).workflow_id
    assert workflow_id is not None
    return workflow_id


def left_behind(sessions: sessionmaker[Session]) -> tuple[int, list[int], list[int]]:
    """Require a cancelled order whose goods are back; return how many lines were moved, what was paid, and refunded."""
    with sessions() as session:
        order = session.get_one(Order, ORDER)
        assert order.status is OrderStatus.CANCELLED
        assert order.shipments == []
        assert len(order.notifications) == 1
        moved = session.scalars(
            select(StockMovement.quantity)
            .where(StockMovement.line_id.in_([line.id for line in order.lines]))
            .order_by(StockMovement.id)
        ).all()
        out, back = moved[: len(moved) // 2], moved[len(moved) // 2 :]
        assert [-each for each in reversed(back)] == list(out)
        assert stock(session, ORDER) == {OPENING_STOCK + line.quantity for line in order.lines}
        return len(out), [each.pence for each in order.payments], [each.pence for each in order.refunds]


def test_what_cannot_be_an_order_ends_as_a_workflow_that_says_so(sessions: sessionmaker[Session]) -> None:
    with sessions() as session, session.begin():
        import_catalogue(session, invoices(NOBODYS))
        place(session, *invoices(NOBODYS))
        outcome = Executor.joined(session).run(fulfil.options(key=NOBODYS), NOBODYS)
        assert outcome == Outcome(OrderStatus.REJECTED, Objection.PRICE_OF_ZERO)
        assert session.get_one(Order, NOBODYS).status is OrderStatus.REJECTED


def test_order_and_workflow_are_there_together_or_not_at_all(sessions: sessionmaker[Session]) -> None:
    # behaviour: T8
    (invoice,) = invoices(ORDER)
    with sessions.begin() as session:
        import_catalogue(session, [invoice])
    with sessions() as session:
        place(session, invoice)
        session.flush()
        session.rollback()
        assert session.scalar(select(func.count()).select_from(Workflow)) == 0
        assert session.scalar(select(func.count()).select_from(Order)) == 0


def test_import_that_is_run_again_adds_nothing(sessions: sessionmaker[Session]) -> None:
    # behaviour: E1
    first = list(islice(read(), 3))
    import_all(sessions, first[:2])
    import_all(sessions, first)
    with sessions() as session:
        assert session.scalars(select(Workflow.key).order_by(Workflow.key)).all() == [each.number for each in first]
        assert set(session.scalars(select(Product.stock))) == {OPENING_STOCK}


@pytest.mark.usefixtures("service")
def test_one_query_joins_orders_with_workflows_and_steps(sessions: sessionmaker[Session]) -> None:
    import_all(sessions, invoices(ORDER))
    with sessions() as session:
        Executor(session).run(fulfil.options(key=ORDER), ORDER)
        row = session.execute(orders_with_steps(limit=5)).one()
        assert row[:6] == (ORDER, "shipped", "succeeded", 1, 13, 0)


def test_payment_service_charges_once_for_a_key(service: Service) -> None:
    ledger = service.ledger
    first = ledger.book("charges", "key", ORDER, 100)
    assert first is not None
    assert ledger.book("charges", "key", ORDER, 100) == first
    assert ledger.book("charges", "key", ORDER, 200) is None
    assert ledger.book("charges", "other key", ORDER, 100) != first
    assert ledger.counts["repeated"] == 2


def test_payment_service_refunds_a_charge_once_and_charges_nothing_afterwards(service: Service) -> None:
    ledger = service.ledger
    ledger.book("charges", "key", ORDER, 100)
    assert ledger.void("undo", ORDER) == ledger.void("undo", ORDER)
    assert ledger.book("charges", "late", ORDER, 100) is None
    assert ledger.book("charges", "key", ORDER, 100) is not None  # the answer to a charge that was made stays
    assert ledger.void("other", "never charged").pence == 0
    assert bookings(service) == [("charges", ORDER, 100), ("refunds", ORDER, 100), ("voids", "never charged", 0)]


def test_charge_outside_a_workflow_is_refused_before_anything_is_sent(service: Service) -> None:
    with pytest.raises(errors.UsageError, match="no step is being executed"):
        charge(ORDER, 100)
    assert service.ledger.counts.total() == 0


@pytest.mark.usefixtures("service")
def test_lost_service_is_another_error_than_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shop.payments._idempotency_key", lambda: "key")
    assert payments.book("charges", ORDER, 100).pence == 100
    with pytest.raises(payments.PaymentRefused, match="409"):
        payments.book("charges", ORDER, 200)
    monkeypatch.setenv("PAYMENTS_URL", "http://127.0.0.1:1")
    with pytest.raises(payments.PaymentUnavailable, match="no answer"):
        payments.book("charges", ORDER, 100)


def test_shop_has_a_history_of_its_own(empty_database_url: str) -> None:
    # behaviour: X1
    commands = ["upgrade head", "check", "downgrade base", "upgrade head"]
    script = f"from alembic.config import main\nfor each in {commands}: main(['-c', 'shop/alembic.ini', *each.split()])"
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=EXAMPLES,
        env={**os.environ, "DATABASE_URL": empty_database_url},
        check=True,
        capture_output=True,
    )
    with create_engine(empty_database_url, poolclass=NullPool).connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Payment)) == 0
