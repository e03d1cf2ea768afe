"""The verbs in the caller's transaction: what they accept, and what `cancel` and `resume` change and leave alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, func, literal, select, text, union_all, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, aliased, sessionmaker
from uuid_utils.compat import uuid7

import sqla_durable.asyncio as aio
from sqla_durable import Step, Workflow, WorkflowStatus, manage
from sqla_durable.errors import ArgumentError, SchemaError, SessionError
from sqla_durable.store import Completion, NewWorkflow, Suspend, attempts, starts, steps, workers
from tests.store import races
from tests.support.domain import Order

CANCELLED, PENDING = WorkflowStatus.CANCELLED, WorkflowStatus.PENDING


VERBS: dict[str, Any] = {
    "cancel": manage.cancel,
    "resume": manage.resume,
    "retry": manage.retry,
    "rewind": partial(manage.rewind, to_step="charge"),
    "delete": manage.delete,
    "fork": manage.fork,
}
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


def statuses(engine: Engine) -> list[WorkflowStatus]:
    """Return the committed statuses in the order of the ids."""
    with Session(engine) as session:
        return list(session.scalars(select(Workflow.status).order_by(Workflow.id)))


def in_every_state(engine: Engine) -> dict[str, UUID]:
    """Make a workflow in each state."""
    *fences, stopped = races.claimed_fences(engine, 6)
    running, suspended, succeeded, failed, cancelled = fences
    with Session(engine) as session:
        races.end(session, [Suspend(suspended, 3600)])
        attempts.finish(session, races.success(succeeded))
        attempts.finish(session, Completion(failed, WorkflowStatus.FAILED, error='{"type": "builtins:ValueError"}'))
        races.cancel(session, cancelled.workflow_id)
        workers.abandon_attempt(session, stopped, reason="it broke", max_attempts=1)
        delayed = starts.add(session, NewWorkflow(uuid7(), "checkout", "{}", "default", delay=3600))
        session.commit()
        (pending,) = races.enqueue(session)
        found = {"running": running, "suspended": suspended, "succeeded": succeeded, "failed": failed}
        found |= {"cancelled": cancelled, "stopped": stopped}
        return {"pending": pending, "delayed": delayed.id, **{name: each.workflow_id for name, each in found.items()}}


# What is meant


def one_record(session: Session, ids: list[UUID]) -> Any:
    return session.get_one(Workflow, ids[0])


def detached(session: Session, ids: list[UUID]) -> Any:
    record = session.get_one(Workflow, ids[0])
    session.expire(record)
    session.expunge(record)
    return record


CHOICES: dict[str, tuple[Callable[[Session, list[UUID]], Any], set[int]]] = {
    "a record": (one_record, {0}),
    "an expired record of no session": (detached, {0}),
    "an id": (lambda _, ids: ids[1], {1}),
    "ids": (lambda _, ids: ids[:2], {0, 1}),
    "a generator": (lambda _, ids: (each for each in ids[1:]), {1, 2}),
    "an id twice": (lambda _, ids: [ids[1], ids[1]], {1}),
    "records and ids": (lambda session, ids: {one_record(session, ids), ids[2]}, {0, 2}),
    "nothing": (lambda _, _ids: [], set()),
    "an id that is not there": (lambda _, _ids: uuid7(), set()),
    "records as they are read": (lambda session, _: session.scalars(select(Workflow)), {0, 1, 2}),
    "a query": (lambda session, _: session.query(Workflow).filter_by(priority=2), {2}),
    "a select": (lambda _, _ids: select(Workflow).where(Workflow.priority > 0), {1, 2}),
    "a select of ids": (lambda _, _ids: select(Workflow.id).where(Workflow.priority > 0), {1, 2}),
    "a select of ids under another name": (
        lambda _, _ids: select(Workflow.id.label("x")).where(Workflow.priority == 1),
        {1},
    ),
    "all": (lambda _, _ids: select(Workflow), {0, 1, 2}),
    "the first two": (lambda _, _ids: select(Workflow).order_by(Workflow.priority.desc()).limit(2), {1, 2}),
    "the rest": (lambda _, _ids: select(Workflow).order_by(Workflow.priority).offset(1), {1, 2}),
    "by a join": (
        lambda _, _ids: select(Workflow).join(Order, Order.workflow_id == Workflow.id).where(Order.customer == "Ada"),
        {1},
    ),
    "by a foreign key": (lambda _, _ids: select(Order.workflow_id).where(Order.customer == "Ada"), {1}),
    "distinct, by a join": (
        lambda _, _ids: select(Workflow).join(Order, literal(True)).distinct().order_by(Workflow.created_at),
        {0, 1, 2},
    ),
    "an alias": (lambda _, _ids: select(other := aliased(Workflow)).where(other.priority == 2), {2}),
    "an alias's id": (lambda _, _ids: select((other := aliased(Workflow)).id).where(other.priority == 2), {2}),
    "grouped": (
        lambda _, _ids: select(Workflow.id).group_by(Workflow.id).having(func.max(Workflow.priority) == 1),
        {1},
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_can_be_given(engine: Engine, session: Session, choice: str) -> None:
    choose, expected = CHOICES[choice]
    ids = [races.enqueue(session, priority=number)[0] for number in range(3)]
    session.add_all([Order(customer=name, total_cents=1, workflow_id=ids[1]) for name in ("Ada", "Bob")])
    session.commit()
    assert manage.cancel(session, choose(session, ids)) == [ids[number] for number in sorted(expected)]
    session.commit()
    assert statuses(engine) == [CANCELLED if number in expected else PENDING for number in range(3)]
    assert manage.resume(session, choose(session, ids)) == [ids[number] for number in sorted(expected)]


@every_verb
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "None is no workflow"),
        (7, "7 is no workflow"),
        ("0199a5be-0000-7000-8000-000000000000", "'0199a5be-0000-7000-8000-000000000000' is no workflow"),
        (["0199a5be-0000-7000-8000-000000000000"], "'0199a5be-.*' is no workflow"),
        ([uuid7(), None], "None is no workflow"),
        (Order, "Order.* is no workflow"),
        (Workflow, "Workflow.* is no workflow"),
        (Workflow.id, "is no workflow"),
        (Step(), "is no workflow"),
        (Workflow(name="checkout"), "is in no database"),
        (select(Order), "a select of Order does not say which"),
        (select(Workflow, Order), "a select of Workflow, Order does not say"),
        (select(Workflow.id, Workflow.name), "a select of id, name does not say"),
        (select(Workflow.name), "a select of name does not say"),
        (select(Step), "a select of Step does not say"),
        (union_all(select(Workflow.name), select(Workflow.key)), "a select of name does not say"),
        (text("SELECT id FROM durable.workflow"), "is no workflow"),
        (update(Workflow), "is no workflow"),
    ],
)
def test_what_is_no_workflow_is_refused_and_changes_nothing(
    engine: Engine, session: Session, verb: Any, given: Any, message: str
) -> None:
    races.enqueue(session)
    with pytest.raises(ArgumentError, match=message):
        verb(session, given)
    session.commit()
    assert statuses(engine) == [PENDING]


@every_verb
def test_what_is_no_session_is_refused(verb: Any, session: Session) -> None:
    for given in (None, uuid7(), session.get_bind(), sessionmaker()):
        with pytest.raises(SessionError, match="Session or AsyncSession comes first"):
            verb(given, uuid7())


@every_verb
def test_a_session_without_transactions_is_refused(engine: Engine, verb: Any) -> None:
    careless = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(careless) as session, pytest.raises(SessionError, match="AUTOCOMMIT"):
        verb(session, uuid7())


@every_verb
def test_a_database_without_the_tables_is_refused(empty_database_url: str, verb: Any) -> None:
    engine = create_engine(empty_database_url)
    with Session(engine) as session, pytest.raises(SchemaError):
        verb(session, uuid7())
    engine.dispose()


def test_more_ids_than_a_statement_has_parameters(session: Session) -> None:
    ids = races.enqueue(session, 3)
    many = [uuid7() for _ in range(70_000)]
    assert manage.cancel(session, [*many, *ids]) == ids


# What becomes of it


def test_cancel_ends_what_is_not_finished(engine: Engine, session: Session) -> None:
    # behaviour: M1 Q10 Q7
    found = in_every_state(engine)
    unfinished = {found[name] for name in ("pending", "delayed", "running", "suspended")}
    before = {each.id: each.status for each in session.scalars(select(Workflow))}
    assert set(manage.cancel(session, select(Workflow))) == unfinished
    assert manage.cancel(session, select(Workflow)) == []
    session.commit()
    for record in session.scalars(select(Workflow)):
        if record.id in unfinished:
            assert (record.status, record.wake_at, record.error) == (CANCELLED, None, None)
            assert record.finished_at is not None
        else:
            assert record.status is before[record.id]


def test_resume_enqueues_what_was_cancelled_or_stopped_for_its_crashes(engine: Engine, session: Session) -> None:
    # behaviour: M1 Q10 R4
    found = in_every_state(engine)
    before = {each.id: each.status for each in session.scalars(select(Workflow))}
    resumed = {found["cancelled"], found["stopped"]}
    assert set(manage.resume(session, select(Workflow))) == resumed
    assert manage.resume(session, select(Workflow)) == []
    session.commit()
    for record in session.scalars(select(Workflow)):
        assert record.status is (PENDING if record.id in resumed else before[record.id])
        if record.id in resumed:
            assert (record.attempt, record.crashes, record.error, record.token) == (2, 0, None, None)
            assert (record.worker_id, record.finished_at) == (None, None)


def test_a_resumed_workflow_goes_on_with_its_history_in_its_queue_behind_others(engine: Engine) -> None:
    # behaviour: Q10 M1
    with Session(engine) as session:
        (first,) = races.enqueue(session, queue="mail", priority=3)
        (claimed,) = races.claim(session, queues=["mail"])
        steps.record(session, races.checkpoint(claimed.fence))
        manage.cancel(session, first)
        session.commit()
        (second,) = races.enqueue(session, queue="mail", priority=3)
        manage.resume(session, first)
        session.commit()
        again = races.claim(session, 2, queues=["mail"])
    assert [each.fence.workflow_id for each in again] == [second, first]
    assert (again[1].attempt, list(again[1].history)) == (2, ["charge"])


def test_a_workflow_cancelled_and_resumed_again_and_again_counts_its_attempts(session: Session) -> None:
    (workflow_id,) = races.enqueue(session)
    for _ in range(5):
        assert manage.cancel(session, workflow_id) == manage.resume(session, workflow_id) == [workflow_id]
    session.commit()
    assert session.get_one(Workflow, workflow_id).attempt == 6


def test_a_delayed_workflow_that_is_cancelled_and_resumed_is_due_at_once(session: Session) -> None:
    # behaviour: Q7
    record = starts.add(session, NewWorkflow(uuid7(), "checkout", "{}", "default", delay=3600))
    assert manage.cancel(session, record) == [record.id]
    assert manage.resume(session, record) == [record.id]
    assert (record.status, record.wake_at) == (PENDING, None)


# The caller's transaction and records


@pytest.mark.parametrize("verb", [manage.cancel, manage.resume])
def test_a_rollback_of_the_caller_leaves_nothing(engine: Engine, session: Session, verb: Any) -> None:
    # behaviour: T8
    in_every_state(engine)
    before = statuses(engine)
    assert verb(session, select(Workflow))
    assert statuses(engine) == before
    session.rollback()
    assert statuses(engine) == before


def test_a_savepoint_of_the_caller_takes_its_cancel_back(engine: Engine, session: Session) -> None:
    # behaviour: T8
    (workflow_id,) = races.enqueue(session)
    savepoint = session.begin_nested()
    assert manage.cancel(session, workflow_id)
    savepoint.rollback()
    session.commit()
    assert statuses(engine) == [PENDING]


def test_a_record_that_was_only_just_added_is_cancelled(engine: Engine, session: Session) -> None:
    session.autoflush = False
    by_record, by_select = Workflow(name="checkout"), Workflow(name="checkout")
    session.add_all([by_record, by_select])
    assert manage.cancel(session, by_record) == [by_record.id]
    assert manage.cancel(session, select(Workflow)) == [by_select.id]
    assert [by_record.status, by_select.status] == [CANCELLED, CANCELLED]
    session.commit()
    assert statuses(engine) == [CANCELLED, CANCELLED]


@pytest.mark.parametrize("by", ["record", "id", "select"])
def test_a_record_in_the_session_is_fresh_afterwards(engine: Engine, by: str) -> None:
    with Session(engine, expire_on_commit=False) as session:
        (workflow_id,) = races.enqueue(session)
        record = session.get_one(Workflow, workflow_id)
        given: Any = {"record": record, "id": workflow_id, "select": select(Workflow)}[by]
        manage.cancel(session, given)
        assert "status" in record.__dict__, "it was read again, and is not only expired"
        assert (record.status, record.finished_at is None) == (CANCELLED, False)
        manage.resume(session, given)
        assert (record.status, record.attempt, record.finished_at) == (PENDING, 2, None)


def test_a_record_that_was_not_cancelled_shows_why(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session, Session(engine) as other:
        record = session.get_one(Workflow, fence.workflow_id)
        attempts.finish(other, races.success(fence))
        other.commit()
        assert record.finished_at is None
        assert manage.cancel(session, record) == []
        assert record.status is WorkflowStatus.SUCCEEDED


def test_changes_of_the_caller_to_the_record_are_written_and_stand(engine: Engine, session: Session) -> None:
    (workflow_id,) = races.enqueue(session)
    record = session.get_one(Workflow, workflow_id)
    record.queue = "mail"
    manage.cancel(session, record)
    assert (record.queue, record.status) == ("mail", CANCELLED)
    session.commit()
    assert session.scalars(select(Workflow.queue)).all() == ["mail"]


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_an_async_session_awaits_the_same(async_session_factory: async_sessionmaker[AsyncSession]) -> None:
    async with async_session_factory() as session:
        session.add(record := Workflow(name="checkout"))
        assert await aio.manage.cancel(session, record) == [record.id]
        await session.rollback()
        session.add(record := Workflow(name="checkout"))
        assert await aio.manage.cancel(session, select(Workflow)) == [workflow_id := record.id]
        await session.commit()
        assert await aio.manage.resume(session, record) == [workflow_id], "an expired record"
        assert record.status is PENDING
        with pytest.raises(ArgumentError):
            await aio.manage.cancel(session, cast("Any", 7))


@pytest.mark.parametrize("durable_schema", ["tenant_7"], indirect=True)
def test_another_name_of_the_schema(session: Session) -> None:
    (workflow_id,) = races.enqueue(session)
    other = aliased(Workflow)
    assert manage.cancel(session, select(other).where(other.id == workflow_id)) == [workflow_id]
    assert manage.resume(session, workflow_id) == [workflow_id]


# Beside others


def test_what_no_longer_fits_the_select_when_its_row_is_locked_is_left_alone(engine: Engine) -> None:
    (workflow_id,) = races.enqueue(Session(engine))
    with races.transaction(engine) as claimer, races.transaction(engine) as canceller:
        races.claim(claimer.session)
        waiting = select(Workflow).where(Workflow.status == PENDING)
        cancelling = canceller.begin_blocked(lambda session: manage.cancel(session, waiting))
        claimer.session.commit()
        assert cancelling.result() == []
        canceller.session.commit()
    assert races.status_of(engine, workflow_id) is WorkflowStatus.RUNNING


def test_a_cancel_waits_for_a_step_that_is_committing_and_its_checkpoint_stands(engine: Engine) -> None:
    # behaviour: T1
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as step, races.transaction(engine) as canceller:
        steps.record(step.session, races.checkpoint(fence))
        cancelling = canceller.begin_blocked(lambda session: manage.cancel(session, fence.workflow_id))
        step.session.commit()
        assert cancelling.result() == [fence.workflow_id]
        canceller.session.commit()
    assert races.history_of(engine, fence.workflow_id) == ["charge"]


@pytest.mark.parametrize("given", ["ids", "select"])
def test_rows_are_locked_in_the_order_of_their_ids(engine: Engine, session: Session, given: str) -> None:
    """Whatever their order in the table and in the request: two that lock in two orders deadlock."""
    ids = sorted(uuid7() for _ in range(5))
    for each in reversed(ids):
        races.enqueue(session, id=each)
    backwards = list(reversed(ids))
    wanted: Any = backwards if given == "ids" else select(Workflow).order_by(Workflow.id.desc()).limit(5)
    free = select(Workflow.id).order_by(Workflow.id).with_for_update(skip_locked=True)
    with races.transaction(engine) as canceller, races.transaction(engine) as holder:
        races.lock(holder.session, ids[0])
        cancelling = canceller.begin_blocked(lambda session: manage.cancel(session, wanted))
        found = session.scalars(free).all()
        session.rollback()
        holder.session.rollback()
        assert cancelling.result() == ids
    assert found == ids[1:], "it waits for the first, and holds none of those behind it"
