"""Crash everywhere: one run for each point before, inside and after each commit; the end state is always the same."""

from __future__ import annotations

import signal
from functools import partial
from itertools import count
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqla_durable import Executor, Workflow, send_update, start_with_update
from sqla_durable.testing import CrashPoint, Moment, crash_everywhere, forking
from tests.crash import application, child, ledger
from tests.store import races
from tests.support import processes
from tests.support.domain import Entry
from tests.support.sampling import thorough_cases

pytestmark = pytest.mark.usefixtures("crash_url")


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork servers need not import everything."""
    monkeypatch.setattr(forking, "NEW_PROCESS", processes.inheriting)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("workflow", [application.small], ids=lambda each: each.name)
def test_a_worker_that_dies_around_any_commit_leaves_the_same_end_state(
    database_url: str, engine: Engine, workflow: Any, thorough: bool
) -> None:
    """By default before each commit; inside them are the next two tests, after them that of the worker as successor."""
    moments = list(Moment) if thorough else [Moment.BEFORE]
    report = crash_everywhere(
        child.make_worker,
        database_url,
        start=lambda session: workflow.start(session, str(uuid4())),
        end_state=lambda session, record: ledger.end_state(session, record.id),
        moments=moments,
    )
    assert report.points >= 4 * len(moments), "claim, three operations and the outcome have at least four commits"


def test_a_worker_that_dies_in_any_commit_answers_an_update_once(database_url: str, engine: Engine) -> None:
    # behaviour: E8

    def start(session: Session) -> Workflow:
        record, _ = start_with_update(session, application.asked.bind(str(uuid4())), "credit", -1)
        send_update(session, record, "credit", 5)
        send_update(session, record, "credit", 6)
        return record

    def end_state(session: Session, record: Workflow) -> object:
        credited = session.scalars(select(Entry.cents).where(Entry.account == record.input["account"])).all()
        return [each.value for each in record.events], [each.consumed_by for each in record.signals], list(credited)

    report = crash_everywhere(
        child.make_worker, database_url, start=start, end_state=end_state, moments=[Moment.INSIDE]
    )
    answers = [{"refused": "it was refused"}, {"reply": 5}]
    assert report.end_state.domain == (answers, ["#refused", "update:credit", None], [5])
    assert report.points >= 4, "claim, refusal, taking and the answer have a commit each"


# behaviour: S7
@pytest.mark.timeout(400)
@pytest.mark.parametrize("workflow", [application.forked_async], ids=lambda each: each.name)
def test_a_worker_that_dies_around_any_commit_of_a_branch_leaves_the_same_end_state(
    database_url: str, engine: Engine, workflow: Any, thorough: bool
) -> None:
    """The order in which the branches have called their steps may differ, and nothing else."""

    def end_state(session: Session, record: Workflow) -> object:
        *before, history, credited, calls = ledger.end_state(session, record.id)
        steps = cast("list[tuple[Any, ...]]", history)
        return *map(str, before[:1]), sorted((key, str(status)) for key, _, status, _ in steps), credited, calls

    moments = list(Moment) if thorough else [Moment.INSIDE]
    report = crash_everywhere(
        child.make_worker,
        database_url,
        start=lambda session: workflow.start(session, str(uuid4())),
        end_state=end_state,
        moments=moments,
    )
    assert report.points >= 4 * len(moments)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("successor", "moment"),
    [
        ("executor", Moment.INSIDE),
        ("worker", Moment.AFTER),
        *thorough_cases(
            [
                ("executor", Moment.BEFORE),
                ("executor", Moment.AFTER),
                ("worker", Moment.BEFORE),
                ("worker", Moment.INSIDE),
            ]
        ),
    ],
)
def test_an_executor_that_dies_around_any_commit_is_taken_up(
    database_url: str, engine: Engine, moment: Moment, successor: str
) -> None:
    """By another run with the same key, or by a worker of its queue, once the lease has run out."""
    ends: list[tuple[object, ...]] = []
    for commit in count(1):
        key = f"{moment}-{commit}"
        with child.executor(database_url, child.Plan(point=CrashPoint(commit, moment)), key) as process:
            process.join(30)
            died = process.exitcode == -signal.SIGKILL
            assert died or process.exitcode == 0
        races.expire_leases(engine)
        if successor == "worker" and _id_of(engine, key) is not None:
            with child.worker(database_url):
                races.wait_until(partial(_finished, engine, _require(_id_of(engine, key))))
        with Session(engine) as session:
            assert Executor(session).run(application.small.options(key=key), key) == f"{key}/1"
        with Session(engine) as session:
            ends.append(ledger.end_state(session, _require(_id_of(engine, key))))
        if not died:
            break
    assert len(ends) >= 6
    assert all(end == ends[-1] for end in ends)


def _finished(engine: Engine, workflow_id: UUID) -> bool:
    return races.status_of(engine, workflow_id).finished


def _id_of(engine: Engine, key: str) -> object:
    with Session(engine) as session:
        return session.scalars(select(Workflow.id).where(Workflow.key == key)).one_or_none()


def _require(found: object) -> UUID:
    assert isinstance(found, UUID)
    return found


@pytest.mark.parametrize("point", [each for each in application.POINTS if each.startswith("sync t")])
def test_an_executor_that_dies_inside_a_step_is_taken_up_after_its_lease(
    database_url: str, engine: Engine, point: str
) -> None:
    with child.executor(database_url, child.Plan(point, 2), "k") as process:
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    workflow_id = _require(_id_of(engine, "k"))
    with child.worker(database_url):
        races.wait_until(lambda: races.status_of(engine, workflow_id).finished)
    with Session(engine) as session:
        status, _, history, credited, calls = ledger.end_state(session, workflow_id)
    assert str(status) == "succeeded"
    assert [each[0] for each in cast("list[tuple[Any, ...]]", history)] == ["credit", "call", "credit#2"]
    assert credited == [("/0", 1), ("/1", 1)]
    assert calls == ["/call"]
