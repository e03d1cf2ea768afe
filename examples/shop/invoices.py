"""The invoices of the file, as they are. Nothing here knows of a database."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import groupby
from pathlib import Path

FILE = Path(__file__).parent / "data" / "online_retail.csv.gz"


@dataclass(frozen=True, slots=True)
class Line:
    """One line: so many of a product, at a price in pence."""

    product_code: str
    description: str
    quantity: int
    unit_pence: int


@dataclass(frozen=True, slots=True)
class Invoice:
    """An invoice with its lines; the customer may be unknown."""

    number: str
    customer_id: int | None
    country: str
    placed_at: datetime
    lines: tuple[Line, ...]


def read(path: Path = FILE) -> Iterator[Invoice]:
    """Read the invoices in the order of the file."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for number, rows in groupby(csv.DictReader(file), key=lambda row: row["InvoiceNo"]):
            yield _invoice(number, list(rows))


def _invoice(number: str, rows: list[dict[str, str]]) -> Invoice:
    first = rows[0]
    return Invoice(
        number=number,
        customer_id=int(first["CustomerID"]) if first["CustomerID"] else None,
        country=first["Country"],
        placed_at=datetime.strptime(first["InvoiceDate"], "%m/%d/%Y %H:%M"),
        lines=tuple(_line(row) for row in rows),
    )


def _line(row: dict[str, str]) -> Line:
    return Line(
        product_code=row["StockCode"],
        description=row["Description"].strip(),
        quantity=int(row["Quantity"]),
        unit_pence=int(Decimal(row["UnitPrice"]) * 100),
    )
