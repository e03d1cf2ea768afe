"""The ledger of `survivors`: what was started, what is done, and whether all of it is true."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Engine, Select, func, select
from sqlalchemy.orm import Session, selectinload

from sqla_durable import Workflow, WorkflowStatus, models
from tests.crash.survivors import ACKNOWLEDGED, ARRIVED, ROUNDS
from tests.store import races
from tests.support.domain import Entry

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Written:
    """What a step wrote down: the value that it was passed, and the one that it returned."""

    ground: str
    value: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the workflows, when nothing of it is wrong.

    Attributes:
        workflows: how many there are, each finished, each effect of its transactional steps there once.
        repeated: how many of their plain steps were executed more than once.
        reclaimed: how many of them needed more than one attempt.
    """

    workflows: int
    repeated: int
    reclaimed: int


def start(engine: Engine, forms: Iterable[str], *, account: str = "free") -> list[UUID]:
    """Start a workflow of each form, on accounts of their own."""
    with Session(engine) as session:
        records = [Workflow(name=form) for form in forms]
        session.add_all(records)
        session.flush()
        for each in records:
            each.input = {"account": f"{account} {each.id}"}
        session.commit()
        return [each.id for each in records]


def wait_for_workers(engine: Engine, count: int) -> None:
    """Wait until so many workers have begun."""
    statement = select(func.count()).select_from(models.Worker)
    races.wait_until(lambda: _scalar(engine, statement) == count, what=f"{count} workers", seconds=20)


def wait_for_arrivals(outside: Engine, count: int) -> None:
    """Wait until so many steps wait at the gate."""
    statement = select(func.count(func.distinct(Entry.note))).where(Entry.account == ARRIVED)
    races.wait_until(lambda: _scalar(outside, statement) == count, what=f"{count} steps at the gate", seconds=20)


def finished(engine: Engine, workflow_id: UUID) -> bool:
    """Return whether a workflow is finished."""
    statement = select(Workflow.finished_at.is_not(None)).where(Workflow.id == workflow_id)
    return _scalar(engine, statement)


def unfinished(engine: Engine) -> int:
    """Count the workflows that are not finished."""
    return _scalar(engine, select(func.count()).where(Workflow.finished_at.is_(None)))


def acknowledged(outside: Engine) -> set[str]:
    """Return the accounts whose start was acknowledged to the client."""
    with Session(outside) as session:
        return {str(note) for note in session.scalars(select(Entry.note).where(Entry.account == ACKNOWLEDGED))}


def check(engine: Engine, outside: Engine) -> Verdict:
    """Prove that nothing was lost, nothing applied twice, and nothing done on a ground that history does not know."""
    with Session(engine) as session:
        workflows = list(session.scalars(select(Workflow).options(selectinload(Workflow.steps))))
        credited = _written(session.scalars(select(Entry)))
    with Session(outside) as session:
        called = _written(session.scalars(select(Entry).where(Entry.account.not_in([ARRIVED, ACKNOWLEDGED]))))
    for each in workflows:
        _check_one(each, credited, called)
    accounts = {f"{each.input['account']}/{number}" for each in workflows for number in range(ROUNDS)}
    assert credited.keys() == accounts, "effects of a workflow that is not there"
    assert called.keys() == accounts, "called of a workflow that is not there"
    return Verdict(
        workflows=len(workflows),
        repeated=sum(len(each) > 1 for each in called.values()),
        reclaimed=sum(each.attempt > 1 for each in workflows),
    )


def _check_one(workflow: Workflow, credited: dict[str, list[Written]], called: dict[str, list[Written]]) -> None:
    assert workflow.status is WorkflowStatus.SUCCEEDED, (workflow, workflow.error)
    account = workflow.input["account"]
    written = [side[f"{account}/{number}"] for number in range(ROUNDS) for side in (credited, called)]
    recorded = [str(step.output) for step in workflow.steps]
    assert len(recorded) == 2 * ROUNDS
    assert workflow.output == recorded[-1]
    for number, (ground, value) in enumerate(pairwise(["nothing", *recorded])):
        transactional = number % 2 == 0
        assert len(written[number]) == 1 or not transactional, f"{account}: an effect of step {number} came twice"
        assert {each.ground for each in written[number]} == {ground}, f"{account}: the ground of step {number} was lost"
        assert value in {each.value for each in written[number]}, f"{account}: no such value of step {number}"


def _written(entries: Iterable[Entry]) -> dict[str, list[Written]]:
    written: defaultdict[str, list[Written]] = defaultdict(list)
    for each in entries:
        written[each.account].append(Written(*str(each.note).split()))
    return written


def _scalar(engine: Engine, statement: Select[T]) -> T:
    with Session(engine) as session:
        return session.execute(statement).scalar_one()
