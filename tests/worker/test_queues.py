"""Which workflow a worker takes next."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, func, select, update
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Queue, Worker, Workflow, WorkflowStatus, manage, start_many
from sqla_durable.execution.worker import subscribed
from sqla_durable.execution.worker import worker as worker_module
from sqla_durable.execution.worker.subscribed import Subscribed
from sqla_durable.store import hints
from tests.acceptance.shells import PATIENCE, POLL
from tests.store.races import wait_until

Sessions = sessionmaker[Session]


class Log:
    """Workflows that note the order in which they are executed."""

    def __init__(self, queue: str = "default") -> None:
        self.durable = Durable()
        self.order: list[str] = []

        def note(name: str) -> None:
            self.order.append(name)

        self.note = self.durable.workflow(note, queue=queue)

    def work_until_finished(self, maker: Sessions, count: int, **options: object) -> None:
        with Worker(self.durable, sessionmaker=maker, poll_interval=POLL, concurrency=1, **options):  # type: ignore[arg-type]  # pyright: ignore
            with maker() as session:
                ids = session.scalars(select(Workflow.id)).all()
            for each in ids[:count]:
                self.note.handle(maker, each).result(timeout=PATIENCE)


# behaviour: Q1
def test_first_in_is_first_out_within_a_priority(session_factory: Sessions) -> None:
    log = Log()
    priorities = {"c1": 5, "a1": -5, "b1": 0, "a2": -5, "c2": 5, "b2": 0, "b3": 0}
    for name, priority in priorities.items():
        with session_factory.begin() as session:
            log.note.options(priority=priority).start(session, name)
    log.work_until_finished(session_factory, len(priorities))
    assert log.order == ["a1", "a2", "b1", "b2", "b3", "c1", "c2"]


# behaviour: Q1
def test_order_of_one_start_many_is_kept(session_factory: Sessions) -> None:
    log = Log()
    names = [f"n{number}" for number in range(20)]
    with session_factory.begin() as session:
        start_many(session, (log.note.bind(name) for name in names))
    log.work_until_finished(session_factory, len(names))
    assert log.order == names


# behaviour: Q9
def test_worker_claims_from_its_queues_only(session_factory: Sessions) -> None:
    log = Log()
    with session_factory.begin() as session:
        log.note.options(queue="mine").start(session, "mine")
        other = log.note.options(queue="not yet there").start(session, "other").id
    with Worker(log.durable, sessionmaker=session_factory, poll_interval=POLL, queues=["mine"]):
        with session_factory.begin() as session:
            last = log.note.options(queue="mine").start(session, "last").id
        log.note.handle(session_factory, last).result(timeout=PATIENCE)
    assert log.order == ["mine", "last"]
    with session_factory() as session:
        assert session.get_one(Workflow, other).status is WorkflowStatus.PENDING


def test_queues_of_the_workflows_are_the_default(session_factory: Sessions) -> None:
    assert Worker(Log("shipping").durable, sessionmaker=session_factory).queues == ["default", "shipping"]
    assert Worker(Durable(), sessionmaker=session_factory, queues="one").queues == ["one"]


@pytest.mark.parametrize("queues", [[], "", " ", ["a", " "]])
def test_blank_queues_are_refused(session_factory: Sessions, queues: list[str] | str) -> None:
    with pytest.raises(ValueError, match="names no queue: give at least one, or leave it out"):
        Worker(Durable(), sessionmaker=session_factory, queues=queues)


def test_paused_queue_is_passed_over_until_it_is_resumed(session_factory: Sessions) -> None:
    log = Log()
    with session_factory.begin() as session:
        session.add(Queue(name="paused", paused_at=session.scalar(select(func.statement_timestamp()))))
        paused = log.note.options(queue="paused", priority=-9).start(session, "paused").id
        open_id = log.note.start(session, "open").id
    with Worker(log.durable, sessionmaker=session_factory, poll_interval=POLL, queues=["default", "paused"]):
        log.note.handle(session_factory, open_id).result(timeout=PATIENCE)
        with session_factory.begin() as session:
            assert session.get_one(Workflow, paused).status is WorkflowStatus.PENDING
            session.get_one(Queue, "paused").paused_at = None
        log.note.handle(session_factory, paused).result(timeout=PATIENCE)
    assert log.order == ["open", "paused"]


# behaviour: Q12
def test_claim_is_bounded_by_free_slots(session_factory: Sessions) -> None:
    durable = Durable()
    running = threading.Semaphore(0)
    go_on = threading.Event()

    @durable.workflow
    def hold() -> None:
        running.release()
        assert go_on.wait(60)

    with session_factory.begin() as session:
        ids = [hold.start(session).id for _ in range(7)]
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL, concurrency=3):
        for _ in range(3):
            assert running.acquire(timeout=30)
        with session_factory() as session:
            counts = select(Workflow.status, func.count()).group_by(Workflow.status)
            assert dict(session.execute(counts).all()) == {
                WorkflowStatus.RUNNING: 3,
                WorkflowStatus.PENDING: 4,
            }
        go_on.set()
        for each in ids:
            hold.handle(session_factory, each).result(timeout=PATIENCE)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"transactions": 0}, "transactions must be at least 1, got 0"),
        ({"max_attempts": 0}, "max_attempts must be at least 1, got 0"),
        ({"lease": timedelta()}, "lease must be longer than zero, got 0 seconds"),
        ({"poll_interval": timedelta(-1)}, "poll_interval must be longer than zero, got -86400 seconds"),
    ],
)
def test_settings_out_of_range_are_refused(session_factory: Sessions, setting: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Worker(Durable(), sessionmaker=session_factory, **setting)  # type: ignore[arg-type]  # pyright: ignore


def test_histories_that_are_too_long_to_arrive_together_are_read_of_fewer(session_factory: Sessions) -> None:
    log = Log()
    count = 40
    with session_factory.begin() as session:
        start_many(session, (log.note.bind(str(number)) for number in range(count)))
        session.execute(update(Workflow).values(started_at=func.statement_timestamp()))
        engine = session.get_bind().engine

    def refuse(_connection: object, _cursor: object, _statement: str, parameters: Any, *_: object) -> None:
        if len(parameters.get("ids", ())) > 10:
            raise TimeoutError("no answer in time")

    event.listen(engine, "before_cursor_execute", refuse)
    with Worker(log.durable, sessionmaker=session_factory, poll_interval=POLL):
        with session_factory() as session:
            ids = session.scalars(select(Workflow.id)).all()
        for each in ids:
            log.note.handle(session_factory, each).result(timeout=PATIENCE)
    assert len(log.order) == count


def test_what_is_more_urgent_overtakes_a_backlog_however_seldom_the_worker_polls(session_factory: Sessions) -> None:
    durable = Durable()
    order: list[int] = []

    @durable.workflow
    def note(priority: int) -> None:
        order.append(priority)
        time.sleep(0.02)  # the backlog lasts for longer than a cursor is followed

    with session_factory.begin() as session:
        start_many(session, (note.bind(0) for _ in range(150)))
    with Worker(durable, sessionmaker=session_factory, poll_interval=timedelta(hours=1), concurrency=1):
        wait_until(lambda: len(order) > 5)
        with session_factory.begin() as session:
            record = note.options(priority=-1).start(session, -1)
            session.flush()
            urgent = record.id
        note.handle(session_factory, urgent).result(timeout=PATIENCE)
        assert len(order) < 140


def test_a_pattern_finds_queues_that_come_later(session_factory: Sessions) -> None:
    log = Log()
    with session_factory.begin() as session:
        log.note.options(queue="mail.a").start(session, "before")
        other = log.note.options(queue="email.a").start(session, "other").id
    with Worker(log.durable, sessionmaker=session_factory, poll_interval=POLL, queues=["mail.*"], name="ada"):
        wait_until(lambda: log.order == ["before"])
        with session_factory.begin() as session:
            manage.put_queue(session, "mail.b", concurrency=1)
            log.note.options(queue="mail.b").start(session, "limited")
        wait_until(lambda: log.order == ["before", "limited"])
        with session_factory() as session:
            assert session.get_one(Workflow, other).status is WorkflowStatus.PENDING


@pytest.mark.parametrize("listen", [True, False])
def test_a_hint_or_a_poll_finds_a_queue_that_fits_a_pattern(session_factory: Sessions, listen: bool) -> None:
    log = Log()
    interval = timedelta(hours=1) if listen else POLL
    options: dict[str, Any] = {"poll_interval": interval, "listen": listen, "queues": "*", "versions": "1"}
    with Worker(log.durable, sessionmaker=session_factory, **options):
        with session_factory.begin() as session:
            first = log.note.options(queue="new").start(session, "first").id
        log.note.handle(session_factory, first).result(timeout=PATIENCE)


def test_explanations_know_the_patterns_of_a_worker(session_factory: Sessions) -> None:
    log = Log()
    worker = Worker(log.durable, sessionmaker=session_factory, queues="a.*")
    with worker, session_factory() as session:  # rolled back: no worker has seen the queue
        first = log.note.options(queue="a.b").start(session, "first").id
        session.flush()
        assert manage.explain_pending(session, first)[0].startswith("nothing keeps it")


def test_a_star_stands_for_any_text_and_nothing_else_does() -> None:
    queues = Subscribed(["plain", "a.*", "*[x]?"])
    assert [*queues] == ["plain"]
    queues.note(["plain", "a.", "a.b.c", "b.a.", "1[x]?", "1x?", "ax"])
    assert [*queues] == ["plain", "a.", "a.b.c", "1[x]?"]
    assert len(queues) == 4
    assert not Subscribed(["plain"]).fits("other")


def watched_queues(monkeypatch: pytest.MonkeyPatch, *given: str) -> Subscribed:
    """Return the queues that the next worker claims from, which change while it goes on."""
    queues = Subscribed(given)

    def same(_: object) -> Subscribed:
        return queues

    monkeypatch.setattr(worker_module, "Subscribed", same)
    return queues


def test_a_hint_adds_no_queue(engine: Engine, session_factory: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody who may connect can send hints, and each queue makes the claims longer."""
    log, queues = Log(), watched_queues(monkeypatch, "*")
    with Worker(log.durable, sessionmaker=session_factory, poll_interval=timedelta(hours=1), queues="*"):
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            channel = hints.channel_on(connection)
            hints.notify(connection, [(channel, hints.to_queue(f"forged{number}")) for number in range(100)])
        with session_factory.begin() as session:
            first = log.note.options(queue="new").start(session, "first").id  # its hint comes after those
        log.note.handle(session_factory, first).result(timeout=PATIENCE)
        assert [*queues] == ["new"]


def test_a_queue_in_which_nothing_waits_is_left_out_and_found_again(
    session_factory: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscribed, "_FORGET_AFTER", 0.0)
    queues = watched_queues(monkeypatch, "plain", "a.*")
    queues.note(["a.b", "a.c"])
    queues.note(["a.c"])
    assert [*queues] == ["plain", "a.c"]
    log = Log()
    with Worker(log.durable, sessionmaker=session_factory, poll_interval=POLL, queues="a.*"):
        for name in ("first", "second"):
            with session_factory.begin() as session:
                started = log.note.options(queue="a.b").start(session, name).id
            log.note.handle(session_factory, started).result(timeout=PATIENCE)
            wait_until(lambda: [*queues] == ["plain"])


def test_a_worker_stops_when_its_queues_are_empty(session_factory: Sessions) -> None:
    log = Log("burst")
    log.durable.queue("burst", concurrency=1)
    with session_factory.begin() as session:
        names = [f"n{number}" for number in range(5)]
        start_many(session, [log.note.bind(name) for name in names])
        log.note.options(delay=timedelta(days=1)).start(session, "later")
        log.note.options(queue="elsewhere").start(session, "other")
    Worker(log.durable, sessionmaker=session_factory, poll_interval=POLL, until_empty=True).run()
    assert log.order == names
    Worker(log.durable, sessionmaker=session_factory, poll_interval=POLL, until_empty=True).run()
    assert log.order == names
