"""`retry`, `rewind`, `fork` and `delete` of workflows that are really executed, in each of the ways there are."""

from __future__ import annotations

from collections import Counter
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from sqla_durable import Step, Workflow, WorkflowStatus, manage
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.shells import Shell
from tests.acceptance.test_cancelling import WORKERS, Gate, gated
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells


class Bank:
    """Steps that write and count, and a bank that may be closed."""

    def __init__(self, app: Application) -> None:
        self.calls: Counter[str] = Counter()
        self.closed = False
        self.reserve = app.transactional(self._reserve, name="reserve")
        self.charge = app.plain(self._charge, name="charge")
        self.ship = app.transactional(self._ship, name="ship")

    def _reserve(self, session: Session, item: str) -> str:
        self.calls["reserve"] += 1
        session.add(Entry(account=f"reserved {item}", cents=1))
        return f"{item} reserved"

    def _charge(self, cents: int) -> int:
        self.calls["charge"] += 1
        if self.closed:
            raise ConnectionError("the bank is closed")
        return cents

    def _ship(self, session: Session, item: str) -> str:
        self.calls["ship"] += 1
        session.add(Entry(account=f"shipped {item}", cents=1))
        return f"{item} shipped"


def checkout_of(app: Application, bank: Bank) -> AnyWorkflow[..., list[Any]]:
    async def checkout(item: str = "tea", cents: int = 5) -> list[Any]:
        return [await bank.reserve(item), await bank.charge(cents), await bank.ship(item)]

    return app.workflow(checkout)


def accounts(shell: Shell) -> list[str]:
    with shell.sessionmaker() as session:
        return sorted(session.scalars(select(Entry.account)))


def only(shell: Shell) -> UUID:
    with shell.sessionmaker() as session:
        return session.scalars(select(Workflow.id).where(Workflow.forked_from.is_(None))).one()


def test_a_failed_workflow_is_retried_from_the_step_that_failed(shell: Shell, app: Application) -> None:
    # behaviour: M1
    bank = Bank(app)
    checkout = checkout_of(app, bank)
    bank.closed = True
    with pytest.raises(ConnectionError):
        shell.run(checkout)
    workflow_id = only(shell)
    bank.closed = False
    with shell.sessionmaker.begin() as session:
        assert manage.retry(session, workflow_id) == [workflow_id]
    assert shell.finish(checkout, workflow_id) == ["tea reserved", 5, "tea shipped"]
    assert bank.calls == {"reserve": 1, "charge": 2, "ship": 1}
    assert accounts(shell) == ["reserved tea", "shipped tea"]
    record = shell.one(workflow_id)
    assert [(each.key, each.attempt) for each in record.steps] == [("reserve", 1), ("charge", 2), ("ship", 2)]


def test_a_finished_workflow_is_rewound_and_executes_the_rest_again(shell: Shell, app: Application) -> None:
    # behaviour: M1
    bank = Bank(app)
    checkout = checkout_of(app, bank)
    shell.run(checkout)
    workflow_id = only(shell)
    with shell.sessionmaker.begin() as session:
        assert manage.rewind(session, workflow_id, to_step="charge") == [workflow_id]
    assert shell.finish(checkout, workflow_id) == ["tea reserved", 5, "tea shipped"]
    assert bank.calls == {"reserve": 1, "charge": 2, "ship": 2}
    assert accounts(shell) == ["reserved tea", "shipped tea", "shipped tea"], "what was written stands"


def test_a_fork_goes_its_own_way_from_a_step(shell: Shell, app: Application) -> None:
    # behaviour: M1 M2
    bank = Bank(app)
    checkout = checkout_of(app, bank)
    shell.run(checkout)
    original = only(shell)
    with shell.sessionmaker.begin() as session:
        made = manage.fork(session, original, from_step="ship", input={"item": "milk"}, outcomes={"charge": 9}).id
    assert shell.finish(checkout, made) == ["tea reserved", 9, "milk shipped"]
    assert bank.calls == {"reserve": 1, "charge": 1, "ship": 2}
    assert shell.one(original).output == ["tea reserved", 5, "tea shipped"]


def test_a_finished_workflow_is_deleted_with_its_history_and_not_its_business(shell: Shell, app: Application) -> None:
    # behaviour: M1
    shell.run(checkout_of(app, Bank(app)))
    workflow_id = only(shell)
    with shell.sessionmaker.begin() as session:
        assert manage.delete(session, workflow_id) == [workflow_id]
    with shell.sessionmaker() as session:
        assert (session.scalars(select(Workflow)).all(), session.scalars(select(Step)).all()) == ([], [])
    assert accounts(shell) == ["reserved tea", "shipped tea"]


def test_a_step_uses_the_verbs_in_its_own_transaction(shell: Shell, app: Application) -> None:
    # behaviour: M1
    bank = Bank(app)
    checkout = checkout_of(app, bank)
    shell.run(checkout)
    original = only(shell)

    def tidy(session: Session) -> list[int]:
        made = manage.fork(session, original, from_step="ship").id
        done = [
            manage.rewind(session, made, to_step="charge"),
            manage.cancel(session, made),
            manage.delete(session, made),
        ]
        return [len(each) for each in done]

    step = app.transactional(tidy)

    async def maintain() -> list[int]:
        return await step()

    assert shell.run(app.workflow(maintain)) == [1, 1, 1]
    with shell.sessionmaker() as session:
        assert sorted(session.scalars(select(Workflow.name))) == ["checkout", "maintain"]


@pytest.mark.shells(WORKERS)
@pytest.mark.parametrize("kind", ["plain", "transactional"])
def test_a_workflow_that_is_rewound_while_it_runs_commits_nothing_of_its_old_attempt(
    shell: Shell, app: Application, kind: str
) -> None:
    # behaviour: M1 T1
    gate = Gate()
    paying = gated(app, gate, kind)
    with shell.background():
        with shell.sessionmaker.begin() as session:
            workflow_id = paying.start(session).id
        assert gate.entered.wait(30)
        with shell.sessionmaker.begin() as session:
            assert manage.rewind(session, workflow_id, to_step="first") == [workflow_id]
        gate.open.set()
        assert shell.result(paying, workflow_id) == 2
    record = shell.one(workflow_id)
    assert (record.status, record.attempt) == (WorkflowStatus.SUCCEEDED, 2)
    assert [(each.key, each.attempt) for each in record.steps] == [("first", 2), ("gate", 2)]
    assert accounts(shell) == ([] if kind == "plain" else ["gate"])


@pytest.mark.shells(WORKERS)
def test_a_workflow_that_runs_is_forked_and_goes_on(shell: Shell, app: Application) -> None:
    # behaviour: M1
    gate = Gate()
    paying = gated(app, gate, "plain")
    with shell.background():
        with shell.sessionmaker.begin() as session:
            workflow_id = paying.start(session).id
        assert gate.entered.wait(30)
        with shell.sessionmaker.begin() as session:
            made = manage.fork(session, workflow_id, outcomes={"first": 7}).id
        gate.open.set()
        assert {shell.result(paying, workflow_id), shell.result(paying, made)} == {1, 2}
    assert {each.key: each.output for each in shell.one(made).steps}["first"] == 7
