"""`fork`: what a new workflow has of the history of the one that it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any, cast

import pytest
from sqlalchemy import Engine, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

import sqla_durable.asyncio as aio
from sqla_durable import Signal, Step, StepStatus, Workflow, WorkflowStatus, manage
from sqla_durable.errors import ArgumentError, EncodingError, NotFoundError
from sqla_durable.store import Fence, workers
from tests.manage import histories
from tests.manage.histories import FAILED, step
from tests.store import races
from tests.support.domain import Order


def with_history(session: Session, *keys: str, **columns: Any) -> Fence:
    fence = histories.claimed(session, **columns)
    histories.record(session, [step(fence, key, number) for number, key in enumerate(keys, 1)])
    return fence


def test_a_fork_copies_what_was_before_the_step(engine: Engine, session: Session) -> None:
    # behaviour: M1 M2
    fence = with_history(session, "a", "b", "c", input={"order_id": 1, "rush": True}, priority=3, key="order-1")
    histories.fail(session, fence)
    made = manage.fork(session, fence.workflow_id, from_step="c", input={"order_id": 2})
    session.commit()
    assert (made.name, made.status, made.queue, made.priority) == ("checkout", WorkflowStatus.PENDING, "default", 3)
    assert (made.input, made.key) == ({"order_id": 2, "rush": True}, None)
    assert (made.forked_from, made.parent_id) == (fence.workflow_id, None)
    assert (made.error, made.token, made.finished_at) == (None, None, None)
    assert histories.keys(engine, made.id) == ["a", "b"]
    assert histories.keys(engine, fence.workflow_id) == ["a", "b", "c"]
    assert histories.standing(session, fence.workflow_id).status is WorkflowStatus.FAILED
    (again,) = races.claim(session)
    assert (again.fence.workflow_id, sorted(again.history)) == (made.id, ["a", "b"])


def test_from_the_beginning_nothing_is_copied(engine: Engine, session: Session) -> None:
    # behaviour: M1
    fence = with_history(session, "a")
    histories.shown(session, fence.workflow_id, "a")
    made = manage.fork(session, session.get_one(Workflow, fence.workflow_id))
    session.commit()
    assert (made.attempt, made.started_at) == (1, None)
    assert histories.keys(engine, made.id) == []
    assert histories.events(session, made.id) == histories.items(session, made.id) == []


def test_events_and_streams_up_to_the_cut_are_copied_and_signals_are_not(session: Session) -> None:
    # behaviour: M2
    fence = with_history(session, "a", "b", "c")
    for key in ("a", "c", "running", None, "b"):
        histories.shown(session, fence.workflow_id, key)
    before = histories.items(session, fence.workflow_id)
    made = manage.fork(session, fence.workflow_id, from_step="c")
    assert histories.events(session, made.id) == ["a", "b"]
    assert histories.items(session, made.id) == [(0, "a 0"), (1, "a 1"), (2, "b 0"), (3, "b 1")]
    assert session.scalars(select(Signal).where(Signal.workflow_id == made.id)).all() == []
    assert histories.items(session, fence.workflow_id) == before


def test_a_failed_outcome_is_copied_and_what_is_none_is_not(engine: Engine, session: Session) -> None:
    # behaviour: M2
    fence = with_history(session)
    not_outcomes = [
        step(fence, "caught", 1, FAILED),
        step(fence, "tried", 2, StepStatus.RETRYING),
        step(fence, "last", 3),
    ]
    histories.record(session, [step(fence, "timer", 2, StepStatus.WAITING), *not_outcomes])
    made = manage.fork(session, fence.workflow_id, from_step="last")
    session.commit()
    assert histories.keys(engine, made.id) == ["caught"]
    copied, original = (histories.outcome(session, each, "caught") for each in (made.id, fence.workflow_id))
    for column in ("name", "position", "status", "error", "attempt", "tries", "started_at", "finished_at"):
        assert getattr(copied, column) == getattr(original, column)


@dataclass
class Receipt:
    cents: Decimal


@pytest.mark.parametrize("given", [7, None, "", {"cents": 1}, [1, None], Receipt(Decimal(5))])
def test_an_outcome_is_replaced_wherever_its_step_stands(engine: Engine, session: Session, given: Any) -> None:
    # behaviour: M1
    fence = with_history(session, "a", "b")
    histories.record(session, [step(fence, "c", 3, FAILED), step(fence, "d", 4, StepStatus.RETRYING)])
    made = manage.fork(session, fence.workflow_id, from_step="b", outcomes={"a": given, "c": given, "d": given})
    session.commit()
    assert histories.keys(engine, made.id) == ["a", "c", "d"]
    expected = {"cents": "5"} if isinstance(given, Receipt) else given
    for key in ("a", "c", "d"):
        record = histories.outcome(session, made.id, key)
        assert (record.status, record.output, record.error) == (StepStatus.SUCCEEDED, expected, None)
    assert histories.outcome(session, fence.workflow_id, "a").output == "a"


def test_an_outcome_alone_is_no_cut(engine: Engine, session: Session) -> None:
    fence = with_history(session, "a", "b")
    made = manage.fork(session, fence.workflow_id, outcomes={"b": 1})
    session.commit()
    assert histories.keys(engine, made.id) == ["b"]
    (again,) = races.claim(session)
    assert sorted(again.history) == ["b"]


def test_version_queue_and_key(session: Session) -> None:
    # behaviour: M1
    fence = with_history(session, "a", queue="default")
    session.execute(update(Workflow).values(version="1"))
    kept = manage.fork(session, fence.workflow_id)
    made = manage.fork(session, fence.workflow_id, version="2", queue="mail", key="again")
    assert (kept.version, kept.queue, kept.key) == ("1", "default", None)
    assert (made.version, made.queue, made.key) == ("2", "mail", "again")
    assert manage.fork(session, fence.workflow_id, from_step="a", key="again") is made


def test_a_key_that_is_another_workflows_is_refused(session: Session) -> None:
    fence = with_history(session, key="taken")
    with pytest.raises(ArgumentError, match=r"key='taken' is that of workflow 'checkout' .* no fork of"):
        manage.fork(session, fence.workflow_id, key="taken")


def test_of_two_forks_with_one_key_there_is_one(engine: Engine, session: Session) -> None:
    fence = with_history(session, "a")
    with races.transaction(engine) as first, races.transaction(engine) as second:
        made = manage.fork(first.session, fence.workflow_id, key="again").id
        waiting = second.begin_blocked(lambda session: manage.fork(session, fence.workflow_id, key="again").id)
        first.session.commit()
        assert waiting.result() == made


def test_several_by_a_select_in_the_order_of_their_ids(session: Session) -> None:
    # behaviour: M1
    fences = sorted((with_history(session, "a", "b") for _ in range(3)), key=lambda each: each.workflow_id)
    made = manage.fork(session, select(Workflow).where(Workflow.forked_from.is_(None)), from_step="b")
    assert [each.forked_from for each in made] == [each.workflow_id for each in fences]
    assert [[each.key for each in record.steps] for record in made] == [["a"]] * 3
    assert manage.fork(session, select(Workflow).where(Workflow.name == "other")) == []


def test_a_fork_of_a_running_workflow_takes_no_lock_on_it(engine: Engine, session: Session) -> None:
    fence = with_history(session, "a", "b")
    with races.transaction(engine) as committing:
        races.lock(committing.session, fence.workflow_id)
        made = manage.fork(session, fence.workflow_id, from_step="b")
        assert [each.key for each in made.steps] == ["a"]
    assert races.record(session, [step(fence, "c", 3)]), "and its attempt goes on"


def test_copied_steps_are_no_progress_of_the_first_attempt(session: Session) -> None:
    """Else a fork that kills its workers would be taken for one that gets on."""
    fence = with_history(session, "a", "b")
    histories.fail(session, fence)
    made = manage.fork(session, fence.workflow_id, from_step="b")
    session.commit()
    (again,) = races.claim(session)
    assert made.attempt == again.attempt == 2
    workers.abandon_attempt(session, again.fence, reason="it broke", max_attempts=9)
    assert histories.standing(session, made.id).crashes == 1


def test_the_timeout_counts_from_the_fork(session: Session) -> None:
    fence = with_history(session)
    past = func.statement_timestamp() - timedelta(days=1)
    session.execute(update(Workflow).values(timeout=timedelta(hours=2), deadline_at=past))
    made = manage.fork(session, fence.workflow_id)
    assert made.timeout == timedelta(hours=2)
    assert made.deadline_at is not None
    assert made.deadline_at > made.created_at


def test_a_fork_of_a_child_is_nobodys_child(session: Session) -> None:
    parent = with_history(session)
    child = histories.child(session, parent.workflow_id, detached=True)
    made = manage.fork(session, child)
    assert (made.parent_id, made.parent_key, made.detached) == (None, None, False)


@pytest.mark.parametrize(
    "change", [{"from_step": "b"}, {"outcomes": {"b": 1}}, {"from_step": "a", "outcomes": {"b": 1}}]
)
def test_a_step_without_a_record_is_refused_and_nothing_is_started(session: Session, change: Any) -> None:
    # behaviour: M1
    lacking, having = with_history(session, "a"), with_history(session, "a", "b")
    given: Any
    for given in (lacking.workflow_id, [having.workflow_id, lacking.workflow_id], select(Workflow)):
        with pytest.raises(ArgumentError, match=f"{lacking.workflow_id} has no record of a step 'b': it has 'a'"):
            manage.fork(session, given, **change)
    assert len(session.scalars(select(Workflow)).all()) == 2
    assert len(session.scalars(select(Step)).all()) == 3


@pytest.mark.parametrize("name", ["from_step", "version", "key", "queue"])
@pytest.mark.parametrize("value", ["", " ", "\0", 7])
def test_a_name_that_is_none_is_refused(session: Session, name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name}=.*Nothing was started"):
        manage.fork(session, uuid7(), **{name: value})


@pytest.mark.parametrize("value", ["\0", float("nan"), object(), Order()])
def test_a_value_that_cannot_be_stored_is_refused(session: Session, value: Any) -> None:
    fence = with_history(session, "a")
    for change in ({"input": {"order_id": value}}, {"outcomes": {"a": value}}):
        with pytest.raises(EncodingError, match=r"argument 'order_id'|result of step 'a'"):
            manage.fork(session, fence.workflow_id, **cast("Any", change))


def test_one_key_for_several_is_refused(session: Session) -> None:
    with pytest.raises(ArgumentError, match="key='k' is of one workflow"):
        manage.fork(session, cast("Any", [uuid7()]), key="k")


def test_one_that_is_not_there_is_refused(session: Session) -> None:
    fence = with_history(session)
    unknown = uuid7()
    for given in (unknown, [fence.workflow_id, unknown]):
        with pytest.raises(NotFoundError, match=f"no workflow {unknown} is visible") as refused:
            manage.fork(session, cast("Any", given))
        assert refused.value.workflow_id == unknown
    assert len(session.scalars(select(Workflow)).all()) == 1


def test_a_rollback_of_the_caller_leaves_nothing(session: Session) -> None:
    # behaviour: T8
    fence = with_history(session, "a", "b")
    manage.fork(session, fence.workflow_id, from_step="b")
    session.rollback()
    assert len(session.scalars(select(Workflow)).all()) == 1


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_an_async_session_awaits_the_same(
    engine: Engine, async_session_factory: async_sessionmaker[AsyncSession]
) -> None:
    with Session(engine) as session:
        fence = with_history(session, "a", "b")
        histories.shown(session, fence.workflow_id, "a")
    async with async_session_factory() as caller:
        made = await aio.manage.fork(caller, fence.workflow_id, from_step="b", outcomes={"a": 7}, key="again")
        (other,) = await aio.manage.fork(caller, [fence.workflow_id])
        ids = made.id, other.id
        await caller.commit()
    assert [histories.keys(engine, each) for each in ids] == [["a"], []]
