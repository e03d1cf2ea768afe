"""The shop's plain functions, without a database."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

import pytest

from shop.demo.expected import expected, lines_of_orders, numbers
from shop.demo.facts import Facts, differences, settled
from shop.demo.mishaps import Fate, choose
from shop.invoices import Line, read
from shop.models import Objection, Order, OrderLine
from shop.rules import is_return, objection, total_pence
from shop.values import Checked, Item


def order(number: str, *lines: tuple[int, int], customer_id: int | None = 1) -> Order:
    return Order(
        number=number,
        customer_id=customer_id,
        lines=[
            OrderLine(id=id_, product_code="A", quantity=quantity, unit_pence=pence)
            for id_, (quantity, pence) in enumerate(lines, start=1)
        ],
    )


@pytest.mark.parametrize(
    ("invoice", "reason"),
    [
        (order("1", (6, 255)), None),
        (order("1", (6, 255), (1, 0)), None),  # a gift
        (order("C1", (-6, 255)), None),
        (order("1", (6, 255), customer_id=None), Objection.NO_CUSTOMER),
        (order("C1", (-6, 255), customer_id=None), Objection.NO_CUSTOMER),
        (order("1", (6, 0), (2, 0)), Objection.PRICE_OF_ZERO),
        (order("1", (-6, 0), customer_id=None), Objection.STOCK_CORRECTION),
        (order("1", (6, 255), (-1, 255)), Objection.STOCK_CORRECTION),
    ],
)
def test_objection_names_why_an_invoice_cannot_be_an_order(invoice: Order, reason: Objection | None) -> None:
    assert objection(invoice) is reason


def test_total_counts_every_line() -> None:
    assert total_pence(order("1", (6, 255), (1, 0), (2, 339))) == 2208
    assert total_pence(order("C1", (-6, 255))) == -1530


def test_number_shows_whether_it_is_a_return() -> None:
    assert is_return("C536379")
    assert not is_return("536365")


def test_checked_order_carries_all_that_the_steps_need() -> None:
    assert Checked.of(order("1", (6, 255))) == Checked(None, 1530, [Item(1, "A", 6)])


def test_file_is_read_as_its_description_says() -> None:
    invoices = list(read())
    assert len(invoices) == 511
    assert sum(len(each.lines) for each in invoices) == 9_911
    assert sum(is_return(each.number) for each in invoices) == 43
    assert sum(each.customer_id is None for each in invoices) == 68
    assert len({line.product_code for each in invoices for line in each.lines}) == 2_005
    first = invoices[0]
    assert (first.number, first.customer_id, first.country) == ("536365", 17850, "United Kingdom")
    assert first.placed_at == datetime(2010, 12, 1, 8, 26)
    assert first.lines[0] == Line("85123A", "WHITE HANGING HEART T-LIGHT HOLDER", 6, 255)


def test_expectations_come_to_what_the_file_holds() -> None:
    facts = expected(numbers())
    reasons = [reason for _, _, reason in facts["order"].elements()]
    assert [reasons.count(each) for each in ("no customer", "stock correction", "price of zero")] == [23, 30, 15]
    assert facts["payment"].total() == 400
    assert facts["refund"].total() == 43
    assert facts["stock movement"].total() == 7_620


def test_difference_of_facts_names_missing_and_surplus() -> None:
    facts = expected(numbers()[:3])
    assert differences(facts, facts) == []
    twice = {**facts, "payment": facts["payment"] + facts["payment"]}
    (found,) = differences(facts, twice)
    assert found.startswith("payment: too many or wrong 3, such as ('536365', 13912), ")
    never = {kind: counter for kind, counter in facts.items() if kind != "shipment"}
    (found,) = differences(facts, never)
    assert found.startswith("shipment: missing 3, such as ('536365', 40), ")


def test_mishaps_are_copies_of_orders_that_would_be_shipped() -> None:
    lines = lines_of_orders(numbers())
    mishaps = choose(lines, seed=1)
    assert len(lines) == 400
    assert Counter(each.fate for each in mishaps) == dict.fromkeys(Fate, 7)
    assert choose(dict(list(lines.items())[:2]), seed=1) == []


def test_what_was_undone_is_settled_only_where_it_was_done_once() -> None:
    done: Facts = {
        "stock movement": Counter({("X", 1, -5): 1, ("X", 1, 5): 1, ("Y", 1, -5): 1, ("Y", 1, 5): 1}),
        "payment": Counter({("X", 7): 1}),
        "refund": Counter({("X", 7): 1}),
        "charge": Counter({("X", 7): 1}),
        "refund booked": Counter({("X", 7): 2}),
        "steps": Counter({("X", 9): 1, ("Y", 9): 1}),
    }
    left = settled(done, {"X"})
    assert left["stock movement"] == {("Y", 1, -5): 1, ("Y", 1, 5): 1}
    assert (left["payment"], left["refund"], left["charge"]) == (Counter(), Counter(), Counter())
    assert left["refund booked"] == {("X", 7): 1}
    assert left["steps"] == {("Y", 9): 1}
    twice = settled({**done, "stock movement": Counter({("X", 1, -5): 2, ("X", 1, 5): 2})}, {"X"})
    assert twice["stock movement"] == {("X", 1, -5): 1, ("X", 1, 5): 1}
