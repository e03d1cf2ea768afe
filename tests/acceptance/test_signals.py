"""Signals: sent in the sender's transaction, before or after the receiver waits, taken in order, once."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from sqla_durable import (
    Durable,
    Executor,
    Signal,
    StepStatus,
    Workflow,
    WorkflowStatus,
    errors,
    send_signal,
    start_with_signal,
    wait_signal,
)
from sqla_durable.testing import advance
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.shells import Shell
from tests.store import races

pytestmark = pytest.mark.few_shells

WORKERS = pytest.mark.shells(("worker", "async-worker", "asyncpg-worker", "mixed-worker"))
COMMITTING = pytest.mark.shells(("executor", "async-executor", "worker", "async-worker", "asyncpg-worker"))
WEEK = timedelta(days=7)


@dataclass
class Approval:
    by: str
    cents: int


@pytest.fixture
def session(engine: Engine) -> Generator[Session]:
    with Session(engine) as session:
        yield session


async def awaited(outcome: Any) -> Any:
    """Return the outcome of an operation, in either form."""
    return await outcome if inspect.isawaitable(outcome) else outcome


def approving(app: Application, **options: Any) -> AnyWorkflow[[], Approval]:
    async def approve() -> Approval:
        found = await awaited(either.wait_signal("approved", Approval, **options))
        assert isinstance(found, Approval)
        return found

    return app.workflow(approve)


def send(shell: Shell, workflow_id: UUID, name: str, payload: object = None, *, key: str | None = None) -> None:
    with shell.client() as client:
        client.signal(workflow_id, name, payload, key=key)
        client.commit()


def wait_until_suspended(shell: Shell, workflow_id: UUID) -> None:
    races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED, what="the suspension")


def test_signal_that_was_sent_before_is_taken(shell: Shell, app: Application) -> None:
    """Before the first attempt, in the transaction that starts the workflow."""
    workflow = approving(app)
    with shell.client() as client:
        record = client.start(workflow)
        client.flush()
        client.signal(record, "approved", Approval("ada", 5))
        workflow_id = record.id
        client.commit()
    assert shell.finish(workflow, workflow_id) == Approval("ada", 5)
    (step,) = shell.one(workflow_id).steps
    assert (step.key, step.status, step.output) == ("signal:approved", StepStatus.SUCCEEDED, {"by": "ada", "cents": 5})
    assert [each.consumed_by for each in signals_of(shell)] == ["signal:approved"]


@COMMITTING
def test_waiting_workflow_goes_on_with_the_signal(shell: Shell, app: Application) -> None:
    # behaviour: C7
    workflow = approving(app)
    workflow_id = shell.begin(workflow)
    with shell.background():
        wait_until_suspended(shell, workflow_id)
        suspended = shell.one(workflow_id)
        assert (suspended.worker_id, suspended.awaits) == (None, [{"signal": "approved"}])
        send(shell, workflow_id, "rejected")
        send(shell, workflow_id, "approved", Approval("ada", 5))
        assert shell.result(workflow, workflow_id) == Approval("ada", 5)
    assert [(each.name, each.consumed_by) for each in signals_of(shell)] == [
        ("rejected", None),
        ("approved", "signal:approved"),
    ]


@COMMITTING
def test_signals_are_taken_first_in_first_out_and_once(shell: Shell, app: Application) -> None:
    # behaviour: C1
    async def collect(count: int) -> list[int]:
        return [await awaited(either.wait_signal("item", int)) for _ in range(count)]

    workflow = app.workflow(collect)
    workflow_id = shell.begin(workflow, 5)
    with shell.background():
        for number in range(5):
            send(shell, workflow_id, "item", number)
        assert shell.result(workflow, workflow_id) == [0, 1, 2, 3, 4]
    assert [each.consumed_by for each in signals_of(shell)] == [
        "signal:item",
        *(f"signal:item#{n}" for n in range(2, 6)),
    ]


def test_signal_goes_with_the_senders_transaction(shell: Shell, app: Application) -> None:
    # behaviour: T8
    workflow_id = shell.begin(approving(app))
    with shell.client() as client:
        client.signal(workflow_id, "approved", Approval("ada", 5))
        client.rollback()
    assert signals_of(shell) == []


def test_signal_of_a_known_key_is_sent_once(shell: Shell, app: Application) -> None:
    # behaviour: C2
    workflow = approving(app)
    workflow_id = shell.begin(workflow)
    for cents in (1, 2):
        send(shell, workflow_id, "approved", Approval("ada", cents), key="once")
    assert shell.finish(workflow, workflow_id) == Approval("ada", 1)
    assert len(signals_of(shell)) == 1


def test_signal_of_a_known_key_is_the_same_after_the_end(shell: Shell, app: Application) -> None:
    # behaviour: C2
    workflow = approving(app)
    workflow_id = shell.begin(workflow)
    send(shell, workflow_id, "approved", Approval("ada", 1), key="once")
    send(shell, workflow_id, "unread", key="once")
    shell.finish(workflow, workflow_id)
    for name in ("approved", "unread"):
        send(shell, workflow_id, name, Approval("ada", 2), key="once")
    for name, key in (("approved", None), ("approved", "another"), ("other", "once")):
        with pytest.raises(errors.WorkflowFinishedError, match="Nothing was sent"):
            send(shell, workflow_id, name, key=key)
    assert [(each.name, each.consumed_by) for each in signals_of(shell)] == [
        ("approved", "signal:approved"),
        ("unread", None),
    ]


@pytest.mark.shells(("worker", "async-worker"))
def test_step_sends_a_signal_of_a_known_key_after_the_end(shell: Shell, app: Application) -> None:
    receiver = approving(app)
    receiver_id = shell.begin(receiver)
    send(shell, receiver_id, "approved", Approval("ada", 1), key="once")
    shell.finish(receiver, receiver_id)

    def approve(session: Session) -> None:
        send_signal(session, receiver_id, "approved", Approval("ada", 2), key="once")

    step = app.transactional(approve)

    async def sender() -> str:
        await step()
        return "sent"

    assert shell.run(app.workflow(sender)) == "sent"


@WORKERS
def test_signal_that_does_not_come_in_time_is_an_error_also_on_replay(shell: Shell, app: Application) -> None:
    # behaviour: C1
    async def patient() -> str:
        try:
            await awaited(either.wait_signal("approved", timeout=WEEK))
        except errors.WaitTimeoutError as late:
            await awaited(either.wait_signal("late"))
            return str(late)
        return "in time"

    workflow = app.workflow(patient)
    workflow_id = shell.begin(workflow)
    with shell.background():
        wait_until_suspended(shell, workflow_id)
        with shell.sessionmaker.begin() as session:
            advance(session, WEEK)
        races.wait_until(lambda: shell.one(workflow_id).awaits == [{"signal": "late"}], what="the second wait")
        send(shell, workflow_id, "approved")  # too late, and it stays
        send(shell, workflow_id, "late")
        assert shell.result(workflow, workflow_id) == "no signal 'approved' arrived within 7 days, 0:00:00."
    assert [each.consumed_by for each in signals_of(shell)] == [None, "signal:late"]


@WORKERS
def test_signal_in_time_ends_the_time_limit(shell: Shell, app: Application) -> None:
    workflow = approving(app, timeout=WEEK)
    workflow_id = shell.begin(workflow)
    with shell.background():
        wait_until_suspended(shell, workflow_id)
        send(shell, workflow_id, "approved", Approval("ada", 5))
        assert shell.result(workflow, workflow_id) == Approval("ada", 5)
    record = shell.one(workflow_id)
    assert (record.wake_at, record.awaits, record.steps[0].wake_at) == (None, None, None)


@COMMITTING
def test_insert_by_sql_is_a_signal(shell: Shell, app: Application, durable_schema: str) -> None:
    workflow = approving(app)
    workflow_id = shell.begin(workflow)
    with shell.background():
        with shell.engine.begin() as connection:
            connection.execute(
                text(
                    f"INSERT INTO {durable_schema}.signal (workflow_id, name, payload) "
                    """VALUES (:id, 'approved', '{"by": "sql", "cents": 1}')"""
                ),
                {"id": workflow_id},
            )
        assert shell.result(workflow, workflow_id) == Approval("sql", 1)


def test_payload_that_does_not_fit_is_an_error_of_the_receiver(shell: Shell, app: Application) -> None:
    workflow = approving(app)
    workflow_id = shell.begin(workflow)
    send(shell, workflow_id, "approved", {"by": "ada"})
    with pytest.raises(errors.DecodingError, match=r"payload of signal 'approved' does not fit .*or wait for the type"):
        shell.finish(workflow, workflow_id)


@WORKERS
def test_dead_listener_is_survived_by_polling(shell: Shell, app: Application) -> None:
    # behaviour: C1
    workflow = approving(app)
    workflow_id = shell.begin(workflow)
    with shell.background(listen=False):
        wait_until_suspended(shell, workflow_id)
        send(shell, workflow_id, "approved", Approval("ada", 5))
        assert shell.result(workflow, workflow_id) == Approval("ada", 5)


@WORKERS
def test_taken_signal_is_the_same_after_a_crash(shell: Shell, app: Application) -> None:
    # behaviour: E8
    def risky() -> None:
        raise LookupError

    step = app.plain(risky)

    async def two() -> list[int]:
        first = await awaited(either.wait_signal("item", int))
        with suppress(LookupError):
            await step()
        return [first, await awaited(either.wait_signal("item", int))]

    workflow = app.workflow(two)
    workflow_id = shell.begin(workflow)
    send(shell, workflow_id, "item", 1)
    with shell.background():
        wait_until_suspended(shell, workflow_id)
    shell.crashed(workflow_id)
    send(shell, workflow_id, "item", 2)
    assert shell.finish(workflow, workflow_id) == [1, 2]


@pytest.mark.shells(("joined", "async-joined"))
def test_joined_executor_does_not_wait_for_what_nobody_can_send(shell: Shell, app: Application) -> None:
    with pytest.raises(errors.UsageError, match="would wait for what others do"):
        shell.run(approving(app))


def test_start_with_a_signal_finds_the_workflow_of_a_known_key(shell: Shell, app: Application) -> None:
    workflow = approving(app).options(key="order 7")
    with shell.sessionmaker.begin() as session:
        first = start_with_signal(session, workflow.bind(), "approved", Approval("ada", 1)).id
    with shell.sessionmaker.begin() as session:
        assert start_with_signal(session, workflow.bind(), "approved", Approval("ada", 2)).id == first
    assert shell.finish(workflow, first) == Approval("ada", 1)
    with shell.sessionmaker.begin() as session, pytest.raises(errors.WorkflowFinishedError):
        start_with_signal(session, workflow.bind(), "approved")


def test_start_with_a_signal_of_a_known_key_finds_the_workflow_that_has_ended(shell: Shell, app: Application) -> None:
    workflow = approving(app).options(key="order 7")
    found = set[UUID]()
    for cents in (1, 2):
        with shell.sessionmaker.begin() as session:
            found.add(start_with_signal(session, workflow.bind(), "approved", Approval("ada", cents), key="once").id)
        assert shell.finish(workflow, *found) == Approval("ada", 1)


@pytest.mark.parametrize(("name", "payload"), [("", None), ("#a", None), ("approved", object())])
def test_start_with_a_signal_that_cannot_be_sent_starts_nothing(
    shell: Shell, app: Application, name: str, payload: object
) -> None:
    workflow = approving(app)
    with shell.sessionmaker.begin() as session:
        with pytest.raises(errors.PayloadError):
            start_with_signal(session, workflow.bind(), name, payload)
        assert session.scalars(select(Workflow)).all() == []


def test_start_with_a_signal_takes_what_bind_gives(shell: Shell, app: Application) -> None:
    with shell.sessionmaker() as session, pytest.raises(errors.ArgumentError, match=r"expected workflow.bind\(...\)"):
        start_with_signal(session, approving(app), "approved")  # type: ignore[arg-type]


@pytest.mark.shells(("worker", "async-worker"))
def test_what_a_step_starts_with_a_signal_is_a_child(shell: Shell, app: Application) -> None:
    approval = approving(app)

    def ask(session: Session) -> None:
        start_with_signal(session, approval.bind(), "approved", Approval("ada", 1))

    asks = app.transactional(ask)

    async def parent() -> None:
        await asks()

    shell.run(app.workflow(parent))
    with shell.sessionmaker() as session:
        child = session.scalars(select(Workflow).where(Workflow.parent_id.is_not(None))).one()
        assert child.parent is not None


# Bad input


def test_unknown_workflow_is_not_found_and_the_transaction_goes_on(session: Session) -> None:
    with pytest.raises(errors.NotFoundError, match="Nothing was sent"):
        send_signal(session, uuid4(), "approved")
    (known,) = races.enqueue(session)
    with pytest.raises(errors.NotFoundError):
        send_signal(session, [known, uuid4()], "approved")
    assert session.scalars(select(Signal)).all() == []


def test_finished_workflow_takes_no_signal(session: Session) -> None:
    (known,) = races.enqueue(session)
    session.execute(text("UPDATE durable.workflow SET status = 'cancelled', finished_at = now()"))
    with pytest.raises(errors.WorkflowFinishedError, match="which was cancelled"):
        send_signal(session, known, "approved")


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_known_signal_to_several_is_sent_to_the_others(engine: Engine, level: str) -> None:
    with Session(engine) as session:
        ended, open_ = races.enqueue(session, 2)
        send_signal(session, ended, "approved", 1, key="once")
        races.cancel(session, ended)
        session.commit()
    with Session(engine.execution_options(isolation_level=level)) as session:
        send_signal(session, [ended, open_], "approved", 2, key="once")
        send_signal(session, [ended, open_], "approved", 3, key="once")
        found = session.execute(select(Signal.workflow_id, Signal.payload).where(Signal.name == "approved"))
        assert {each.workflow_id: each.payload for each in found} == {ended: 1, open_: 2}


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
def test_workflow_that_ends_while_a_known_signal_is_sent_again(engine: Engine, level: str) -> None:
    """Whether the sender's snapshot is older than the end, or newer."""
    with Session(engine) as session:
        (known,) = races.enqueue(session)
        send_signal(session, known, "approved", 1, key="once")
        session.commit()
    with Session(engine.execution_options(isolation_level=level)) as session, Session(engine) as other:
        session.execute(text("SELECT 1"))
        races.cancel(other, known)
        other.commit()
        send_signal(session, known, "approved", 2, key="once")
        assert session.scalars(select(Signal.payload).where(Signal.name == "approved")).all() == [1]


def test_workflow_that_continued_as_new_knows_the_key_of_what_it_took_before(session: Session) -> None:
    durable = Durable()

    @durable.workflow
    def approve(number: int) -> int:
        if number == 1:
            found = wait_signal("approved", int)
            approve.continue_as_new(found + 1)
        return number

    with session:
        approval = approve.start(session, 1).id
        send_signal(session, approval, "approved", 6, key="once")
        session.commit()
        assert Executor(session).execute(approve, approval) == 7
        send_signal(session, approval, "approved", 8, key="once")
        session.commit()


def test_signal_to_several_is_one_statement(session: Session) -> None:
    # behaviour: C3
    known = races.enqueue(session, 3)
    send_signal(session, known, "approved", 7)
    assert [(each.workflow_id, each.payload) for each in session.scalars(select(Signal))] == [
        (each, 7) for each in sorted(known)
    ]


@pytest.mark.parametrize("name", ["", " ", "#a", "/" * 400, "nul\0"])
def test_name_that_cannot_be_one_is_refused(session: Session, name: str) -> None:
    with pytest.raises(errors.ArgumentError, match="the signal name"):
        send_signal(session, uuid4(), name)
    with pytest.raises(errors.ArgumentError, match="the signal name"):
        wait_signal(name)


@pytest.mark.parametrize("payload", [float("nan"), "nul\0", "\ud800", object()])
def test_payload_that_cannot_be_stored_is_refused(session: Session, payload: object) -> None:
    # behaviour: C6
    (known,) = races.enqueue(session)
    with pytest.raises(errors.EncodingError, match="payload of signal 'approved'"):
        send_signal(session, known, "approved", payload)


def test_payload_that_is_too_large_is_refused(session: Session) -> None:
    (known,) = races.enqueue(session)
    with pytest.raises(errors.PayloadTooLargeError):
        send_signal(session, known, "approved", "x" * 2_000_000)


@pytest.mark.parametrize("given", ["text", 7, None, [None]])
def test_what_is_no_workflow_is_refused(session: Session, given: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="is no workflow"):
        send_signal(session, given, "approved")


def test_session_comes_first() -> None:
    with pytest.raises(errors.SessionError, match="the caller's Session or AsyncSession comes first"):
        send_signal("nothing", uuid4(), "approved")  # type: ignore[arg-type]


def signals_of(shell: Shell) -> list[Signal]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Signal).order_by(Signal.id)))
