"""Starting workflows in the caller's own transaction."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import selectinload

from sqla_durable import Workflow, WorkflowStatus
from sqla_durable.errors import ArgumentError, NotFoundError, ResultTimeoutError
from tests.acceptance.application import AnyWorkflow, Application, Form
from tests.acceptance.shells import Shell
from tests.support.domain import Order

pytestmark = pytest.mark.few_shells

CLIENTS = pytest.mark.shells(("executor", "async-worker", "asyncpg-worker"))


async def greet(name: str, times: int = 1) -> str:
    return " ".join([f"hello {name}"] * times)


@pytest.fixture
def greeting(app: Application) -> AnyWorkflow[..., str]:
    return app.workflow(greet)


def test_committed_start_is_carried_out(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    assert shell.run(greeting, "Ada", times=2) == "hello Ada hello Ada"
    (record,) = _records(shell)
    assert record.status is WorkflowStatus.SUCCEEDED
    assert record.input == {"name": "Ada", "times": 2}
    assert record.output == "hello Ada hello Ada"
    assert record.attempt == 1
    assert record.created_at <= record.started_at <= record.finished_at  # type: ignore[operator]  # not None here


# behaviour: T8
@CLIENTS
@pytest.mark.parametrize("key", [None, "order-1"])
def test_rolled_back_start_leaves_no_row(shell: Shell, greeting: AnyWorkflow[..., str], key: str | None) -> None:
    with shell.client() as client:
        client.start(greeting.options(key=key), "Ada")
        client.flush()
        client.rollback()
        client.commit()
    assert _records(shell) == []


# behaviour: T8
@CLIENTS
def test_rolled_back_start_many_leaves_no_row(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    with shell.client() as client:
        client.start_many([greeting.bind("Ada"), greeting.options(key="k").bind("Bob")])
        client.rollback()
        client.commit()
    assert _records(shell) == []


@CLIENTS
@pytest.mark.parametrize("key", [None, "order-1"])
def test_record_is_assigned_to_a_relationship_before_the_flush(
    shell: Shell, greeting: AnyWorkflow[..., str], key: str | None
) -> None:
    with shell.client() as client:
        order = Order(customer="Ada", total_cents=500)
        client.add(order)
        order.workflow = client.start(greeting.options(key=key), "Ada")
        client.commit()
    with shell.sessionmaker() as session:
        found = session.scalars(select(Order).options(selectinload(Order.workflow))).one()
        assert found.workflow is not None
        assert found.workflow.name == "greet"
        joined = select(Order.customer, Workflow.status).join(Order.workflow)
        assert session.execute(joined).one() == ("Ada", WorkflowStatus.PENDING)


@CLIENTS
def test_same_workflow_and_key_are_the_same_record(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    with shell.client() as client:
        first = client.start(greeting.options(key="order-1"), "Ada")
        again = client.start(greeting.options(key="order-1"), "Bob")
        first_id = first.id
        client.commit()
        assert again is first
    with shell.client() as client:
        later_id = client.start(greeting.options(key="order-1"), "Cid").id
        client.commit()
    (record,) = _records(shell)
    assert record.id == first_id == later_id
    assert record.input == {"name": "Ada"}


# behaviour: E6 (a key belongs to the name of a workflow: another one under it is another record)
@CLIENTS
def test_same_key_of_two_workflows_is_two_records(shell: Shell, app: Application) -> None:
    one = app.workflow(greet, name="one")
    two = app.workflow(greet, name="two")
    with shell.client() as client:
        ids = {client.start(each.options(key="k"), "Ada").id for each in (one, two)}
        client.commit()
    assert {record.id for record in _records(shell)} == ids
    assert len(ids) == 2


# behaviour: E1
def test_finished_key_returns_the_recorded_outcome_and_runs_nothing(shell: Shell, app: Application) -> None:
    calls: list[str] = []

    async def count(name: str) -> int:
        calls.append(name)
        return len(calls)

    counting = app.workflow(count).options(key="once")
    assert shell.run(counting, "Ada") == 1
    assert shell.run(counting, "Ada") == 1
    assert calls == ["Ada"]
    assert len(_records(shell)) == 1


# behaviour: T9
@CLIENTS
@pytest.mark.parametrize("first_commits", [True, False])
def test_racing_callers_of_one_key_get_one_record_and_keep_their_transactions(
    shell: Shell, greeting: AnyWorkflow[..., str], first_commits: bool
) -> None:
    keyed = greeting.options(key="race")
    with shell.sessionmaker() as winner, ThreadPoolExecutor(1) as pool:
        winner.add(Order(customer="winner", total_cents=1))
        won = keyed.start(winner, "winner").id

        def lose() -> UUID:
            with shell.sessionmaker() as loser:
                loser.add(Order(customer="loser", total_cents=2))
                loser.flush()
                record = keyed.start(loser, "loser")
                loser.scalars(select(Order).where(Order.customer == "loser")).one().workflow = record
                loser.commit()
                return record.id

        losing = pool.submit(lose)
        _wait_for_blocked_insert(shell)
        if first_commits:
            winner.commit()
        else:
            winner.rollback()
        lost = losing.result(timeout=30)
    (record,) = _records(shell)
    assert record.id == lost
    assert (lost == won) is first_commits
    assert record.input == {"name": "winner" if first_commits else "loser"}
    with shell.sessionmaker() as session:
        assert session.scalars(select(Order.customer).order_by(Order.id)).all() == (
            ["winner", "loser"] if first_commits else ["loser"]
        )


# behaviour: T9
@CLIENTS
def test_many_callers_at_once_start_one_key_once(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    together = threading.Barrier(8)

    def start(number: int) -> UUID:
        with shell.sessionmaker() as session:
            session.connection()
            together.wait(30)
            found = greeting.options(key="race").start(session, str(number)).id
            session.commit()
            return found

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(start, range(8)))
    assert {record.id for record in _records(shell)} == ids
    assert len(ids) == 1


# behaviour: E9
@CLIENTS
@pytest.mark.parametrize("option", ["key", "queue"])
@pytest.mark.parametrize("value", ["", "  ", "\t\n", "a\0b"])
def test_blank_key_or_queue_is_refused(shell: Shell, greeting: AnyWorkflow[..., str], option: str, value: str) -> None:
    with pytest.raises(
        ArgumentError, match=rf"^{option}=.* (is blank|holds a NUL).*: pass a text that is not blank"
    ) as caught:
        greeting.options(**{option: value})  # type: ignore[arg-type]  # one of two text options
    assert repr(value) in str(caught.value)


@CLIENTS
def test_start_many_gives_ids_in_order(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    with shell.client() as client:
        known = client.start(greeting.options(key="k1"), "first").id
        ids = client.start_many(greeting.options(key=f"k{n}" if n % 2 else None).bind(str(n)) for n in range(6))
        client.commit()
    records = {record.id: record for record in _records(shell)}
    assert len(records) == 6
    assert [records[each].input["name"] for each in ids] == ["0", "first", "2", "3", "4", "5"]
    assert ids[1] == known


@CLIENTS
def test_start_many_takes_one_key_twice(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    with shell.client() as client:
        ids = client.start_many([greeting.options(key="k").bind("Ada"), greeting.options(key="k").bind("Bob")])
        client.commit()
    assert len(set(ids)) == 1
    assert len(_records(shell)) == 1


@CLIENTS
def test_start_many_of_nothing_is_nothing(shell: Shell) -> None:
    with shell.client() as client:
        assert client.start_many([]) == []


@CLIENTS
def test_start_many_in_several_statements(
    shell: Shell, greeting: AnyWorkflow[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqla_durable.api.workflows._BATCH", 3)
    with shell.client() as client:
        ids = client.start_many(greeting.bind(str(n)) for n in range(7))
        client.commit()
    records = {record.id: record for record in _records(shell)}
    assert [records[each].input["name"] for each in ids] == [str(n) for n in range(7)]


@CLIENTS
def test_start_many_refuses_all_when_one_argument_does_not_fit(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    with shell.client() as client:
        with pytest.raises(ArgumentError, match="Nothing was started"):
            client.start_many(greeting.bind(name) for name in ("Ada", 7, "Bob"))
        client.add(Order(customer="survivor", total_cents=1))
        client.commit()
    assert _records(shell) == []


WORKERS = pytest.mark.shells(("worker", "async-worker", "asyncpg-worker"))


@WORKERS
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("option", ["delay", "at"])
def test_delayed_start_waits_for_the_clock_of_the_database(
    shell: Shell, greeting: AnyWorkflow[..., str], option: str, many: bool
) -> None:
    hour = timedelta(hours=1)
    delayed = greeting.options(delay=hour) if option == "delay" else greeting.options(at=datetime.now(UTC) + hour)
    with shell.client() as client:
        if many:
            (workflow_id,) = client.start_many([delayed.bind("later")])
        else:
            workflow_id = client.start(delayed, "later").id
        client.commit()
    with shell.sessionmaker() as session:
        due_in = session.scalar(select(Workflow.wake_at - func.statement_timestamp()))
        assert due_in is not None
        assert timedelta(minutes=59) < due_in <= hour
    assert shell.run(greeting, "now") == "hello now"  # the worker has claimed whatever was due
    assert shell.one(workflow_id).status is WorkflowStatus.SUSPENDED
    with shell.sessionmaker.begin() as session:
        session.execute(update(Workflow).where(Workflow.id == workflow_id).values(wake_at=func.statement_timestamp()))
    assert shell.finish(greeting, workflow_id) == "hello later"
    record = shell.one(workflow_id)
    assert record.wake_at is None
    assert record.enqueued_at > record.created_at


@WORKERS
def test_delay_of_nothing_and_time_in_the_past_are_now(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    assert shell.run(greeting.options(delay=timedelta(seconds=-1)), "Ada") == "hello Ada"
    assert shell.run(greeting.options(at=datetime(1970, 1, 1, tzinfo=UTC)), "Bob") == "hello Bob"


def test_contradicting_and_impossible_options_are_refused() -> None:
    workflow = Application(Form.SYNC).workflow(greet)
    with pytest.raises(ArgumentError, match="contradict each other: give one of them"):
        workflow.options(delay=timedelta(1), at=datetime.now(UTC))
    with pytest.raises(ArgumentError, match="has no time zone: add one"):
        workflow.options(at=datetime(2030, 1, 1))
    for priority in (40_000, -40_000):
        with pytest.raises(ArgumentError, match=rf"priority={priority} is not an integer from"):
            workflow.options(priority=priority)


def test_plain_sql_starts_a_workflow(shell: Shell, greeting: AnyWorkflow[..., str], durable_schema: str) -> None:
    with shell.engine.begin() as connection:
        statement = f"INSERT INTO {durable_schema}.workflow (name, input) VALUES ('greet', '{{\"name\": \"psql\"}}')"
        inserted = connection.scalar(text(f"{statement} RETURNING id"))
    assert isinstance(inserted, UUID)
    assert shell.finish(greeting, inserted) == "hello psql"


def test_handle_without_an_outcome_times_out(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    with shell.client() as client:
        workflow_id = client.start(greeting, "Ada").id
        client.commit()
    with pytest.raises(ResultTimeoutError, match=r"has no outcome after 0:00:00.01") as caught:
        shell.result(greeting, workflow_id, timeout=timedelta(milliseconds=10))
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.workflow_id == workflow_id
    assert "it is pending, and goes on. Is a worker running for its queue, 'default' by default?" in str(caught.value)
    assert shell.finish(greeting, workflow_id) == "hello Ada"
    assert shell.result(greeting, workflow_id, timeout=timedelta()) == "hello Ada"


@CLIENTS
def test_handle_of_a_start_that_is_not_committed_says_so(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    with shell.client() as client:
        workflow_id = client.start(greeting, "Ada").id
        client.flush()
        with pytest.raises(NotFoundError, match="is the transaction that started it committed") as caught:
            shell.result(greeting, workflow_id)
        assert caught.value.workflow_id == workflow_id
        client.rollback()


def _records(shell: Shell) -> list[Workflow]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Workflow).order_by(Workflow.id)))


def _wait_for_blocked_insert(shell: Shell) -> None:
    """Return when a transaction of this database waits for another."""
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    pause = threading.Event()
    with shell.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not connection.scalar(waiting):
            pause.wait(0.005)
