"""What the file says must have happened, computed without any of the shop's code.

On purpose it reads the CSV again and writes the rules down a second time, in another way: a check that shared the
shop's functions would share their mistakes.
"""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from shop.demo.facts import Fact, Facts
from shop.demo.mishaps import Fate, Mishap

FILE = Path(__file__).parents[1] / "data" / "online_retail.csv.gz"
OPENING_STOCK = 10_000

Row = dict[str, str]


def numbers() -> list[str]:
    """Give the numbers of all invoices in the order of the file."""
    return list(_rows_by_number())


def lines_of_orders(chosen: Collection[str]) -> dict[str, int]:
    """Give how many lines those of the invoices have that are to be shipped."""
    rows = {number: each for number, each in _rows_by_number().items() if number in chosen}
    return {number: len(each) for number, each in rows.items() if number[0] != "C" and not _reason(number, each)}


def expected(chosen: Collection[str], mishaps: Collection[Mishap] = (), called_off: Collection[str] = ()) -> Facts:
    """Compute what these invoices must lead to, and the orders that go wrong on purpose."""
    facts: dict[str, Counter[Fact]] = {
        kind: Counter()
        for kind in ("order", "workflow", "payment", "charge", "refund", "refund booked", "shipment", "notification")
    }
    stock: Counter[str] = Counter()
    facts["stock movement"], facts["steps"] = Counter(), Counter()
    for number, rows in _rows_by_number().items():
        if number in chosen:
            _add_invoice(facts, stock, number, rows)
        for mishap in (each for each in mishaps if each.original == number):
            if mishap.fate is Fate.CALLED_OFF and mishap.number not in called_off:
                _add_invoice(facts, stock, mishap.number, rows)
            else:
                _add_mishap(facts, mishap, rows)
    facts["stock"] = Counter(dict.fromkeys(stock.items(), 1))
    return facts


def _add_invoice(facts: dict[str, Counter[Fact]], stock: Counter[str], number: str, rows: list[Row]) -> None:
    for row in rows:
        stock[row["StockCode"]] += 0 if row["StockCode"] in stock else OPENING_STOCK
    pence = round(sum(int(row["Quantity"]) * float(row["UnitPrice"]) * 100 for row in rows))
    units = sum(int(row["Quantity"]) for row in rows)
    reason = _reason(number, rows)
    status = "rejected" if reason else "returned" if number[0] == "C" else "shipped"
    facts["order"][number, status, reason] += 1
    facts["workflow"][number, "succeeded", status, reason] += 1
    facts["steps"][number, 1 if reason else len(rows) + (4 if number[0] == "C" else 6)] += 1
    if reason:
        return
    facts["notification"][number,] += 1
    for position, row in enumerate(rows, start=1):
        stock[row["StockCode"]] -= int(row["Quantity"])
        facts["stock movement"][number, position, -int(row["Quantity"])] += 1
    if status == "returned":
        facts["refund"][number, -pence] += 1
        facts["refund booked"][number, -pence] += 1
    else:
        facts["payment"][number, pence] += 1
        facts["charge"][number, pence] += 1
        facts["shipment"][number, units] += 1


def _add_mishap(facts: dict[str, Counter[Fact]], mishap: Mishap, rows: list[Row]) -> None:
    """Add what is left of an order: whatever was done has its counterpart. What was called off is `settled` before."""
    number, fate = mishap.number, mishap.fate
    facts["order"][number, "cancelled", None] += 1
    facts["workflow"][number, "cancelled" if fate is Fate.CALLED_OFF else "failed", None, None] += 1
    facts["notification"][number,] += 1
    if fate is Fate.CALLED_OFF:
        return
    reserved = rows if fate is Fate.NO_CARRIER else rows[:-1]
    for position, row in enumerate(reserved, start=1):
        facts["stock movement"][number, position, -int(row["Quantity"])] += 1
        facts["stock movement"][number, position, int(row["Quantity"])] += 1
    facts["steps"][number, len(rows) + len(reserved) + (8 if fate is Fate.NO_CARRIER else 3)] += 1
    if fate is Fate.NO_CARRIER:
        pence = round(sum(int(row["Quantity"]) * float(row["UnitPrice"]) * 100 for row in rows))
        for kind in ("payment", "refund", "charge", "refund booked"):
            facts[kind][number, pence] += 1


def _reason(number: str, rows: list[Row]) -> str | None:
    if number[0] != "C" and min(int(row["Quantity"]) for row in rows) < 0:
        return "stock correction"
    if max(float(row["UnitPrice"]) for row in rows) == 0:
        return "price of zero"
    return None if rows[0]["CustomerID"] else "no customer"


def _rows_by_number() -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    with gzip.open(FILE, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["InvoiceNo"], []).append(row)
    return found
