"""What must be true in the end, read from the domain tables and from the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from uuid import UUID

from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session, selectinload

from sqla_durable import Workflow, WorkflowStatus
from tests.crash.application import HISTORY, ROUNDS
from tests.store import races
from tests.support.domain import Entry


def start(engine: Engine, names: Iterable[str]) -> list[UUID]:
    """Start workflows of these names; each has an account of its own."""
    with Session(engine) as session:
        records = [Workflow(name=name) for name in names]
        session.add_all(records)
        session.flush()
        for each in records:
            each.input = {"account": str(each.id)}
        session.commit()
        return [each.id for each in records]


def wait_until_finished(engine: Engine, seconds: float = 30.0) -> None:
    """Wait until no workflow is left that is not finished; what waits after several crashes need not wait."""
    statement = select(func.count()).where(Workflow.finished_at.is_(None))
    suspended = update(Workflow).where(Workflow.wake_at > func.statement_timestamp())

    def none_left() -> bool:
        with Session(engine) as session, session.begin():
            session.execute(suspended.values(wake_at=func.statement_timestamp()))
            return session.scalar(statement) == 0

    races.wait_until(none_left, what="the end of every workflow", seconds=seconds)


def check_transfers(engine: Engine) -> list[Workflow]:
    """Prove that every transfer is whole: each credit once, each call at least once and under one key."""
    with Session(engine) as session:
        workflows = list(session.scalars(select(Workflow).options(selectinload(Workflow.steps))))
        entries = session.scalars(select(Entry)).all()
    assert {each.id: each.error for each in workflows if each.status is not WorkflowStatus.SUCCEEDED} == {}
    credited = Counter(each.account for each in entries if each.note is None)
    accounts = {f"{each.id}/{number}" for each in workflows for number in range(ROUNDS)}
    assert credited == Counter(dict.fromkeys(accounts, 1))
    calls = {(each.account, each.note) for each in entries if each.note is not None}
    assert sorted(account for account, _ in calls) == sorted(accounts), "a call's idempotency key changed"
    for each in workflows:
        assert [step.key for step in each.steps] == HISTORY(each.name)
        assert [step.position for step in each.steps] == list(range(1, 2 * ROUNDS + 1))
        assert {step.attempt for step in each.steps} <= set(range(1, each.attempt + 1))
        assert each.output == [f"{each.id}/{number}" for number in range(ROUNDS) for _ in range(2)]
    assert all(note.endswith(f"/{_call_key(account, workflows)}") for account, note in calls if note)
    return workflows


def _call_key(account: str, workflows: list[Workflow]) -> str:
    workflow_id, _, number = account.partition("/")
    (workflow,) = (each for each in workflows if str(each.id) == workflow_id)
    return HISTORY(workflow.name)[2 * int(number) + 1]


def end_state(session: Session, workflow_id: UUID) -> tuple[object, ...]:
    """Return what a small workflow has left behind, without the times and the attempts."""
    workflow = session.get_one(Workflow, workflow_id)
    account = workflow.input["account"]
    entries = session.scalars(select(Entry).where(Entry.account.startswith(account), Entry.note.is_(None))).all()
    called = session.scalars(select(Entry.note).where(Entry.account.startswith(account), Entry.note.is_not(None)))
    return (
        workflow.status,
        str(workflow.output).removeprefix(account),
        [(each.key, each.position, each.status, str(each.output).removeprefix(account)) for each in workflow.steps],
        sorted((each.account.removeprefix(account), each.cents) for each in entries),
        sorted({str(note).removeprefix(str(workflow_id)) for note in called}),
    )
