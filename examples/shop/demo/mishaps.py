"""Orders that go wrong on purpose: copies of real ones, each with a fate, placed among the others.

Of each the demo knows what must be left: nothing. One that is called off too late is shipped like any other.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from shop import call_off
from shop.invoices import Invoice
from shop.models import Order
from sqla_durable import Step

_LINES = range(5, 13)
_MORE_THAN_THERE_IS = 100_000
_NOWHERE = "Atlantis"


class Fate(StrEnum):
    """What happens to an order on its way."""

    SOLD_OUT = "sold out"
    NO_CARRIER = "no carrier"
    CALLED_OFF = "called off"


@dataclass(frozen=True, slots=True)
class Mishap:
    """A copy of an invoice, under a number of its own; `number` is that of the copy."""

    original: str
    fate: Fate

    @property
    def number(self) -> str:
        return f"X{self.original}"

    def spoilt(self, invoice: Invoice) -> Invoice:
        """Make the copy."""
        copy = replace(invoice, number=self.number)
        match self.fate:
            case Fate.SOLD_OUT:
                return replace(copy, lines=(*copy.lines[:-1], replace(copy.lines[-1], quantity=_MORE_THAN_THERE_IS)))
            case Fate.NO_CARRIER:
                return replace(copy, country=_NOWHERE)
            case Fate.CALLED_OFF:
                return copy


def choose(lines: Mapping[str, int], *, seed: int) -> list[Mishap]:
    """Choose some of the orders to be copied, given how many lines each has; as many for each fate."""
    fitting = [number for number, count in lines.items() if count in _LINES]
    each = min(len(lines) // 64 + 1, len(fitting) // len(Fate))
    chosen = random.Random(seed).sample(fitting, each * len(Fate))
    return [Mishap(number, fate) for number, fate in zip(chosen, [*Fate] * each, strict=True)]


class CallingOff:
    """Calls orders off while they are carried out: each after another number of its steps."""

    def __init__(self, mishaps: Sequence[Mishap]) -> None:
        waiting = [each.number for each in mishaps if each.fate is Fate.CALLED_OFF]
        self._after = {number: 2 + (2 * index) % _LINES.stop for index, number in enumerate(waiting)}
        self.called_off: set[str] = set()

    def look(self, sessions: sessionmaker[Session]) -> None:
        """Call off those whose moment has come."""
        if not self._after:
            return
        steps = select(Order.number, func.count(Step.key)).join(Order.workflow).outerjoin(Step)
        with sessions() as session:
            found = session.execute(steps.where(Order.number.in_(self._after)).group_by(Order.number)).all()
        for number, count in found:
            if count >= self._after[number]:
                del self._after[number]
                with sessions.begin() as session:
                    self.called_off |= {number} if call_off(session, number) else set()
