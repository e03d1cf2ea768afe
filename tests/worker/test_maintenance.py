"""When a worker acts: at the time that something is due, by a hint, or by a poll."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, delete, event, text
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import Durable, Signal, Worker, Workflow, WorkflowStatus, manage, start_many, wait_signal
from sqla_durable.models import Worker as WorkerRecord
from sqla_durable.store import hints
from tests.acceptance.shells import PATIENCE, POLL
from tests.store import races
from tests.support import notifications
from tests.support.statements import executed_on

Sessions = sessionmaker[Session]

NEVER = timedelta(hours=1)  # no poll comes within a test
OFTEN = timedelta(seconds=0.02)  # the backlog takes longer than ten polls, after which claims begin at the front

durable = Durable()


@durable.workflow
def hello() -> str:
    return "hello"


@pytest.fixture
def engine(database_url: str, server_url: str) -> Generator[Engine]:
    """Past PgBouncer, through which no hint comes."""
    engine = create_engine(notifications.direct(database_url, server_url), pool_size=20)
    yield engine
    engine.dispose()


@pytest.fixture
def one_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no claim follow on one that found nothing: what is started just then would be found by accident."""
    monkeypatch.setattr("sqla_durable.execution.worker.claims.CLAIM_PAUSES", ())


def started(maker: Sessions, **options: Any) -> UUID:
    with maker.begin() as session:
        record = hello.options(**options).start(session)
        session.flush()
        return record.id


def worker(maker: Sessions, **settings: object) -> Worker:
    chosen = {"poll_interval": NEVER, **settings}
    return Worker(durable, sessionmaker=maker, **chosen)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@contextmanager
def idle(engine: Engine, worker: Worker) -> Generator[None]:
    """A worker that has claimed, looked at its start, and looked again after its LISTEN: only hints reach it now."""
    claimed, looked = threading.Semaphore(0), threading.Semaphore(0)

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "claimable AS" in statement:
            claimed.release()
        if "next_due_in" in statement:
            looked.release()

    event.listen(engine, "after_cursor_execute", note)
    with worker:
        for each in (claimed, looked, looked):
            assert each.acquire(timeout=60)
        yield
    event.remove(engine, "after_cursor_execute", note)


def finish(maker: Sessions, workflow_id: UUID) -> None:
    assert hello.handle(maker, workflow_id).result(timeout=PATIENCE) == "hello"


@pytest.mark.usefixtures("one_claim")
def test_what_is_started_is_executed_without_a_poll(engine: Engine, session_factory: Sessions) -> None:
    with idle(engine, worker(session_factory)):
        for _ in range(3):
            finish(session_factory, started(session_factory))


def test_a_timer_is_awaited_and_not_polled_for(session_factory: Sessions) -> None:
    workflow_id = started(session_factory, delay=timedelta(seconds=0.5))
    with worker(session_factory):
        finish(session_factory, workflow_id)


@pytest.mark.usefixtures("one_claim")
def test_a_hint_announces_a_timer_that_comes_before_the_next_one_known(
    engine: Engine, session_factory: Sessions
) -> None:
    started(session_factory, delay=NEVER)
    with idle(engine, worker(session_factory)):
        finish(session_factory, started(session_factory, delay=timedelta(seconds=0.5)))


@pytest.mark.usefixtures("one_claim")
def test_what_is_resumed_is_executed_without_a_poll(engine: Engine, session_factory: Sessions) -> None:
    workflow_id = started(session_factory, queue="elsewhere")
    with session_factory.begin() as session:
        manage.cancel(session, workflow_id)
    with idle(engine, worker(session_factory, queues=["elsewhere"])):
        with session_factory.begin() as session:
            manage.resume(session, workflow_id)
        finish(session_factory, workflow_id)


@pytest.mark.usefixtures("one_claim")
def test_a_signal_is_delivered_at_once_and_nothing_else_is_looked_for(
    engine: Engine, session_factory: Sessions
) -> None:
    waiting = Durable()

    @waiting.workflow(name="wait_twice")
    def wait_twice() -> list[int]:
        return [wait_signal("go", int), wait_signal("go", int)]

    with session_factory.begin() as session:
        record = wait_twice.start(session)
        session.flush()
        workflow_id = record.id

    def is_suspended() -> bool:
        with session_factory() as session:
            return session.get_one(Workflow, workflow_id).awaits is not None

    # Another worker suspends it: a poll of that worker follows, at some time.
    with Worker(waiting, sessionmaker=session_factory):
        races.wait_until(is_suspended, what="the suspension")
    with (
        idle(engine, Worker(waiting, sessionmaker=session_factory, poll_interval=NEVER)),
        executed_on(engine) as executed,
    ):
        with session_factory.begin() as session:  # by SQL: after a slow commit a sender asks for a look, too
            session.add_all([Signal(workflow_id=workflow_id, name="go", payload=each) for each in (1, 2)])
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            hints.notify(connection, [(hints.channel_on(connection), hints.sent_to(workflow_id, "go"))])
        assert wait_twice.handle(session_factory, workflow_id).result(timeout=PATIENCE) == [1, 2]
    assert [each for each in executed if "next_due_in" in each.statement] == []


def test_hints_of_signals_that_keep_coming_keep_nothing_else_waiting(engine: Engine, session_factory: Sessions) -> None:
    """A timer is due, and hints come faster than they are acted on."""
    workflow_id = started(session_factory, delay=timedelta(seconds=0.3))
    over = threading.Event()

    def keep_hinting() -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not over.is_set():
                hints.notify(connection, [(hints.channel_on(connection), hints.SENT)])

    with worker(session_factory):
        hinting = races.Concurrent(keep_hinting)
        try:
            finish(session_factory, workflow_id)
        finally:
            over.set()
            hinting.result()


@pytest.mark.usefixtures("one_claim")
def test_a_poll_asks_for_what_is_claimable_while_the_claims_take_what_signals_were_sent_to(
    engine: Engine, session_factory: Sessions
) -> None:
    """No claim of what is in the queues follows on that one."""
    claiming, polled, gate = threading.Event(), threading.Event(), threading.Event()

    def hold(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "waiting AS" in statement and "claimable AS" in statement:
            claiming.set()
            assert gate.wait(60)

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "next_due_in" in statement:
            polled.set()

    with (
        idle(engine, worker(session_factory)),
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
    ):
        channel = hints.channel_on(connection)
        with Session(engine) as session:
            (workflow_id,) = races.enqueue(session, name="hello")  # nobody hints that it is there
        event.listen(engine, "before_cursor_execute", hold)
        event.listen(engine, "after_cursor_execute", note)
        try:
            while not claiming.wait(0.01):
                hints.notify(connection, [(channel, hints.sent_to(uuid7(), "go"))])
            hints.notify(connection, [(channel, hints.sent_to(uuid7(), "go"))])
            hints.notify(connection, [(channel, hints.EVERYWHERE)])
            assert polled.wait(60)
        finally:
            gate.set()
            event.remove(engine, "before_cursor_execute", hold)
            event.remove(engine, "after_cursor_execute", note)
        finish(session_factory, workflow_id)


def test_without_listening_a_poll_finds_it(session_factory: Sessions) -> None:
    with worker(session_factory, listen=False, poll_interval=POLL):
        finish(session_factory, started(session_factory))


@pytest.mark.usefixtures("one_claim")
def test_what_a_stopping_worker_releases_is_claimed_by_another_without_a_poll(
    engine: Engine, session_factory: Sessions
) -> None:
    entered, gate = threading.Event(), threading.Event()
    holding = Durable()

    @holding.step
    def hold() -> None:
        entered.set()
        assert gate.wait(60)

    @holding.workflow(name="hold_twice")
    def hold_twice() -> str:
        hold()
        hold()
        return "done"

    with session_factory.begin() as session:
        record = hold_twice.start(session)
        session.flush()
        workflow_id = record.id
    one = Worker(holding, sessionmaker=session_factory, poll_interval=NEVER)
    with idle(engine, one):
        assert entered.wait(60)
        with idle(engine, Worker(holding, sessionmaker=session_factory, poll_interval=NEVER)):
            one.stop()
            gate.set()
            assert hold_twice.handle(session_factory, workflow_id).result(timeout=PATIENCE) == "done"


def test_a_worker_that_leaves_gives_its_hint_in_a_transaction_of_its_own(
    engine: Engine, session_factory: Sessions
) -> None:
    """Also where the database's default makes them transactions: NOTIFY holds a lock of the whole database."""
    done: list[str] = []

    def execute(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        done.append(statement)

    def commit(_connection: object) -> None:
        done.append("COMMIT")

    event.listen(engine, "after_cursor_execute", execute)
    event.listen(engine, "commit", commit)
    with worker(session_factory):
        pass
    *before, notify, last = done
    assert "pg_notify" in notify
    assert before[-1] == last == "COMMIT"


def test_a_lease_that_somebody_has_deleted_is_inserted_again_at_the_next_poll(
    session_factory: Sessions, engine: Engine
) -> None:
    with worker(session_factory, poll_interval=POLL) as deleted:
        with Session(engine) as session, session.begin():
            session.execute(delete(WorkerRecord).where(WorkerRecord.id == deleted.id))
        with Session(engine) as session:
            races.wait_until(lambda: races.is_alive(session, deleted.id), what="the lease")


def test_what_belongs_to_a_worker_that_nobody_remembers_is_reclaimed_at_a_beat(
    session_factory: Sessions, engine: Engine
) -> None:
    with worker(session_factory, poll_interval=POLL, lease=timedelta(seconds=1)):
        workflow_id = started(session_factory, queue="nobody's")
        with Session(engine) as session, session.begin():
            running = text(
                "UPDATE durable.workflow SET status = 'running', token = gen_random_uuid(), "
                "worker_id = gen_random_uuid(), started_at = statement_timestamp()"
            )
            session.execute(running)
        races.wait_until(lambda: races.status_of(engine, workflow_id) is WorkflowStatus.PENDING, seconds=30)


def test_what_commits_late_or_has_a_higher_priority_is_claimed_before_the_backlog_ends(
    session_factory: Sessions, engine: Engine
) -> None:
    """Both stand before the place that the claims have reached; they begin at the front once a poll."""
    counting = Durable()
    order: list[str] = []
    reached, gate = threading.Event(), threading.Event()

    @counting.workflow
    def note(name: str) -> None:
        order.append(name)
        if len(order) == 6:
            reached.set()
            assert gate.wait(60)

    with Session(engine) as late:
        note.start(late, "late")
        late.flush()
        with session_factory.begin() as session:
            for number in range(600):
                note.start(session, str(number))
        with Worker(counting, sessionmaker=session_factory, concurrency=1, poll_interval=OFTEN):
            assert reached.wait(60)
            late.commit()
            with session_factory.begin() as session:
                note.options(priority=-1).start(session, "urgent")
            gate.set()
            races.wait_until(lambda: len(order) == 602, seconds=60)
    assert {"late", "urgent"} <= set(order[6:-50])


@pytest.mark.parametrize(
    ("threshold", "listen", "listens"), [(5, None, True), (None, None, False), (None, True, True), (5, False, False)]
)
def test_a_worker_listens_unless_a_pooler_is_in_between_or_a_setting_says_otherwise(
    database_url: str, engine: Engine, threshold: int | None, listen: bool | None, listens: bool
) -> None:
    own = create_engine(database_url, connect_args={"prepare_threshold": threshold, "application_name": "own"})
    listening = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'own' AND query ~* '^listen'")
    with worker(sessionmaker(translated(own, engine)), listen=listen), Session(engine) as session:
        if listens:
            races.wait_until(lambda: session.scalar(listening), what="the LISTEN")
        else:
            workflow_id = started(sessionmaker(translated(own, engine)))
            with worker(sessionmaker(translated(own, engine)), poll_interval=POLL, listen=False):
                finish(sessionmaker(translated(own, engine)), workflow_id)
            assert not session.scalar(listening)
    own.dispose()


def translated(own: Engine, like: Engine) -> Engine:
    return own.execution_options(**like.get_execution_options())


def test_a_worker_whose_claims_follow_each_other_does_not_poll_the_queues(
    session_factory: Sessions, engine: Engine
) -> None:
    """Its claims begin at the front once a second; a look would pass over the same dead entries once more."""
    holding, entered, gate = Durable(), threading.Event(), threading.Event()
    looked: list[bool] = []

    @holding.step
    def hold() -> None:
        entered.set()
        assert gate.wait(60)

    @holding.workflow(name="hold_once")
    def hold_once() -> None:
        hold()

    def note(_connection: object, _cursor: object, statement: str, parameters: dict[str, str], *_: object) -> None:
        if "next_due_in" in statement:
            looked.append(parameters["wanted_rows"] != "[]")

    with session_factory.begin() as session:
        start_many(session, [hold_once.bind(), hold_once.bind()])
    event.listen(engine, "before_cursor_execute", note)
    with Worker(holding, sessionmaker=session_factory, poll_interval=POLL, concurrency=1):
        assert entered.wait(60)
        before = len(looked) + 1
        races.wait_until(lambda: len(looked) > before + 3)
        gate.set()
    event.remove(engine, "before_cursor_execute", note)
    assert not any(looked[before : before + 3])
