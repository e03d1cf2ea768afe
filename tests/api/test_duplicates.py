"""Which start is the one: what becomes of a start that finds its key taken, one after the other."""

from __future__ import annotations

from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Workflow, WorkflowStatus, manage, start_many, start_with_signal
from sqla_durable.errors import ArgumentError, KeyTakenError
from tests.store import races
from tests.support.statements import executed_on

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
PENDING, SUSPENDED, CANCELLED = WorkflowStatus.PENDING, WorkflowStatus.SUSPENDED, WorkflowStatus.CANCELLED
durable = Durable()


@durable.workflow
def checkout(cents: int) -> int:
    return cents


KEYED = checkout.options(key="k")
ONE = KEYED.options(unique="unfinished")
DEBOUNCED = KEYED.options(debounce=MINUTE, longest_wait=HOUR)


@pytest.fixture
def session(engine: Engine) -> Generator[Session]:
    with Session(engine) as session:
        yield session


def all_of(session: Session) -> list[Workflow]:
    """Return the workflows in the order of their starts."""
    return list(session.scalars(select(Workflow).order_by(Workflow.id).execution_options(populate_existing=True)))


def set_state(session: Session, workflow_id: UUID, state: str) -> None:
    """Bring a workflow into a state, as attempts do."""
    columns = {
        "pending": "status = 'pending',",
        "delayed": "status = 'suspended', wake_at = statement_timestamp() + interval '1 hour',",
        "running": "status = 'running', started_at = statement_timestamp(), token = id, worker_id = id,",
        "suspended": "status = 'suspended', started_at = statement_timestamp(), awaits = '[{\"signal\": \"s\"}]',",
        "backing off": "status = 'suspended', started_at = statement_timestamp(), wake_at = 'tomorrow',",
        "succeeded": "status = 'succeeded', started_at = statement_timestamp(), finished_at = statement_timestamp(), "
        "output = '1', token = id,",
        "failed": "status = 'failed', started_at = statement_timestamp(), finished_at = statement_timestamp(), "
        'error = \'{"type": "builtins:ValueError"}\', token = id,',
        "cancelled": "status = 'cancelled', finished_at = statement_timestamp(),",
    }[state]
    for each in ("status = 'pending', wake_at = NULL, awaits = NULL, token = NULL,", columns):
        changed = f"UPDATE durable.workflow SET {each} created_at = created_at WHERE id = :id"
        session.execute(text(changed), {"id": workflow_id})
    session.commit()


def make_older(session: Session, workflow_id: UUID, by: timedelta) -> None:
    older = text("UPDATE durable.workflow SET created_at = created_at - :by WHERE id = :id")
    session.execute(older, {"by": by, "id": workflow_id})
    session.commit()


UNSTARTED = ("pending", "delayed")
STARTED = ("running", "suspended", "backing off")
FINISHED = ("succeeded", "failed", "cancelled")


# How long a key is taken


@pytest.mark.parametrize("state", [*UNSTARTED, *STARTED, *FINISHED])
@pytest.mark.parametrize("unique", ["forever", "unfinished", "unstarted"])
def test_how_long_a_key_is_taken(session: Session, unique: Any, state: str) -> None:
    # behaviour: Q6
    workflow = KEYED.options(unique=unique)
    first = workflow.start(session, 1).id
    set_state(session, first, state)
    taken = {"forever": True, "unfinished": state not in FINISHED, "unstarted": state in UNSTARTED}[unique]
    second = workflow.start(session, 2)
    assert (second.id == first) is taken
    session.commit()
    keys = [(each.key, each.former_key, each.input["cents"]) for each in all_of(session)]
    assert keys == ([("k", None, 1)] if taken else [(None, "k", 1), ("k", None, 2)])
    assert workflow.start(session, 3).id == second.id


# behaviour: Q6
def test_a_key_is_taken_for_a_time_from_the_start_of_what_has_it(session: Session) -> None:
    """Whatever became of that: the period is rolling, and on the clock of the database."""
    throttled = KEYED.options(throttle=HOUR)
    first = throttled.start(session, 1).id
    for state in (*UNSTARTED, *STARTED, "failed"):
        set_state(session, first, state)
        assert throttled.start(session, 2).id == first
        assert KEYED.options(unique=HOUR).start(session, 2).id == first
    make_older(session, first, HOUR - timedelta(seconds=30))
    assert throttled.start(session, 3).id == first
    make_older(session, first, timedelta(seconds=30))
    second = throttled.start(session, 4)
    session.commit()
    assert [(each.input["cents"], each.key, each.former_key) for each in all_of(session)] == [
        (1, None, "k"),
        (4, "k", None),
    ]
    # The period is what this start says, and not what the other one said.
    make_older(session, second.id, MINUTE)
    assert KEYED.options(throttle=MINUTE).start(session, 5).id != second.id


def test_what_is_deleted_takes_no_key(session: Session) -> None:
    throttled = KEYED.options(throttle=HOUR)
    first = throttled.start(session, 1)
    manage.cancel(session, first)
    manage.delete(session, first)
    assert throttled.start(session, 2).input == {"cents": 2}


def test_a_key_belongs_to_a_name(session: Session) -> None:
    """Not to a queue or a version, and not to the rule that an earlier start had."""
    other = Durable(version="2")
    namesake = other.workflow(name="checkout")(checkout.definition.fn)
    ship = other.workflow(name="ship")(checkout.definition.fn)
    first = ONE.start(session, 1).id
    assert ship.options(key="k", unique="unfinished").start(session, 1).id != first
    assert namesake.options(key="k", unique="unfinished", queue="mail").start(session, 2).id == first
    assert KEYED.start(session, 2).id == KEYED.options(throttle=MINUTE).start(session, 2).id == first
    set_state(session, first, "succeeded")
    assert KEYED.start(session, 2).id == first  # for ever, as without a rule
    assert ONE.start(session, 2).id != first


# Refuse


@pytest.mark.parametrize("unique", ["forever", "unfinished", "unstarted", HOUR])
def test_a_refusal_leaves_the_transaction_usable(session: Session, unique: Any) -> None:
    workflow = KEYED.options(unique=unique, on_conflict="refuse")
    first = workflow.start(session, 1)
    assert first.input == {"cents": 1}
    with pytest.raises(KeyTakenError, match=r"\(pending\) has that key") as caught:
        workflow.start(session, 2)
    assert (caught.value.workflow_id, caught.value.name, caught.value.key) == (first.id, "checkout", "k")
    assert session.scalar(text("SELECT 1")) == 1
    session.commit()
    assert [each.input["cents"] for each in all_of(session)] == [1]
    if unique == "unfinished":
        set_state(session, first.id, "failed")
        assert workflow.start(session, 3).id != first.id


def test_of_many_a_refusal_starts_nothing_and_leaves_the_transaction_usable(session: Session) -> None:
    refusing = ONE.options(on_conflict="refuse")
    first = ONE.start(session, 1).id
    replaceable = checkout.options(key="r").start(session, 1)
    session.commit()
    bound = [
        checkout.bind(2),
        checkout.options(key="other").bind(2),
        checkout.options(key="r", on_conflict="replace").bind(2),
        refusing.bind(2),
    ]
    with pytest.raises(KeyTakenError) as caught:
        start_many(session, bound)
    assert caught.value.workflow_id == first
    assert replaceable.input == {"cents": 1}
    session.commit()
    assert [each.input["cents"] for each in all_of(session)] == [1, 1]


# Replace


@pytest.mark.parametrize("state", UNSTARTED)
def test_what_has_not_started_is_replaced_with_all_that_the_new_start_says(session: Session, state: str) -> None:
    first = KEYED.options(queue="mail", priority=3, timeout=HOUR, deadline=HOUR).start(session, 1)
    set_state(session, first.id, state)
    place = first.enqueued_at
    workflow = KEYED.options(on_conflict="replace", queue="slow", by="acme", priority=-3, timeout=MINUTE)
    assert workflow.start(session, 2) is first
    assert (first.status, first.wake_at, first.queue, first.priority) == (PENDING, None, "slow", -3)
    assert (first.input, first.by, first.timeout, first.deadline_at) == ({"cents": 2}, "acme", MINUTE, None)
    assert (first.key, first.former_key, first.attempt) == ("k", None, 1)
    assert (first.enqueued_at == place) is (state == "pending")  # its place in the queue stays
    later = datetime(2100, 1, 1, tzinfo=UTC)
    assert workflow.options(at=later).start(session, 3) is first
    assert (first.status, first.wake_at, first.input) == (SUSPENDED, later, {"cents": 3})
    with pytest.raises(ArgumentError):
        workflow.start(session, "x")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    session.commit()
    assert [each.input["cents"] for each in all_of(session)] == [3]


@pytest.mark.parametrize("state", [*STARTED, *FINISHED])
def test_what_has_started_is_not_replaced_and_another_is_started(session: Session, state: str) -> None:
    workflow = KEYED.options(on_conflict="replace")
    first = workflow.start(session, 1).id
    set_state(session, first, state)
    status = session.get_one(Workflow, first).status
    second = workflow.start(session, 2)
    assert (second.id != first, second.key) == (True, "k")
    session.commit()
    old, new = all_of(session)
    assert (old.input, old.status, old.key, old.former_key) == ({"cents": 1}, status, None, "k")
    assert (new.input, new.status) == ({"cents": 2}, PENDING)
    assert workflow.start(session, 3).id == second.id


def test_a_fork_with_a_history_is_not_replaced(session: Session) -> None:
    (claimed,) = _claimed(session)
    fork = manage.fork(session, claimed, from_step="charge", key="k")
    session.commit()
    assert KEYED.options(on_conflict="replace").start(session, 2).id != fork.id


def _claimed(session: Session) -> list[UUID]:
    from sqla_durable.store import steps

    races.enqueue(session, input={"cents": 1})
    found = races.claim(session)
    for position, key in enumerate(("reserve", "charge"), start=1):
        steps.record(session, races.checkpoint(found[0].fence, key, position=position))
    session.commit()
    return [each.fence.workflow_id for each in found]


# Debounce


# behaviour: D6
def test_debounce_extends_and_the_last_input_wins(session: Session) -> None:
    first = DEBOUNCED.start(session, 1)
    assert first.wake_at is not None
    assert (first.status, first.wake_at - first.created_at) == (SUSPENDED, MINUTE)
    session.commit()
    make_older(session, first.id, timedelta(seconds=40))
    assert DEBOUNCED.start(session, 2) is first
    assert first.wake_at is not None
    assert first.input == {"cents": 2}
    assert timedelta(seconds=100) <= first.wake_at - first.created_at < timedelta(seconds=130)
    session.commit()
    assert len(all_of(session)) == 1


# behaviour: D6
def test_the_longest_wait_is_from_the_first_start_and_holds_exactly(session: Session) -> None:
    first = DEBOUNCED.start(session, 1)
    session.commit()
    make_older(session, first.id, HOUR - timedelta(seconds=30))
    assert DEBOUNCED.start(session, 2) is first  # in the last seconds
    assert first.wake_at == first.created_at + HOUR
    session.commit()
    make_older(session, first.id, MINUTE)
    second = DEBOUNCED.start(session, 3)  # no worker has looked since, and it is changed no more
    assert (second.id != first.id, second.status) == (True, SUSPENDED)
    session.commit()
    assert [(each.input["cents"], each.key) for each in all_of(session)] == [(2, None), (3, "k")]


# behaviour: D6
@pytest.mark.parametrize("state", [*STARTED, *FINISHED])
def test_a_debounced_start_beside_one_that_runs_waits_by_itself(session: Session, state: str) -> None:
    first = DEBOUNCED.start(session, 1).id
    set_state(session, first, state)
    second = DEBOUNCED.start(session, 2)
    assert second.id != first
    assert (second.status, DEBOUNCED.start(session, 3) is second, second.input) == (SUSPENDED, True, {"cents": 3})


# behaviour: D6
def test_a_debounced_one_that_is_due_and_waits_in_its_queue_waits_for_quiet_again(session: Session) -> None:
    first = DEBOUNCED.start(session, 1)
    set_state(session, first.id, "pending")
    assert DEBOUNCED.start(session, 2) is first
    assert (first.status, first.input) == (SUSPENDED, {"cents": 2})


# behaviour: D6 T8
def test_a_rollback_extends_and_replaces_nothing(session: Session) -> None:
    first = DEBOUNCED.start(session, 1)
    session.commit()
    before = first.wake_at
    DEBOUNCED.start(session, 2)
    session.rollback()
    assert (first.wake_at, first.input) == (before, {"cents": 1})


def test_a_cancelled_debounce_is_over_and_the_next_start_begins_another(session: Session) -> None:
    first = DEBOUNCED.start(session, 1)
    manage.cancel(session, first)
    second = DEBOUNCED.start(session, 2)
    assert (second.id != first.id, second.status) == (True, SUSPENDED)


# Cancel the older one


@pytest.mark.parametrize("state", [*UNSTARTED, *STARTED])
def test_a_newer_one_cancels_the_older(session: Session, state: str) -> None:
    workflow = KEYED.options(on_conflict="cancel_running")
    ids: list[UUID] = []
    for number in range(5):
        record = workflow.start(session, number)
        ids.append(record.id)
        set_state(session, record.id, state if number < 4 else "pending")
    assert [(each.status, each.key) for each in all_of(session)] == [(CANCELLED, None)] * 4 + [(PENDING, "k")]
    assert [each.id for each in all_of(session)] == ids


def test_what_is_compensating_goes_on_with_that_beside_the_newer_one(session: Session) -> None:
    workflow = KEYED.options(on_conflict="cancel_running")
    first = workflow.start(session, 1)
    session.flush()
    session.execute(text("UPDATE durable.workflow SET cancellation = 'compensates'"))
    session.commit()
    ids = {workflow.start(session, number).id for number in (2, 3)}
    session.commit()
    old, middle, new = all_of(session)
    assert (old.id, old.status, old.cancellation, old.former_key) == (first.id, PENDING, "requested", "k")
    assert ({middle.id, new.id}, middle.status, new.status) == (ids, CANCELLED, PENDING)


def test_what_has_ended_is_not_cancelled(session: Session) -> None:
    workflow = KEYED.options(on_conflict="cancel_running")
    first = workflow.start(session, 1).id
    set_state(session, first, "succeeded")
    second = workflow.start(session, 2)
    session.commit()
    assert [(each.id, str(each.status)) for each in all_of(session)] == [(first, "succeeded"), (second.id, "pending")]


def test_a_rollback_cancels_nothing(session: Session) -> None:
    # behaviour: T8
    workflow = KEYED.options(on_conflict="cancel_running")
    first = workflow.start(session, 1)
    session.commit()
    workflow.start(session, 2)
    session.rollback()
    assert [(each.id, each.status, each.key) for each in all_of(session)] == [(first.id, PENDING, "k")]


# Many, and with signals


@pytest.mark.parametrize("count", [3, 10])
def test_many_with_the_same_key_count_one_after_the_other(session: Session, count: int) -> None:
    ids = start_many(session, [DEBOUNCED.bind(each) for each in range(count)])
    assert len(set(ids)) == 1
    session.commit()
    assert [each.input["cents"] for each in all_of(session)] == [count - 1]
    cancelling = KEYED.options(on_conflict="cancel_running")
    more = start_many(session, [cancelling.bind(each) for each in range(count)])
    assert len(set(more)) == count
    session.commit()
    assert [str(each.status) for each in all_of(session)] == ["cancelled"] * count + ["pending"]


def test_many_of_every_kind_return_their_ids_in_order(session: Session) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "forever": {"key": "forever"},
        "one": {"key": "one", "unique": "unfinished"},
        "replaced": {"key": "replaced", "on_conflict": "replace"},
        "debounced": {"key": "debounced", "debounce": MINUTE, "longest_wait": HOUR},
        "throttled": {"key": "throttled", "throttle": HOUR},
        "cancelled": {"key": "cancelled", "on_conflict": "cancel_running"},
    }
    first = dict(
        zip(kinds, start_many(session, [checkout.options(**each).bind(1) for each in kinds.values()]), strict=True)
    )
    session.commit()
    ids = start_many(session, [checkout.options(**kinds[each]).bind(2) for each in reversed(kinds)])
    second = dict(zip(reversed(kinds), ids, strict=True))
    session.commit()
    assert {each for each in kinds if first[each] != second[each]} == {"plain", "cancelled"}
    inputs = {each.id: each.input["cents"] for each in all_of(session)}
    assert {each: inputs[found] for each, found in second.items()} == {
        "plain": 2,
        "forever": 1,
        "one": 1,
        "replaced": 2,
        "debounced": 2,
        "throttled": 1,
        "cancelled": 2,
    }


def test_a_thousand_keys_are_few_statements(engine: Engine, session: Session) -> None:
    bound = [checkout.options(key=f"k{each}", debounce=MINUTE, longest_wait=HOUR).bind(each) for each in range(1_000)]
    first = start_many(session, bound)
    session.commit()
    with executed_on(engine) as executed:
        assert start_many(session, bound) == first
    assert len(executed) <= 5


def test_a_signal_goes_to_the_one_that_has_the_key(session: Session) -> None:
    first = ONE.start(session, 1)
    assert start_with_signal(session, ONE.bind(2), "hurry") is first
    session.commit()
    assert [(each.name, each.workflow_id) for each in first.signals] == [("hurry", first.id)]


async def test_in_async_code(async_engine: Any, engine: Engine) -> None:
    """The same functions, awaited."""
    async with AsyncSession(async_engine, expire_on_commit=False) as session:
        first = await DEBOUNCED.start(session, 1)
        assert (await DEBOUNCED.start(session, 2)) is first
        with pytest.raises(KeyTakenError):
            await KEYED.options(on_conflict="refuse").start(session, 3)
        (newest,) = await aio.start_many(session, [KEYED.options(on_conflict="cancel_running").bind(4)])
        assert await aio.manage.change(session, newest, priority=7) == [newest]
        await session.commit()
    with Session(engine) as check:
        assert [(str(each.status), each.input["cents"], each.priority) for each in all_of(check)] == [
            ("cancelled", 2, 0),
            ("pending", 4, 7),
        ]


# Plain starts


def test_a_start_without_a_rule_executes_what_it_did(engine: Engine, session: Session) -> None:
    session.scalar(text("SELECT 1"))
    KEYED.start(session, 0)
    for workflow, count in ((checkout.options(key="a"), 1), (checkout.options(key="a"), 2), (checkout, 1)):
        with executed_on(engine) as executed:
            workflow.start(session, 1)
            session.flush()
        assert len(executed) == count
        assert "former_key" not in "".join(each.statement for each in executed)


@pytest.mark.parametrize(
    ("workflow", "first", "again", "started"),
    [(DEBOUNCED, 5, 3, 6), (ONE, 4, 3, 3), (KEYED.options(throttle=HOUR), 4, 3, 3)],
)
def test_a_start_with_a_rule_is_few_statements(
    session: Session, workflow: Any, first: int, again: int, started: int
) -> None:
    """The first start, one that finds its key taken, and one beside a workflow that runs."""
    session.scalar(text("SELECT 1"))
    checkout.start(session, 0)
    session.commit()
    for count, state in ((first, None), (again, None), (started, "running")):
        if state is not None:
            set_state(session, all_of(session)[-1].id, state)
        with executed_on(session.connection()) as executed:
            workflow.start(session, 1)
        assert len(executed) == count, [each.statement for each in executed]
        session.commit()
