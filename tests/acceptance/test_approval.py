"""The story of an approval that takes two weeks: reminders, an escalation, and a decision, while nothing runs."""

from __future__ import annotations

import inspect
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy.orm import Session

from sqla_durable import WorkflowStatus, errors
from sqla_durable.testing import advance
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.store import races
from tests.support.domain import Entry

WEEK = timedelta(days=7)


async def awaited(outcome: Any) -> Any:
    """Return the outcome of an operation, in either form."""
    return await outcome if inspect.isawaitable(outcome) else outcome


@pytest.mark.shells(("worker", "async-worker", "asyncpg-worker", "mixed-worker"))
def test_approval_waits_for_two_weeks(shell: Shell, app: Application) -> None:
    # behaviour: C1 C7
    sent: list[str] = []

    def send(to: str) -> None:
        sent.append(to)

    remind = app.plain(send)

    def book(session: Session, cents: int) -> int:
        session.add(Entry(account="expense", cents=cents, note=None))
        return cents

    step = app.transactional(book)

    async def expense(cents: int) -> str:
        for to in ("manager", "manager's manager"):
            await remind(to)
            try:
                approved = await awaited(either.wait_signal("decision", bool, timeout=WEEK))
            except errors.WaitTimeoutError:
                continue
            return f"booked {await step(cents)}" if approved else "refused"
        return "nobody cared"

    workflow = app.workflow(expense)
    decided, ignored = shell.begin(workflow, 500), shell.begin(workflow, 700)
    for week in (1, 2):
        with shell.background():  # a worker that lives for a moment of each week
            races.wait_until(partial(_both_wait, shell, (decided, ignored), week), what=f"week {week}")
        with shell.sessionmaker.begin() as session:
            advance(session, WEEK if week == 1 else WEEK / 2)
    with shell.client() as client:
        client.signal(decided, "decision", True)
        client.commit()
    with shell.sessionmaker.begin() as session:
        advance(session, WEEK / 2)
    with shell.background():
        assert shell.result(workflow, decided) == "booked 500"
        assert shell.result(workflow, ignored) == "nobody cared"
    assert sorted(sent) == ["manager", "manager", "manager's manager", "manager's manager"]


def _both_wait(shell: Shell, ids: tuple[Any, ...], week: int) -> bool:
    return all(_waits(shell, each, week) for each in ids)


def _waits(shell: Shell, workflow_id: Any, week: int) -> bool:
    record = shell.one(workflow_id)
    waiting = [each for each in record.steps if each.name == "signal:decision"]
    return record.status is WorkflowStatus.SUSPENDED and len(waiting) == week
