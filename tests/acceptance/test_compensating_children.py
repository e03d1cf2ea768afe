"""What a compensation starts comes to its end, whatever happens to the workflow meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from sqla_durable import Workflow, manage
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application, Form, drive
from tests.acceptance.shells import Shell
from tests.acceptance.test_sagas import Block, Ledger, awaited, booked
from tests.store import races
from tests.support.sampling import thorough_cases

pytestmark = pytest.mark.shells(("worker", "asyncpg-worker"))

Interrupt = Callable[[Shell, Session, UUID], None]


def again(_shell: Shell, session: Session, workflow_id: UUID) -> None:
    assert manage.cancel(session, workflow_id) == []


def selected(_shell: Shell, session: Session, workflow_id: UUID) -> None:
    assert workflow_id not in manage.cancel(session, select(Workflow).where(Workflow.name.in_(["travel", "plan"])))


def with_parent(shell: Shell, session: Session, workflow_id: UUID) -> None:
    parent_id = shell.one(workflow_id).parent_id
    assert parent_id is not None
    assert parent_id in manage.cancel(session, parent_id)


def overdue(_shell: Shell, session: Session, workflow_id: UUID) -> None:
    past = func.statement_timestamp() - timedelta(seconds=1)
    session.execute(update(Workflow).where(Workflow.id == workflow_id).values(deadline_at=past))


def first(_shell: Shell, session: Session, workflow_id: UUID) -> None:
    assert manage.cancel(session, workflow_id) == [workflow_id]


def plan(app: Application, *, way: str, fails: bool) -> AnyWorkflow[[], None]:
    """Make a workflow whose child undoes what it did by a workflow of its own, which waits."""
    ledger = Ledger(app)

    async def refund(what: str) -> None:
        await awaited(either.wait_signal("pay"))
        await ledger.undo(what)

    refunding = app.workflow(refund)

    def start_refund(session: Session) -> None:
        session.flush()
        drive(_started(refunding.start(session, "flight")))

    starting = app.transactional(start_refund)

    async def by_child() -> None:
        child = await awaited(either.start_child(refunding, "flight"))
        await awaited(child.result())

    async def by_map() -> None:
        await awaited(either.map_children(refunding, ["flight"]))

    async def by_step() -> None:
        await starting()
        await awaited(either.wait_signal("paid"))

    undo = {"child": by_child, "map": by_map, "step": by_step}[way]
    compensation: Any = undo if app.form is Form.ASYNC else (lambda: drive(undo()))

    async def travel() -> None:
        async with Block(app.form) as saga:
            await ledger.do("flight")
            saga.add(compensation)
            if fails:
                raise LookupError("hotel")
            await awaited(either.wait_signal("go"))

    travelling = app.workflow(travel)

    async def plan() -> None:
        await awaited(either.start_child(travelling.options(deadline=timedelta(hours=1))))
        await awaited(either.wait_signal("go"))

    return app.workflow(plan)


async def _started(started: Any) -> Any:
    return started


def only(shell: Shell, name: str) -> Any:
    with shell.sessionmaker() as session:
        found = session.scalars(select(Workflow).where(Workflow.name == name)).one_or_none()
        return found if found is not None and (found.awaits or found.finished_at) else None


# behaviour: M1 R7
@pytest.mark.parametrize(
    ("way", "fails", "interrupt"),
    [
        ("child", False, again),
        ("map", False, again),
        ("step", False, again),
        ("child", False, selected),
        ("child", True, first),
        ("child", True, with_parent),
        ("child", True, overdue),
        *thorough_cases([("child", False, with_parent), ("child", False, overdue), ("map", True, first)]),
    ],
)
def test_what_a_compensation_has_started_is_not_taken_from_it(
    shell: Shell, app: Application, way: str, fails: bool, interrupt: Interrupt
) -> None:
    shell.begin(plan(app, way=way, fails=fails))
    with shell.background():
        if not fails:
            travel = races.wait_until(lambda: only(shell, "travel"), what="the suspension")
            with shell.sessionmaker.begin() as session:
                manage.cancel(session, travel.id)
        refund = races.wait_until(lambda: only(shell, "refund"), what="the refund")
        with shell.sessionmaker() as session:
            travel_id = session.scalars(select(Workflow.id).where(Workflow.name == "travel")).one()
        assert refund.deadline_at is None
        with shell.sessionmaker.begin() as session:
            interrupt(shell, session, travel_id)
        with shell.client() as client:
            client.signal(refund.id, "pay")
            client.signal(travel_id, "paid")
            client.commit()
        races.wait_until(lambda: shell.one(travel_id).finished_at, what="the end of the compensations")
        races.wait_until(lambda: shell.one(refund.id).finished_at, what="the refund")
    assert booked(shell) == [("flight", 1), ("flight", -1)]
    error = shell.one(travel_id).error
    assert error is None or "CompensationFailed" not in str(error)


# behaviour: M1
def test_what_a_branch_beside_a_compensation_has_started_belongs_to_the_workflow(
    shell: Shell, app: Application
) -> None:
    undoing, started = asyncio.Event(), asyncio.Event()

    @app.durable.workflow
    async def ship() -> None: ...

    @app.durable.step
    async def undo() -> None:
        undoing.set()
        await started.wait()

    @app.durable.workflow
    async def travel() -> None:
        async def beside() -> None:
            await undoing.wait()
            await either.start_child(ship)
            started.set()

        branch = asyncio.create_task(beside())
        try:
            async with either.Saga() as saga:
                saga.add(undo)
                raise LookupError("hotel")
        finally:
            await branch

    workflow_id = shell.begin(travel)
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).finished_at, what="the end of the workflow")
    with shell.sessionmaker() as session:
        assert not session.scalars(select(Workflow).where(Workflow.name == "ship")).one().detached
