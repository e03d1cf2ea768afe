"""Workers that fire schedules: what they start, what they leave alone, and what does not stop them."""

from __future__ import annotations

import ast
import asyncio
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow, current, manage
from sqla_durable.definitions.schedules import Tick, decide
from sqla_durable.execution.worker.schedules import (
    _cancel_first,  # pyright: ignore[reportPrivateUsage]
    _Outdated,  # pyright: ignore[reportPrivateUsage]
)
from sqla_durable.models import Schedule
from sqla_durable.store import hints, schedules
from tests.acceptance.shells import POLL
from tests.store import races
from tests.support import notifications
from tests.support.schedules import HOUR, insert, insert_due, make_due, row_of, started_by
from tests.support.statements import executed_on
from tests.test_architecture import SOURCES
from tests.worker.ticking import (
    Application,
    Sessions,
    has,
    until,
    until_finished,
    until_planned,
    until_polled,
    until_started,
)

# What ticks start


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
def test_a_declared_schedule_is_in_the_table_when_the_worker_has_started_and_ticks(
    engine: Engine, session_factory: Sessions
) -> None:
    # behaviour: D1
    application = Application()
    application.durable.schedule("0 3 * * *", tz="Europe/Berlin", arguments={"cents": 5})(application.checkout)
    with application.worker(session_factory):
        row = row_of(engine, "checkout")
        assert (row.workflow, row.cron, row.tz, row.input) == ("checkout", ["0 3 * * *"], "Europe/Berlin", {"cents": 5})
        assert row.declared
        assert until_planned(engine, "checkout") > datetime.now(UTC)
        make_due(engine, "checkout")
        until_finished(engine, 1, "checkout")
        make_due(engine, "checkout")
        until_finished(engine, 2, "checkout")
    first, second = application.ticks
    assert first is not None
    assert second is not None
    assert (first.schedule, first.previous) == ("checkout", None)
    assert (second.previous, application.given) == (first.at, [5, 5])
    assert (second.at, row_of(engine, "checkout").last_at) == (row_of(engine, "checkout").last_at, second.at)
    with Session(engine) as session:
        assert [each.key for each in session.get_one(Schedule, "checkout").workflows] == [
            f"schedule checkout {each.at.isoformat()}" for each in (first, second)
        ]


@pytest.mark.parametrize(
    ("async_driver", "durable_schema", "overlap"),
    [
        ("psycopg", "durable", "skip"),
        ("asyncpg", "tenant_7", "skip"),
        ("asyncpg", "durable", "cancel_running"),
        ("psycopg", "tenant_7", "cancel_running"),
    ],
    indirect=["async_driver", "durable_schema"],
)
async def test_it_does_so_on_the_event_loop(engine: Engine, async_engine: AsyncEngine, overlap: Any) -> None:
    durable, ticks = Durable(), list[Tick | None]()

    @durable.schedule(every=HOUR, overlap=overlap, jitter=timedelta(seconds=5), excluding=["2020-12-25"])
    @durable.workflow
    async def checkout() -> None:
        execution = current()
        assert execution is not None
        ticks.append(execution.tick)
        if overlap == "cancel_running" and len(ticks) == 1:
            await asyncio.sleep(3600)

    async with Worker(durable, async_sessionmaker=async_sessionmaker(async_engine), poll_interval=POLL):
        await asyncio.to_thread(until_planned, engine, "checkout")
        for number in (1, 2):
            make_due(engine, "checkout", ago=timedelta(seconds=10))
            await asyncio.to_thread(until, partial(has, ticks, number), f"tick {number}")
            if overlap == "skip" or number == 2:
                await asyncio.to_thread(until_finished, engine, number, "checkout")
    statuses = [str(each.status) for each in started_by(engine, "checkout")]
    assert statuses == (["succeeded"] * 2 if overlap == "skip" else ["cancelled", "succeeded"])


@pytest.mark.parametrize("form", ["sql", "record"])
def test_a_row_is_enough(engine: Engine, session_factory: Sessions, form: str) -> None:
    application = Application()
    with application.worker(session_factory):
        with Session(engine) as session, session.begin():
            if form == "sql":
                session.execute(
                    text(
                        "INSERT INTO durable.schedule (name, workflow, cron) VALUES "
                        "('ticking', 'checkout', '{0 3 * * *}')"
                    )
                )
            else:
                session.add(Schedule(name="ticking", workflow="checkout", cron=["0 3 * * *"]))
        assert until_planned(engine).hour == 3
        make_due(engine)
        until_finished(engine, 1)
    assert application.given == [0]


def test_two_workers_start_each_tick_of_many_schedules_once(engine: Engine, session_factory: Sessions) -> None:
    # behaviour: D4
    names = [insert_due(engine, f"tenant {number:03}") for number in range(130)]
    application = Application()
    with application.worker(session_factory), application.worker(session_factory):
        until(lambda: len(application.ticks) == len(names), "all ticks")
        until_polled(engine)
    assert sorted(each.schedule for each in application.ticks if each) == names
    with Session(engine) as session:
        assert session.scalar(select(func.count()).select_from(Workflow)) == len(names)


def test_one_that_has_ended_starts_no_more(engine: Engine, session_factory: Sessions) -> None:
    with Session(engine) as session:
        now: datetime = session.scalars(text("SELECT statement_timestamp()")).one()
    insert_due(engine, ends_at=now + timedelta(seconds=1))
    application = Application()
    with application.worker(session_factory):
        until(lambda: row_of(engine).ended_at, "the end")
        make_due(engine)  # whoever changes a row by SQL, and forgets that it has ended
        until_polled(engine)
    assert len(started_by(engine)) == 1


def test_a_tick_for_another_queue_is_hinted_to_its_workers(
    engine: Engine, session_factory: Sessions, ear: notifications.Ear
) -> None:
    with Application().worker(session_factory):
        insert_due(engine, queue="elsewhere")
        until_started(engine, 1)
    assert hints.to_queue("elsewhere") in ear.hears(2)


# What a workflow finds


def test_a_workflow_finds_the_same_tick_when_it_is_reclaimed_retried_and_forked(
    engine: Engine, session_factory: Sessions
) -> None:
    application = Application()
    insert_due(engine)
    application.gate.clear()
    with application.worker(session_factory, lease=timedelta(seconds=1)):
        (record,) = until_started(engine, 1)
        until(lambda: len(application.ticks) == 1, "the first attempt")
        with Session(engine) as session, session.begin():  # as if another worker had reclaimed it
            session.execute(
                text("UPDATE durable.workflow SET status = 'pending', token = NULL, worker_id = NULL, attempt = 2")
            )
        application.gate.set()
        until(lambda: len(application.ticks) == 2, "the second attempt")
        until_finished(engine, 1)
        with Session(engine) as session, session.begin():
            manage.fork(session, record.id)
        until(lambda: len(application.ticks) == 3, "the fork")
    assert len(set(application.ticks)) == 1
    assert application.ticks[0] == Tick("ticking", row_of(engine).last_at, None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert len(started_by(engine)) == 1  # a fork is none of the schedule's


def test_what_no_schedule_has_started_has_no_tick(engine: Engine, session_factory: Sessions) -> None:
    application = Application()
    with session_factory.begin() as session:
        application.checkout.start(session)
    with application.worker(session_factory):
        until(lambda: application.ticks, "the execution")
    assert application.ticks == [None]


# Overlaps


def test_a_queued_tick_starts_when_the_workflow_before_it_has_ended(engine: Engine, session_factory: Sessions) -> None:
    application = Application()
    application.gate.clear()
    insert_due(engine, overlap="queue_one")
    with application.worker(session_factory):
        until(lambda: len(application.ticks) == 1, "the first")
        for _ in range(2):
            make_due(engine)
            until(lambda: row_of(engine).queued_at == row_of(engine).next_at or row_of(engine).queued_at, "the queue")
            queued = row_of(engine).queued_at
        assert len(started_by(engine)) == 1
        until(lambda: row_of(engine).skipped == 1, "the second in the queue")
        queued = row_of(engine).queued_at
        application.gate.set()
        until_finished(engine, 2)
        until(lambda: row_of(engine).queued_at is None, "an empty queue")
    first, second = application.ticks
    assert first is not None
    assert second == Tick("ticking", queued, first.at)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_tick_is_skipped_and_counted_while_a_workflow_is_unfinished(
    engine: Engine, session_factory: Sessions
) -> None:
    application = Application()
    application.gate.clear()
    insert_due(engine)
    with application.worker(session_factory):
        until(lambda: len(application.ticks) == 1, "the first")
        make_due(engine)
        until(lambda: row_of(engine).skipped == 1, "the skip")
        application.gate.set()
        until_finished(engine, 1)
        make_due(engine)
        until_finished(engine, 2)
    assert row_of(engine).skipped == 1


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_the_running_one_is_cancelled_and_the_next_started(database_url: str, engine: Engine, level: Any) -> None:
    application = Application()
    application.gate.clear()
    insert_due(engine, overlap="cancel_running")
    own = create_engine(database_url, isolation_level=level)
    with application.worker(sessionmaker(own)):
        until(lambda: len(application.ticks) == 1, "the first")
        make_due(engine)
        until_started(engine, 2)
        until(lambda: len(application.ticks) == 2, "the second")
        application.gate.set()
        until_finished(engine, 2)
    assert [str(each.status) for each in started_by(engine)] == ["cancelled", "succeeded"]
    own.dispose()


def test_nothing_is_cancelled_if_the_next_cannot_be_started(
    engine: Engine, session_factory: Sessions, caplog: pytest.LogCaptureFixture
) -> None:
    insert_due(engine, overlap="cancel_running")
    with Session(engine) as session:
        races.enqueue(session, schedule="ticking", queue="elsewhere")
    refuse(engine, "workflow", "NEW.schedule = 'ticking'")
    with Application().worker(session_factory):
        until(lambda: "it is cursed" in caplog.text, "the refusal")
        until_polled(engine)
    assert [str(each.status) for each in started_by(engine)] == ["pending"]
    assert row_of(engine).last_at is None


def test_nothing_is_cancelled_for_a_schedule_that_has_changed_meanwhile(engine: Engine) -> None:
    insert_due(engine, overlap="cancel_running")
    with Session(engine) as session:
        races.enqueue(session, schedule="ticking")
        (row,) = schedules.due(session, limit=1)
        found = schedules.due_schedule(row)
        session.rollback()
        manage.pause_schedule(session, "ticking")
        session.commit()
    advance = partial(schedules.advance, found=found, decision=decide(found.state))
    with engine.connect() as connection, pytest.raises(_Outdated):
        _cancel_first(found, advance, connection)
    assert [str(each.status) for each in started_by(engine)] == ["pending"]


def test_a_running_one_that_a_caller_has_locked_holds_up_nothing_else(
    engine: Engine, session_factory: Sessions
) -> None:
    """Their transaction may stay open for long; the tick comes when it has ended."""
    insert_due(engine, overlap="cancel_running")
    with Session(engine) as session:
        (locked,) = races.enqueue(session, schedule="ticking", queue="elsewhere")
    with races.transaction(engine) as caller, Application().worker(session_factory):
        races.lock(caller.session, locked)
        until_polled(engine, 5)
        insert_due(engine, "other")
        until_started(engine, 1, "other")
        assert len(started_by(engine)) == 1
        caller.session.commit()
        until_started(engine, 2)
    assert str(races.status_of(engine, locked)) == "cancelled"


def test_all_that_run_are_cancelled_however_many(engine: Engine, session_factory: Sessions) -> None:
    insert_due(engine, overlap="cancel_running")
    with Session(engine) as session:
        races.enqueue(session, 120, schedule="ticking", queue="elsewhere")
    with Application().worker(session_factory):
        until_started(engine, 121)
    statuses = [str(each.status) for each in started_by(engine) if each.queue == "elsewhere"]
    assert statuses == ["cancelled"] * 120


# Bad rows


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown zone": ({"tz": "Mars/Olympus"}, "Mars/Olympus"),
    "a bad expression": ({"cron": ["at noon"]}, "at noon"),
    "no time": ({"cron": ["0 0 30 2 *"]}, "0 0 30 2"),
    "a bad exclusion": ({"excluding": ["Christmas"]}, "Christmas"),
    "a jitter beyond all times": (
        {"jitter": timedelta(days=36_500), "starts_at": datetime(9998, 12, 1, tzinfo=UTC), "every": timedelta(36_500)},
        "",
    ),
}


def refuse(engine: Engine, table: str, condition: str) -> None:
    """Let a trigger of the application refuse new rows."""
    with engine.begin() as connection:
        connection.execute(
            text("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'it is cursed'; END $$")
        )
        connection.execute(
            text(
                f"CREATE TRIGGER refuse BEFORE INSERT ON durable.{table} FOR EACH ROW WHEN ({condition}) "
                "EXECUTE FUNCTION refuse()"
            )
        )


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_logged_postponed_and_in_nobodys_way(
    engine: Engine, session_factory: Sessions, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    columns, reason = BAD[bad]
    insert(engine, "bad one", **columns)
    insert_due(engine, "good one")
    with Application().worker(session_factory):
        until_started(engine, 1, "good one")
        until_polled(engine)
        row = row_of(engine, "bad one")
    logged = [each.getMessage() for each in caplog.records if "'bad one'" in each.getMessage()]
    if reason:
        assert len(logged) == 1
        assert reason in logged[0]
    assert row.due_at is not None
    with Session(engine) as session:
        assert row.due_at > session.scalars(select(func.statement_timestamp())).one()
    assert started_by(engine, "bad one") == []


def test_a_tick_that_a_trigger_refuses_is_logged_and_postponed(
    engine: Engine, session_factory: Sessions, caplog: pytest.LogCaptureFixture
) -> None:
    insert_due(engine, "bad one")
    insert_due(engine, "good one")
    tick = row_of(engine, "bad one").next_at
    refuse(engine, "workflow", "NEW.schedule = 'bad one'")
    with Application().worker(session_factory):
        until_started(engine, 1, "good one")
        until(lambda: "it is cursed" in caplog.text, "the log")
        until(lambda: row_of(engine, "bad one").due_at != tick, "the delay")
        with engine.begin() as connection:
            connection.execute(text("DROP TRIGGER refuse ON durable.workflow"))
            connection.execute(text("UPDATE durable.schedule SET due_at = next_at"))
        (record,) = until_started(engine, 1, "bad one")
    assert tick is not None
    assert record.key == f"schedule bad one {tick.isoformat()}"


def test_many_bad_rows_do_not_keep_good_ones_from_their_time(engine: Engine, session_factory: Sessions) -> None:
    for number in range(210):
        insert(engine, f"bad {number:03}", tz="Mars/Olympus")
    insert_due(engine, "good one")
    with Application().worker(session_factory, poll_interval=timedelta(hours=1)):
        until_started(engine, 1, "good one")


# Costs and clocks


def test_an_idle_worker_executes_one_statement_a_poll_beside_a_thousand_schedules(
    engine: Engine, session_factory: Sessions
) -> None:
    with Session(engine) as session, session.begin():
        session.add_all(Schedule(name=f"tenant {each}", workflow="checkout", every=HOUR) for each in range(1_000))
        session.flush()
        session.execute(text("UPDATE durable.schedule SET next_at = statement_timestamp() + interval '1 hour'"))
        session.execute(text("UPDATE durable.schedule SET due_at = next_at"))
    with Application().worker(session_factory), executed_on(engine) as executed:
        until(lambda: len([1 for each in executed if "next_due_in" in each.statement]) > 5, "the polls")
    others = [each.statement for each in executed if "durable.schedule" in each.statement]
    assert [each for each in others if "next_due_in" not in each] == []


_CLOCKS = {"now", "utcnow", "today", "time", "time_ns", "monotonic", "localtime", "gmtime"}


@pytest.mark.parametrize(
    "module", [each for each in SOURCES if each.rpartition(".")[2] in ("schedules", "calendar", "cron")]
)
def test_no_clock_but_the_databases_decides_when_a_schedule_ticks(module: str) -> None:
    calls = [each.func for each in ast.walk(ast.parse(SOURCES[module].read_text())) if isinstance(each, ast.Call)]
    read = [ast.unparse(each) for each in calls if isinstance(each, ast.Attribute) and each.attr in _CLOCKS]
    assert read == (["datetime.now"] if module == "sqla_durable.manage.schedules" else [])  # `next_ticks`
