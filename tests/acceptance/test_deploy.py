"""A deploy under a hundred running workflows: it adds, removes and renames a step, and old workers go on beside it."""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import create_engine, func, make_url, select, update
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Step, Worker, Workflow, WorkflowStatus, current, patched, start_many
from sqla_durable.testing import export, replay
from tests.acceptance.application import Application, Called, Form
from tests.acceptance.shells import POLL
from tests.store.races import wait_until
from tests.support.domain import Entry
from tests.support.processes import forked

COUNT = 100
STOPS = ("reserve", "notify", "charge", "ship")
"""The steps of the old code; a workflow holds after one of them until the gate is open."""


class NotYet(Exception):
    """What the workflow waits for is not there at the first try."""


def wait() -> None:
    execution = current()
    if execution is None or execution.try_number == 1:
        raise NotYet


class Shop:
    """The application in one of its two states. Every step writes down who it was called for, exactly once."""

    def __init__(self, deploy: str, form: Form) -> None:
        self.app = Application(form, Durable(version=deploy))
        self.reserve = self._step("reserve")
        self.notify = self._step("notify")
        self.charge = self._step("charge")
        self.charge_card = self._step("charge_card")
        self.check_fraud = self._step("check_fraud")
        self.ship = self._step("ship")
        self.wait = self.app.plain(wait, wait=tenacity.wait_fixed(3600))
        checkout = self.old_checkout if deploy == "old" else self.new_checkout

        async def bound(number: int) -> str:
            return await checkout(number)

        self.checkout = self.app.workflow(bound, name="checkout")

    async def old_checkout(self, number: int) -> str:
        for name, step in zip(STOPS, (self.reserve, self.notify, self.charge, self.ship), strict=True):
            await step(number)
            if name == STOPS[number % len(STOPS)]:
                await self.wait()
        return f"old {number}"

    async def new_checkout(self, number: int) -> str:
        stop = STOPS[number % len(STOPS)]
        await self.reserve(number)
        if stop == "reserve":
            await self.wait()
        # `notify` is removed.
        if stop == "notify":
            await self.wait()
        if patched("check fraud"):  # added: for those that have not been charged
            await self.check_fraud(number)
        await self.charge_card.options(step_key="charge")(number)  # renamed: under the key that it had
        if stop == "charge":
            await self.wait()
        await self.ship(number)
        if stop == "ship":
            await self.wait()
        return f"new {number}"

    def _step(self, name: str) -> Called[[int], None]:
        def write(session: Session, number: int) -> None:
            session.add(Entry(account=name, cents=number))

        write.__name__ = write.__qualname__ = name
        return self.app.transactional(write)


def _work(url: str, deploy: str, form: Form, log_file: str) -> None:
    logging.basicConfig(filename=log_file, level=logging.WARNING, format="%(name)s %(message)s")
    maker = sessionmaker(create_engine(url))
    on_loop = create_async_engine(make_url(url).set(drivername="postgresql+psycopg"))
    durable = Shop(deploy, form).app.durable
    Worker(durable, sessionmaker=maker, async_sessionmaker=async_sessionmaker(on_loop), poll_interval=POLL).run()


@contextmanager
def worker(url: str, deploy: str, form: Form, log_file: Path) -> Generator[BaseProcess]:
    """A worker of a deploy in a process of its own, stopped in good order at the end."""
    process = forked.Process(target=_work, args=(url, deploy, form, str(log_file)), daemon=True)
    process.start()
    try:
        yield process
        stop(process)
    finally:
        process.kill()
        process.join()


def stop(process: BaseProcess) -> None:
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0


def suspended_count(maker: sessionmaker[Session]) -> int:
    with maker() as session:
        waiting = select(func.count()).select_from(Workflow).join(Workflow.steps).where(Step.key == "wait")
        return session.scalars(waiting.where(Workflow.status == WorkflowStatus.SUSPENDED)).one()


def wake(maker: sessionmaker[Session]) -> None:
    """Let the hour pass for which they wait."""
    with maker.begin() as session:
        due = {"wake_at": func.statement_timestamp()}
        later = func.statement_timestamp() + timedelta(minutes=1)
        suspended = select(Workflow.id).where(Workflow.status == WorkflowStatus.SUSPENDED, Workflow.wake_at > later)
        ids = session.scalars(suspended.order_by(Workflow.id).with_for_update(key_share=True)).all()
        session.execute(update(Step).where(Step.workflow_id.in_(ids), Step.wake_at > later).values(due))
        session.execute(update(Workflow).where(Workflow.id.in_(ids)).values(due))


def all_ended(maker: sessionmaker[Session]) -> bool:
    wake(maker)
    with maker() as session:
        return not session.scalars(select(Workflow.id).where(Workflow.finished_at.is_(None)).limit(1)).all()


def start(maker: sessionmaker[Session], shop: Shop, numbers: range) -> dict[int, UUID]:
    with maker.begin() as session:
        return dict(zip(numbers, start_many(session, [shop.checkout.bind(each) for each in numbers]), strict=True))


def done(maker: sessionmaker[Session]) -> Counter[tuple[str, int]]:
    with maker() as session:
        return Counter((each.account, each.cents) for each in session.scalars(select(Entry)))


def outputs(maker: sessionmaker[Session]) -> dict[int, object]:
    with maker() as session:
        return {each.input["number"]: each.output for each in session.scalars(select(Workflow))}


in_sync = pytest.mark.parametrize("form", [Form.SYNC], ids=["sync"])
in_async = pytest.mark.parametrize("form", [Form.ASYNC], ids=["async"])


# behaviour: X6
@in_async
def test_a_deploy_adds_removes_and_renames_a_step_under_a_hundred_running_workflows(
    session_factory: sessionmaker[Session], database_url: str, form: Form, tmp_path: Path
) -> None:
    log_file = tmp_path / "new.log"
    started = start(session_factory, Shop("old", form), range(COUNT))
    with worker(database_url, "old", form, tmp_path / "old.log"):
        wait_until(lambda: suspended_count(session_factory) == COUNT, what="a hundred waiting workflows", seconds=60)

    # Before the deploy, its code is tried on what is there.
    with session_factory() as session:
        histories = export(session, select(Workflow))
    reports = [replay(Shop("new", form).checkout, each) for each in histories]
    predicted = {each.workflow_id: str(each) for each in reports if not each.fits}

    with worker(database_url, "new", form, log_file):
        wait_until(lambda: all_ended(session_factory), what="a hundred finished workflows", seconds=60)

    assert outputs(session_factory) == {number: f"new {number}" for number in range(COUNT)}
    expected = {
        "reserve": range(COUNT),
        "notify": [number for number in range(COUNT) if number % 4 >= 1],
        "charge": [number for number in range(COUNT) if number % 4 >= 2],
        "charge_card": [number for number in range(COUNT) if number % 4 < 2],
        "check_fraud": [number for number in range(COUNT) if number % 4 == 0],
        "ship": range(COUNT),
    }
    assert done(session_factory) == Counter((name, each) for name, numbers in expected.items() for each in numbers)
    assert (tmp_path / "old.log").read_text() == ""
    reported = log_file.read_text()
    for number, workflow_id in started.items():
        lines = [line for line in reported.splitlines() if str(workflow_id) in line]
        assert (len(lines), workflow_id in predicted) == ((0, False) if number % 4 == 0 else (1, True))
        assert number % 4 == 0 or "recorded and not visited: 'notify'" in lines[0]
        assert ("'charge' was recorded by step 'charge' and is now 'charge_card'" in "".join(lines)) == (number % 4 > 1)
        assert number % 4 == 0 or "'notify'" in predicted[workflow_id]


# behaviour: X6
@in_sync
def test_workers_of_both_deploys_go_on_with_each_others_workflows(
    session_factory: sessionmaker[Session], database_url: str, form: Form, tmp_path: Path
) -> None:
    with worker(database_url, "old", form, tmp_path / "old.log") as old:
        start(session_factory, Shop("old", form), range(COUNT // 2))
        wait_until(lambda: suspended_count(session_factory) == COUNT // 2, what="the old workflows to wait", seconds=60)
        with worker(database_url, "new", form, tmp_path / "new.log"):
            start(session_factory, Shop("new", form), range(COUNT // 2, COUNT))
            wake(session_factory)
            wait_until(
                lambda: done(session_factory)["reserve", COUNT - 1] == 1, what="the new workflows to begin", seconds=60
            )
            stop(old)
            wait_until(lambda: all_ended(session_factory), what="all to finish", seconds=60)

    entries = done(session_factory)
    assert max(entries.values()) == 1
    ended = outputs(session_factory)
    assert set(ended) == set(range(COUNT))
    for number in range(COUNT):
        assert ended[number] in (f"old {number}", f"new {number}")
        assert entries["reserve", number] == entries["ship", number] == 1
        assert entries["charge", number] + entries["charge_card", number] == 1
