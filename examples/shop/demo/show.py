"""The story of the demo: import, work, kill, call off, go on, and check every invoice."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from shop.demo import actual
from shop.demo.errors import DemoError
from shop.demo.expected import expected, lines_of_orders, numbers
from shop.demo.facts import Facts, differences, settled
from shop.demo.mishaps import CallingOff, Mishap, choose
from shop.demo.processes import Processes
from shop.demo.server import database
from shop.demo.summary import Run, print_numbers, print_query
from shop.importer import import_catalogue, place
from shop.invoices import Invoice, read

_DEADLINE = 600
_POLL = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run of the demo does.

    Attributes:
        invoices: how many of the file's invoices, spread evenly over it.
        workers: how many worker processes run at once.
        kills: how often one of them is killed.
        seed: decides when, which, and how the payment service fails.
        database: the name of the database that is made for it.
    """

    invoices: int
    workers: int
    kills: int
    seed: int
    database: str

    def chosen(self) -> list[str]:
        """Give the numbers of the invoices."""
        known = numbers()
        return [known[index * len(known) // self.invoices] for index in range(min(self.invoices, len(known)))]


def show(plan: Plan, console: Console) -> list[str]:
    """Run the demo; give what is not as the file says, which is nothing.

    Raises:
        DemoError: it could not be run to its end.
    """
    console.print("Starting PostgreSQL, migrating the shop's database, starting the payment service …")
    with (
        database(plan.database) as url,
        tempfile.TemporaryDirectory(prefix="shop-demo-") as logs,
        Processes(url, Path(logs), seed=plan.seed) as processes,
    ):
        processes.migrate()
        payments = processes.start_payment_service(seed=plan.seed)
        engine = create_engine(url)
        try:
            return _Show(plan, console, processes, sessionmaker(engine)).run(payments)
        finally:
            engine.dispose()


class _Show:
    def __init__(self, plan: Plan, console: Console, processes: Processes, sessions: sessionmaker[Session]) -> None:
        self._plan = plan
        self._console = console
        self._processes = processes
        self._sessions = sessions
        self._chosen = plan.chosen()
        self._mishaps: list[Mishap] = choose(lines_of_orders(self._chosen), seed=plan.seed)
        self._calling_off = CallingOff(self._mishaps)

    def run(self, payments: str) -> list[str]:
        """Import and execute everything; give the differences."""
        began = time.monotonic()
        with self._bars() as bars:
            self._import(bars)
            for _ in range(self._plan.workers):
                self._processes.start_worker()
            self._watch(bars)
        seconds = time.monotonic() - began
        self._processes.stop_workers()
        ledger = actual.read_ledger(payments)
        with self._sessions() as session:
            facts = actual.actual(session, ledger)
            run = Run(facts, ledger, actual.recovery(session), self._mishaps, self._processes.kills, seconds)
            self._console.print("\nOrders, their workflows and their steps, in one query:\n")
            print_query(self._console, session, rows=5)
        print_numbers(self._console, run)
        called_off = self._calling_off.called_off
        return differences(expected(self._chosen, self._mishaps, called_off), settled(facts, called_off))

    def _bars(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )

    def _import(self, bars: Progress) -> None:
        """Place the orders, each with its workflow in one transaction."""
        invoices = self._invoices()
        bar = bars.add_task("imported", total=len(invoices), note="")
        with self._sessions.begin() as session:
            import_catalogue(session, invoices)
        for invoice in invoices:
            with self._sessions.begin() as session:
                place(session, invoice)
            bars.advance(bar)

    def _invoices(self) -> list[Invoice]:
        """Read the chosen invoices; what goes wrong comes after its original."""
        chosen, spoilt = set(self._chosen), {each.original: each for each in self._mishaps}
        found: list[Invoice] = []
        for invoice in read():
            found += [invoice] if invoice.number in chosen else []
            found += [spoilt[invoice.number].spoilt(invoice)] if invoice.number in spoilt else []
        return found

    def _watch(self, bars: Progress) -> None:
        """Follow the workers to the end of the last workflow, and kill some of them on the way."""
        count = len(self._chosen) + len(self._mishaps)
        total = _steps(expected(self._chosen, self._mishaps))
        steps = bars.add_task("steps", total=total, note="")
        done = bars.add_task("workflows", total=count, note="")
        kill_at = self._moments(total)
        deadline = time.monotonic() + _DEADLINE
        while True:
            with self._sessions() as session:
                now = actual.progress(session)
            if kill_at and now.steps >= kill_at[0] and self._processes.kill_one_of(now.busy):
                kill_at.pop(0)
            self._calling_off.look(self._sessions)
            bars.update(steps, completed=now.steps, note=f"workers killed: {self._processes.kills}")
            bars.update(done, completed=now.finished, note=f"undone: {now.undone}")
            if now.finished >= count:
                return
            self._processes.require_alive()
            if time.monotonic() > deadline:
                raise DemoError(f"not done after {_DEADLINE} s:\n{self._processes.tails()}")
            time.sleep(_POLL)

    def _moments(self, total: int) -> list[int]:
        """Choose after how many steps a worker is killed."""
        middle: Sequence[int] = range(total // 20, total * 9 // 10)
        return sorted(random.Random(self._plan.seed).sample(middle, self._plan.kills))


def _steps(facts: Facts) -> int:
    return sum(int(count or 0) for _, count in facts["steps"].elements())
