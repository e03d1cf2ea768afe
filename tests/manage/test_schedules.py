"""The verbs of schedules in the caller's transaction, sync and async: what they change, refuse and undo."""

from __future__ import annotations

from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Workflow, manage
from sqla_durable.definitions.schedules import Tick, decide
from sqla_durable.errors import ArgumentError, SessionError, UsageError
from sqla_durable.models import Schedule
from sqla_durable.store import schedules
from tests.store import races
from tests.support.schedules import HOUR, insert, insert_due, make_due, row_of, started_by

durable = Durable()
SINCE = datetime(2026, 1, 1, tzinfo=UTC)
UNTIL = datetime(2026, 1, 1, 5, tzinfo=UTC)


@durable.workflow
def checkout(cents: int = 0) -> None: ...


def put(session: Session, name: str = "ticking", **options: Any) -> Schedule:
    chosen: dict[str, Any] = {"every": HOUR, **options}
    return manage.put_schedule(session, name, checkout.bind(5), **chosen)


# Making and changing


def test_a_schedule_is_made_with_all_that_was_said(engine: Engine, session: Session) -> None:
    # behaviour: D1
    made = manage.put_schedule(
        session,
        "nightly",
        checkout.options(queue="slow", priority=3, timeout=HOUR).bind(5),
        cron=["0 3 * * *", "0 15 * * 6"],
        tz="Europe/Berlin",
        starts_at=SINCE,
        ends_at=SINCE + 1_000 * timedelta(days=1),
        excluding=["2026-12-25"],
        jitter=timedelta(minutes=5),
        overlap="queue_one",
        missed="run_all",
        missed_within=HOUR,
    )
    assert session.identity_map.get(session.identity_key(Schedule, "nightly")) is made
    session.commit()
    row = row_of(engine, "nightly")
    assert (row.workflow, row.input, row.queue, row.priority) == ("checkout", {"cents": 5}, "slow", 3)
    assert (row.timeout, row.cron, row.tz) == (HOUR, ["0 3 * * *", "0 15 * * 6"], "Europe/Berlin")
    assert (row.starts_at, row.ends_at) == (SINCE, SINCE + timedelta(days=1_000))
    assert (row.excluding, row.jitter, row.overlap) == (["2026-12-25"], timedelta(minutes=5), "queue_one")
    assert (row.missed, row.missed_within, row.declared) == ("run_all", HOUR, False)
    assert (row.next_at, row.paused_at, row.every, row.headers) == (None, None, None, None)


def test_a_change_is_seen_in_the_record_that_the_session_has(session: Session) -> None:
    first = put(session)
    again = put(session, overlap="allow")
    assert again is first
    assert (first.overlap, first.every) == ("allow", HOUR)
    put(session, cron="0 3 * * *", every=None)
    assert (first.overlap, first.cron, first.every) == ("skip", ["0 3 * * *"], None)


def test_what_the_session_has_not_flushed_counts(session: Session) -> None:
    session.add(Schedule(name="ticking", workflow="checkout", every=HOUR))
    manage.pause_schedule(session, "ticking", reason="x")
    assert session.get_one(Schedule, "ticking").pause_reason == "x"


@pytest.mark.parametrize("reason", [None, "too many mails"])
def test_a_paused_one_that_is_changed_stays_paused(session: Session, reason: str | None) -> None:
    put(session)
    manage.pause_schedule(session, "ticking", reason=reason)
    changed = put(session, every=2 * HOUR)
    assert changed.paused_at is not None
    assert changed.pause_reason == reason
    manage.resume_schedule(session, "ticking")
    assert [changed.paused_at, changed.pause_reason] == [None, None]


def test_a_set_is_applied_as_a_whole(engine: Engine) -> None:
    # behaviour: D1
    with Session(engine) as session:
        put(session, "first")
        with pytest.raises(ArgumentError):
            put(session, "second", tz="Mars/Olympus")
        session.rollback()
    with Session(engine) as session:
        assert session.scalars(select(Schedule)).all() == []


def test_a_deleted_one_that_is_made_again_repeats_no_tick(engine: Engine, session: Session) -> None:
    put(session)
    session.commit()
    assert manage.backfill_schedule(session, "ticking", since=SINCE, until=UNTIL).since is None
    session.delete(session.get_one(Schedule, "ticking"))
    session.commit()
    assert len(started_by(engine)) == 6
    put(session)
    manage.backfill_schedule(session, "ticking", since=SINCE, until=UNTIL)
    session.commit()
    assert len(started_by(engine)) == 6


# Rolled back


def changed_by(session: Session, verb: str) -> None:
    match verb:
        case "put":
            put(session, overlap="allow")
        case "pause":
            manage.pause_schedule(session, "ticking", reason="x")
        case "resume":
            manage.pause_schedule(session, "ticking")
            manage.resume_schedule(session, "ticking")
        case "run":
            assert manage.run_schedule(session, "ticking")
        case _:
            assert manage.backfill_schedule(session, "ticking", since=SINCE, until=UNTIL).ids


def state_of(engine: Engine) -> list[Any]:
    with Session(engine) as session:
        rows = session.execute(select(*Schedule.__table__.c)).all()
        return [rows, session.scalar(select(func.count()).select_from(Workflow))]


@pytest.mark.parametrize("verb", ["put", "pause", "resume", "run", "backfill"])
def test_a_rollback_undoes_it_and_a_commit_is_needed(engine: Engine, verb: str) -> None:
    insert_due(engine)
    before = state_of(engine)
    with Session(engine) as session:
        changed_by(session, verb)
        assert state_of(engine) == before  # nothing was committed
        session.rollback()
    assert state_of(engine) == before
    with Session(engine) as session:
        with session.begin_nested() as savepoint:
            changed_by(session, verb)
            savepoint.rollback()
        session.commit()
    assert state_of(engine) == before
    with Session(engine) as session, session.begin():
        changed_by(session, verb)
    assert state_of(engine) != before


# Run now


def run(engine: Engine) -> bool:
    with Session(engine) as session, session.begin():
        return manage.run_schedule(session, "ticking")


def statuses(engine: Engine) -> list[str]:
    return [str(each.status) for each in started_by(engine)]


OUTCOMES = {
    "skip": (False, ["pending"], 1),
    "queue_one": (False, ["pending"], 0),
    "allow": (True, ["pending", "pending"], 0),
    "cancel_running": (True, ["cancelled", "pending"], 0),
}


@pytest.mark.parametrize("overlap", OUTCOMES)
def test_to_run_it_now_respects_what_is_unfinished(engine: Engine, overlap: str) -> None:
    insert(engine, overlap=overlap)
    insert(engine, "other")
    with Session(engine) as session:
        races.enqueue(session, schedule="other")
    assert run(engine)
    has_started, expected, skipped = OUTCOMES[overlap]
    assert run(engine) is has_started
    row = row_of(engine)
    assert (statuses(engine), row.skipped) == (expected, skipped)
    assert (row.queued_at is not None) == (overlap == "queue_one")
    assert [str(each.status) for each in started_by(engine, "other")] == ["pending"]
    assert row.last_at is not None
    last = started_by(engine)[-1]
    assert last.headers is not None
    assert last.headers["schedule-tick"] == row.last_at.isoformat()
    assert ("schedule-previous" in last.headers) is has_started


def test_to_run_it_now_changes_nothing_of_its_plan(engine: Engine) -> None:
    insert_due(engine, ago=-HOUR / 2)
    planned = row_of(engine).next_at
    assert run(engine)
    assert (row_of(engine).next_at, row_of(engine).due_at) == (planned, planned)


@pytest.mark.parametrize("overlap", ["skip", "allow"])
def test_a_paused_one_and_one_that_has_ended_can_be_run(engine: Engine, overlap: str) -> None:
    insert(engine, paused_at=SINCE, overlap=overlap)
    assert run(engine)
    assert row_of(engine).paused_at == SINCE
    insert(engine, "ended", ends_at=SINCE, ended_at=SINCE)
    with Session(engine) as session, session.begin():
        assert manage.run_schedule(session, "ended")
    assert row_of(engine, "ended").ended_at is not None
    assert len(started_by(engine, "ended")) == 1


def test_twice_in_one_transaction_are_two(engine: Engine, session: Session) -> None:
    insert(engine, overlap="allow")
    assert manage.run_schedule(session, "ticking")
    assert manage.run_schedule(session, "ticking")
    session.commit()
    assert statuses(engine) == ["pending"] * 2


def test_it_waits_for_a_worker_that_fires_it_and_both_start_one(engine: Engine) -> None:
    insert_due(engine, overlap="allow")
    with races.transaction(engine) as worker, races.transaction(engine) as caller:
        (row,) = schedules.due(worker.session, limit=1)
        found = schedules.due_schedule(row)
        running = caller.begin_blocked(lambda session: manage.run_schedule(session, "ticking"))
        worker.session.execute(text("UPDATE durable.schedule SET skipped = 7"))
        worker.session.commit()
        assert running.result()
        caller.session.commit()
    assert found.state.name == "ticking"
    assert row_of(engine).skipped == 7
    assert statuses(engine) == ["pending"]


def test_all_that_is_unfinished_is_cancelled(engine: Engine) -> None:
    insert(engine, overlap="cancel_running")
    with Session(engine) as session:
        races.enqueue(session, 110, schedule="ticking")
    assert run(engine)
    assert sorted(statuses(engine)) == ["cancelled"] * 110 + ["pending"]


# Backfill


def ticks(engine: Engine) -> list[str]:
    return [str(each.key).rpartition(" ")[2] for each in started_by(engine)]


# behaviour: D2
def test_a_backfill_starts_each_tick_once_however_often_and_beside_ticks(engine: Engine) -> None:
    insert(engine)
    make_due(engine, next_at=SINCE + HOUR, due_at=SINCE + HOUR, missed="run_all", overlap="allow", ends_at=UNTIL)
    with Session(engine) as session, session.begin():
        (row,) = schedules.due(session, limit=1)
        found = schedules.due_schedule(row)
        assert schedules.advance(session, found, decide(found.state)) == 5
    with Session(engine) as session, session.begin():
        done = manage.backfill_schedule(session, "ticking", since=SINCE, until=UNTIL)
        assert (len(done.ids), done.since) == (6, None)
        again = manage.backfill_schedule(session, "ticking", since=SINCE + HOUR, until=UNTIL + HOUR)
        assert again.ids == done.ids[1:]  # nothing is after `ends_at`
    assert ticks(engine) == [(SINCE + number * HOUR).isoformat() for number in range(6)]
    assert {each.id for each in started_by(engine)} == set(done.ids)


def test_a_tick_after_a_backfill_of_the_future_starts_nothing(engine: Engine) -> None:
    insert_due(engine)
    tick = row_of(engine).next_at
    assert tick is not None
    with Session(engine) as session:
        (row,) = schedules.due(session, limit=1)
        session.rollback()
        found = schedules.due_schedule(row)
        new = schedules.for_tick(found.new, Tick("ticking", tick, None))
        session.add(Workflow(id=new.id, name="checkout", key=new.key))
        session.commit()
        assert schedules.advance(session, found, decide(found.state)) == 0
        session.commit()
    assert row_of(engine).last_at == tick


# behaviour: D2
def test_two_backfills_at_once_start_each_tick_once(engine: Engine) -> None:
    insert(engine)
    fill = partial(manage.backfill_schedule, name="ticking", since=SINCE, until=UNTIL)
    with races.transaction(engine) as first, races.transaction(engine) as second:
        ids = fill(first.session).ids
        other = second.begin_blocked(fill)
        first.session.commit()
        assert other.result().ids == ids
        second.session.commit()
    assert len(ticks(engine)) == 6


def test_a_backfill_goes_on_where_it_has_stopped(engine: Engine, session: Session) -> None:
    insert(engine, paused_at=SINCE)
    since: datetime | None = SINCE
    calls = 0
    while since is not None:
        since = manage.backfill_schedule(session, "ticking", since=since, until=UNTIL, limit=2).since
        session.commit()
        calls += 1
    assert (calls, len(ticks(engine))) == (3, 6)
    assert manage.backfill_schedule(session, "ticking", since=UNTIL, until=SINCE) == ([], None)
    assert row_of(engine).last_at is None  # the plan goes on as before


def test_a_worker_passes_over_a_schedule_that_is_being_backfilled(engine: Engine) -> None:
    insert_due(engine)
    with races.transaction(engine) as caller, Session(engine) as worker:
        manage.backfill_schedule(caller.session, "ticking", since=SINCE, until=UNTIL)
        assert schedules.due(worker, limit=5) == []


# Isolation levels


@pytest.fixture(params=["REPEATABLE READ", "SERIALIZABLE"])
def strict(request: pytest.FixtureRequest, database_url: str) -> Generator[Engine]:
    engine = create_engine(database_url, isolation_level=request.param)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("verb", ["put", "pause", "resume", "run", "backfill"])
def test_callers_that_keep_a_snapshot(engine: Engine, strict: Engine, verb: str) -> None:
    insert_due(engine)
    with Session(strict) as session, session.begin():
        changed_by(session, verb)
    with Session(strict) as session:
        session.scalars(select(Schedule)).all()
        make_due(engine)
        with pytest.raises(DBAPIError) as raised:
            changed_by(session, verb)
        assert getattr(raised.value.orig, "sqlstate", None) == "40001"  # as for any row; a new transaction does it
        session.rollback()
        make_due(engine, overlap="allow")
        if verb != "put":
            changed_by(session, verb)
            session.commit()


def test_a_backfill_beside_a_newer_tick_leaves_the_transaction_usable(engine: Engine, strict: Engine) -> None:
    insert(engine)
    with Session(strict) as session:
        session.scalars(select(Workflow)).all()
        new = schedules.tick_key("ticking", SINCE)
        with Session(engine) as other, other.begin():
            other.add(Workflow(name="checkout", key=new, schedule="ticking"))
        with pytest.raises(Exception, match="REPEATABLE READ or SERIALIZABLE"):
            manage.backfill_schedule(session, "ticking", since=SINCE, until=UNTIL)
        assert session.scalar(select(func.count()).select_from(Schedule)) == 1


# Refused


UNKNOWN: dict[str, Callable[[Session], object]] = {
    "pause": lambda session: manage.pause_schedule(session, "unknown"),
    "resume": lambda session: manage.resume_schedule(session, "unknown"),
    "run": lambda session: manage.run_schedule(session, "unknown"),
    "backfill": lambda session: manage.backfill_schedule(session, "unknown", since=SINCE, until=UNTIL),
}


@pytest.mark.parametrize("verb", UNKNOWN)
def test_an_unknown_schedule_is_named(session: Session, verb: str) -> None:
    with pytest.raises(UsageError, match="there is no schedule 'unknown' in this database"):
        UNKNOWN[verb](session)
    put(session)  # the transaction is usable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": None}, "cron"),
        ({"cron": "0 3 * * *"}, "every"),
        ({"every": timedelta(milliseconds=5)}, "every"),
        ({"cron": "at noon", "every": None}, "at noon"),
        ({"tz": "Mars/Olympus"}, "Mars/Olympus"),
        ({"starts_at": datetime(2026, 1, 1)}, "starts_at"),
        ({"starts_at": UNTIL, "ends_at": SINCE}, "starts_at"),
        ({"overlap": "never"}, "overlap='never' is none of 'skip', 'queue_one', 'allow', 'cancel_running'"),
        ({"missed": "all"}, "missed='all' is none of 'skip', 'run_one', 'run_all'"),
        ({"jitter": timedelta(-1)}, "jitter"),
        ({"jitter": timedelta(36_501)}, "jitter"),
        ({"missed_within": timedelta(-1)}, "missed_within"),
        ({"every": timedelta(36_501)}, "every"),
        ({"excluding": ["Christmas"]}, "Christmas"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_made(session: Session, options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        put(session, **options)
    assert session.scalars(select(Schedule)).all() == []


@pytest.mark.parametrize("name", ["", " ", "a" * 901, "nul \0", None, 5])
def test_what_is_no_name_is_refused(session: Session, name: Any) -> None:
    with pytest.raises(ArgumentError, match="a schedule is named"):
        put(session, name)


def test_what_is_not_bound_or_has_options_of_a_tick_is_refused(session: Session) -> None:
    wrong: Any = checkout
    with pytest.raises(ArgumentError, match=r"expected workflow.bind\(...\), got .*checkout.* No schedule was made"):
        manage.put_schedule(session, "ticking", wrong, every=HOUR)
    refused: list[dict[str, Any]] = [{"key": "k"}, {"delay": HOUR}, {"at": UNTIL}, {"deadline": HOUR}]
    refused.append({"detached": True})
    for options in refused:
        bound = checkout.options(**options).bind()
        with pytest.raises(ArgumentError, match="schedule 'ticking' starts 'checkout' with options that each tick"):
            manage.put_schedule(session, "ticking", bound, every=HOUR)


def test_wrong_ranges_are_refused(session: Session) -> None:
    put(session)
    naive = datetime(2026, 1, 1)
    ranges: list[tuple[dict[str, Any], str]] = [
        ({"since": naive, "until": UNTIL}, "since"),
        ({"since": SINCE, "until": naive}, "until"),
        ({"since": SINCE, "until": UNTIL, "limit": 0}, "limit=0 is no number of ticks"),
    ]
    for wrong, message in ranges:
        with pytest.raises(ArgumentError, match=message):
            manage.backfill_schedule(session, "ticking", **wrong)


def test_a_session_in_autocommit_is_refused(engine: Engine) -> None:
    with Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session, pytest.raises(SessionError):
        put(session)


def test_a_bad_row_says_so_to_who_runs_it(engine: Engine, session: Session) -> None:
    insert(engine, tz="Mars/Olympus")
    with pytest.raises(ArgumentError, match="Mars/Olympus"):
        manage.run_schedule(session, "ticking")


# Asyncio


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
async def test_the_twins(engine: Engine, async_engine: AsyncEngine) -> None:
    async with AsyncSession(async_engine) as session:
        made = await aio.manage.put_schedule(
            session,
            "ticking",
            checkout.bind(5),
            every=HOUR,
            overlap="cancel_running",
            jitter=HOUR,
            excluding=["2020-01-01"],
        )
        assert (made.name, made.input, made.jitter) == ("ticking", {"cents": 5}, HOUR)
        await session.commit()
        await aio.manage.pause_schedule(session, "ticking", reason="x")
        await session.commit()
        assert row_of(engine).pause_reason == "x"
        assert await aio.manage.run_schedule(session, "ticking")
        assert await aio.manage.run_schedule(session, "ticking")
        done = await aio.manage.backfill_schedule(session, "ticking", since=SINCE, until=UNTIL, limit=4)
        assert (len(done.ids), done.since) == (4, SINCE + 4 * HOUR)
        await aio.manage.resume_schedule(session, "ticking")
        await session.commit()
        with pytest.raises(UsageError, match="there is no schedule 'unknown'"):
            await aio.manage.pause_schedule(session, "unknown")
    assert row_of(engine).paused_at is None
    assert statuses(engine) == ["pending"] * 4 + ["cancelled", "pending"]


def test_the_next_ticks_are_those_that_come(session: Session) -> None:
    made = put(session, cron="30 2 * * *", every=None, tz="Europe/Berlin", ends_at=datetime(2026, 3, 31, tzinfo=UTC))
    after = datetime(2026, 3, 28, tzinfo=UTC)
    expected = ["2026-03-28T01:30", "2026-03-29T01:00", "2026-03-30T00:30"]  # the clocks skip 02:30 on the 29th
    assert [f"{each:%Y-%m-%dT%H:%M}" for each in manage.next_ticks(made, 9, after=after)] == expected
    with pytest.raises(ArgumentError, match="after"):
        manage.next_ticks(made, 1, after=datetime(2026, 1, 1))
    assert len(manage.next_ticks(Schedule(name="x", workflow="checkout", every=HOUR), 3)) == 3


def test_hints_reach_workers_when_something_changes(engine: Engine, ear: Any) -> None:
    with Session(engine) as session, session.begin():
        put(session)
    assert ear.hears()
    with Session(engine) as session, session.begin():
        manage.run_schedule(session, "ticking")
    assert ear.hears()
