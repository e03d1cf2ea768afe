"""Ticks and changes of schedules beside each other: two transactions, and what one of them finds and leaves."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.definitions.schedules import Decision, ScheduleOptions, Tick, decide
from sqla_durable.models import Schedule
from sqla_durable.store import NewWorkflow, schedules, starts
from sqla_durable.store.claims import name_parameters, range_parameters
from sqla_durable.store.schedules import (
    _DUE,  # pyright: ignore[reportPrivateUsage]
    DueSchedule,
)
from sqla_durable.store.work import _FIND_WORK, find_work  # pyright: ignore[reportPrivateUsage]
from tests.store import races
from tests.store.plans import MODES, Plan, explain, fill
from tests.store.test_work import BEGIN
from tests.support.schedules import HOUR, insert, insert_due, make_due, row_of, started_by

NEW = NewWorkflow(uuid7(), "checkout", "{}", "default")
HOURLY = ScheduleOptions.of(every=HOUR)


def read(session: Session) -> list[DueSchedule]:
    return [schedules.due_schedule(each) for each in schedules.due(session, limit=100)]


def read_one(engine: Engine) -> DueSchedule:
    """Read what is due, as a worker does: in a transaction that ends before anything is decided."""
    with Session(engine) as session:
        (found,) = read(session)
    return found


def fire(session: Session, found: DueSchedule) -> int | None:
    return schedules.advance(session, found, decide(found.state))


def committed(engine: Engine, found: DueSchedule) -> int | None:
    with Session(engine) as session, session.begin():
        return fire(session, found)


# A tick


def test_a_tick_starts_a_workflow_and_the_schedule_goes_on(engine: Engine) -> None:
    insert_due(engine, input={"cents": 5}, queue="slow", priority=3, timeout=HOUR, headers={"tenant": "acme"})
    found = read_one(engine)
    tick = found.state.next_at
    assert tick is not None
    assert committed(engine, found) == 1
    (workflow,) = started_by(engine)
    assert (workflow.name, workflow.input, workflow.queue) == ("checkout", {"cents": 5}, "slow")
    assert (workflow.priority, workflow.timeout, str(workflow.status)) == (3, HOUR, "pending")
    assert workflow.key == schedules.tick_key("ticking", tick)
    assert workflow.headers == {"tenant": "acme", "schedule": "ticking", "schedule-tick": tick.isoformat()}
    row = row_of(engine)
    assert (row.last_at, row.skipped, row.ended_at, row.queued_at) == (tick, 0, None, None)
    assert row.next_at == row.due_at == HOURLY.calendar.next_after(tick)
    with Session(engine) as session:
        assert read(session) == []


# behaviour: D4
def test_of_two_that_decide_the_same_tick_one_writes_it(engine: Engine) -> None:
    insert_due(engine)
    first, second = read_one(engine), read_one(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        assert fire(one.session, first) == 1
        assert other.begin(lambda session: fire(session, second)).result() is None  # waits for nobody
        one.session.commit()
    assert committed(engine, second) is None
    assert len(started_by(engine)) == 1


# behaviour: D4
def test_many_that_decide_the_same_tick_at_the_same_time_write_it_once(engine: Engine) -> None:
    insert(engine)
    barrier = threading.Barrier(4)

    def write(found: DueSchedule) -> int | None:
        barrier.wait(races.PATIENCE)
        return committed(engine, found)

    for number in range(1, 11):
        make_due(engine, overlap="allow")
        found = read_one(engine)
        outcomes = [each.result() for each in [races.Concurrent(partial(write, found)) for _ in range(4)]]
        assert sorted(outcomes, key=str) == [1, None, None, None]
        assert len(started_by(engine)) == number


CHANGES = {
    "changed": "UPDATE durable.schedule SET every = '2 hours', next_at = NULL, due_at = NULL",
    "touched": "UPDATE durable.schedule SET every = every",
    "paused": "UPDATE durable.schedule SET paused_at = statement_timestamp()",
    "deleted": "DELETE FROM durable.schedule",
}


@pytest.mark.parametrize("is_committed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_row_that_has_changed_since_it_was_read_is_not_written(
    engine: Engine, change: str, is_committed: bool
) -> None:
    insert_due(engine)
    found = read_one(engine)
    with races.transaction(engine) as other, races.transaction(engine) as worker:
        other.session.execute(text(CHANGES[change]))
        if is_committed:
            other.session.commit()
        assert worker.begin(lambda session: fire(session, found)).result() is None
        schedules.postpone(worker.session, name="ticking", row_version=found.row_version, seconds=60)
        worker.session.commit()
        other.session.rollback()
    assert started_by(engine) == []
    if not is_committed:
        assert committed(engine, found) == 1  # the row is as it was read


def test_a_locked_row_is_left_to_whoever_locks_it(engine: Engine) -> None:
    insert_due(engine)
    found = read_one(engine)
    with races.transaction(engine) as other:
        assert schedules.lock(other.session, "ticking") is not None
        assert races.Concurrent(lambda: committed(engine, found)).result() is None
        other.session.rollback()
    assert committed(engine, found) == 1


def test_a_schedule_that_others_refer_to_is_not_locked_by_that(engine: Engine) -> None:
    """A foreign key of the application's locks it FOR KEY SHARE."""
    insert_due(engine)
    with races.transaction(engine) as other:
        other.session.execute(text("SELECT FROM durable.schedule FOR KEY SHARE"))
        with Session(engine) as session:
            assert races.Concurrent(lambda: schedules.lock(session, "ticking")).result() is not None
        assert committed(engine, read_one(engine)) == 1


def test_a_rolled_back_tick_is_written_by_the_next(engine: Engine) -> None:
    insert_due(engine)
    found = read_one(engine)
    with Session(engine) as session:
        assert fire(session, found) == 1
        session.rollback()
    assert started_by(engine) == []
    assert committed(engine, found) == 1


def test_a_tick_whose_workflow_is_being_started_elsewhere_starts_no_other(engine: Engine) -> None:
    """A backfill that is not committed holds its key."""
    insert_due(engine)
    found = read_one(engine)
    assert found.state.next_at is not None
    new = schedules.for_tick(found.new, Tick("ticking", found.state.next_at, None))
    with races.transaction(engine) as other, races.transaction(engine) as worker:
        starts.insert_unless_known(other.session, new)
        firing = worker.begin_blocked(lambda session: fire(session, found))
        other.session.commit()
        assert firing.result() == 0
        worker.session.commit()
    assert [each.id for each in started_by(engine)] == [new.id]
    assert row_of(engine).last_at == found.state.next_at


def test_a_thousand_ticks_are_one_statement_that_starts_each_once(engine: Engine) -> None:
    insert_due(engine, every=timedelta(seconds=1), ago=HOUR, missed="run_all", overlap="allow")
    found = read_one(engine)
    assert committed(engine, found) == 1_000
    keys = [each.key for each in started_by(engine)]
    assert len(set(keys)) == 1_000
    with Session(engine) as session:
        (rest,) = read(session)  # goes on at once
        assert rest.state.next_at == decide(found.state).next_at


@pytest.mark.parametrize("is_behind", [False, True])
def test_a_schedule_without_another_tick_has_ended(engine: Engine, is_behind: bool) -> None:
    with Session(engine) as session:
        now: datetime = session.execute(text("SELECT statement_timestamp()")).scalar_one()
    if is_behind:
        insert(engine, ends_at=now - HOUR)
    else:
        insert_due(engine, ends_at=now + timedelta(minutes=1), starts_at=now - HOUR / 2)
    assert committed(engine, read_one(engine)) == (not is_behind)
    row = row_of(engine)
    assert row.ended_at is not None
    assert (row.next_at, row.due_at) == (None, None)
    with Session(engine) as session:
        assert read(session) == []


def test_a_queued_tick_keeps_a_schedule_from_ending(engine: Engine) -> None:
    insert_due(engine)
    found = read_one(engine)
    then = found.state.next_at
    with Session(engine) as session, session.begin():
        assert schedules.advance(session, found, Decision(queued_at=then, due_at=then)) == 0
    assert row_of(engine).ended_at is None
    assert read_one(engine).state.queued_at == then


def test_unfinished_are_those_of_this_schedule(engine: Engine) -> None:
    for each in ("other", "ticking"):  # both are read
        insert_due(engine, each)
    with Session(engine) as session:
        own = races.enqueue(session, schedule="ticking")
        own += races.enqueue(session, schedule="ticking", status="suspended", wake_at=datetime.max.replace(year=2999))
        races.enqueue(session, schedule="other")
        races.enqueue(session)
        (gone,) = races.enqueue(session, schedule="ticking")
        races.cancel(session, gone)
        session.commit()
    with Session(engine) as session:
        assert {each.state.name: each.state.unfinished for each in read(session)} == {"other": 1, "ticking": 2}
        assert sorted(schedules.unfinished_of(session, "ticking")) == sorted(own)


# What is due


def test_what_is_paused_has_ended_or_is_not_due_is_not_read(engine: Engine) -> None:
    names = [insert_due(engine, name) for name in ("paused", "ended", "later", "unplanned", "due")]
    changes = {"paused": "paused_at = due_at", "ended": "ended_at = due_at", "unplanned": "due_at = NULL"}
    changes["later"] = "due_at = due_at + interval '1 day'"
    with Session(engine) as session, session.begin():
        for name, change in changes.items():
            session.execute(text(f"UPDATE durable.schedule SET {change} WHERE name = :name"), {"name": name})
        assert [each.state.name for each in read(session)] == names[3:]


def test_a_poll_finds_what_is_due_and_when_the_next_one_is(engine: Engine) -> None:
    def poll() -> tuple[bool, float | None]:
        with Session(engine) as session:
            found = find_work(session, worker_id=uuid7(), ranges={}, names=[])
        return found.ticks, found.next_due_in

    assert poll() == (False, None)
    insert_due(engine, "later", ago=-timedelta(seconds=500))
    insert_due(engine, "soon", ago=-timedelta(seconds=50))
    insert_due(engine, "paused", ago=timedelta(), paused_at=datetime.fromisoformat("2026-01-01T00:00Z"))
    is_due, next_due_in = poll()
    assert not is_due
    assert 40 < (next_due_in or 0) <= 50
    make_due(engine, "soon")
    is_due, next_due_in = poll()
    assert is_due
    assert 490 < (next_due_in or 0) <= 500
    with Session(engine) as session, session.begin():
        session.execute(text("UPDATE durable.schedule SET due_at = NULL WHERE name = 'soon'"))
    assert poll()[0]


def test_what_a_long_transaction_has_locked_is_not_in_the_way_of_the_rest(engine: Engine) -> None:
    for number in range(3):
        insert_due(engine, f"locked {number}", ago=timedelta(seconds=9))
    insert_due(engine, "free")
    with races.transaction(engine) as caller, Session(engine) as worker:
        caller.session.execute(text("UPDATE durable.schedule SET priority = 1 WHERE name LIKE 'locked%'"))
        assert [each["name"] for each in schedules.due(worker, limit=2)] == ["free"]


def test_a_postponed_one_comes_back_at_its_time(engine: Engine) -> None:
    insert_due(engine)
    found = read_one(engine)
    with Session(engine) as session, session.begin():
        schedules.postpone(session, name="ticking", row_version=found.row_version, seconds=60)
        assert read(session) == []
    row = row_of(engine)
    assert row.due_at is not None
    assert row.next_at == found.state.next_at
    assert timedelta(seconds=59) < row.due_at - found.state.now < timedelta(seconds=70)


# Changes


def put(session: Session, options: ScheduleOptions = HOURLY, *, declared: bool = False, **new: Any) -> bool:
    return schedules.put(session, NEW._replace(**new), options, name="ticking", declared=declared)


def test_other_times_are_planned_again_and_what_is_the_same_is_not_written(engine: Engine) -> None:
    with Session(engine) as session:
        assert put(session)
        assert not put(session)
        session.commit()
    make_due(engine)
    make_due(engine, queued_at=row_of(engine).due_at)
    due_at = row_of(engine).due_at
    with Session(engine) as session:
        changes: list[dict[str, Any]] = [{"input": '{"a": 1}'}, {"queue": "slow"}, {"priority": 1}, {"timeout": 5.0}]
        changes.append({"version": "2"})
        for change in changes:
            assert put(session, **change)
            assert not put(session, **change)
        assert put(session, ScheduleOptions.of(every=HOUR, overlap="allow"), headers={"a": "1"})
        session.commit()
        row = row_of(engine)
        assert (row.due_at, row.overlap, row.version, row.headers) == (due_at, "allow", None, {"a": "1"})
        assert row.queued_at is not None  # a tick that is due is started as it is said now
        for options in (ScheduleOptions.of(every=HOUR, jitter=HOUR), ScheduleOptions.of(cron="0 3 * * *")):
            assert put(session, options)
            session.commit()
            row = row_of(engine)
            assert (row.next_at, row.queued_at) == (None, None)
            assert read_one(engine).state.next_at is not None
            make_due(engine)


def test_other_headers_alone_change_no_declared_one(engine: Engine) -> None:
    with Session(engine) as session:
        assert put(session, declared=True, headers={"trace": "1"})
        assert not put(session, declared=True, headers={"trace": "2"})
        assert put(session, declared=True, headers={"trace": "3"}, priority=1)
        assert session.get_one(Schedule, "ticking").headers == {"trace": "3"}


def test_what_is_declared_as_it_was_waits_for_nobody(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        put(session, declared=True)
    with races.transaction(engine) as caller, races.transaction(engine) as worker:
        schedules.pause(caller.session, "ticking", reason=None)
        assert not worker.begin(lambda session: put(session, declared=True)).result()
        caller.session.rollback()


@pytest.mark.parametrize("reason", [None, "too many mails"])
@pytest.mark.parametrize("declared", [False, True])
def test_a_change_leaves_an_operators_pause(engine: Engine, reason: str | None, declared: bool) -> None:
    with Session(engine) as session:
        put(session, declared=declared)
        assert schedules.pause(session, "ticking", reason=reason)
        paused_at = session.get_one(Schedule, "ticking").paused_at
        assert paused_at is not None
        assert put(session, ScheduleOptions.of(every=2 * HOUR), declared=declared)
        session.commit()
    assert (row_of(engine).paused_at, row_of(engine).pause_reason) == (paused_at, reason)


@pytest.mark.parametrize("declared", [False, True])
def test_what_was_paused_because_the_code_has_lost_it_goes_on_when_it_is_put_again(
    engine: Engine, declared: bool
) -> None:
    with Session(engine) as session:
        put(session, declared=True)
        gone = partial(schedules.pause_undeclared, session, workflows=["checkout"])
        assert gone(names=["ticking"]) == []
        assert schedules.pause_undeclared(session, names=[], workflows=["other"]) == []
        assert gone(names=[]) == ["ticking"]
        assert gone(names=[]) == []
        assert put(session, declared=declared)
        row = session.get_one(Schedule, "ticking")
        assert (row.paused_at, row.pause_reason) == (None, None)
        assert gone(names=[]) == (["ticking"] if declared else [])


def test_an_operators_pause_of_what_the_code_has_lost_stays(engine: Engine) -> None:
    with Session(engine) as session:
        put(session, declared=True)
        schedules.pause_undeclared(session, names=[], workflows=["checkout"])
        schedules.pause(session, "ticking", reason=None)
        assert not put(session, declared=True)
        assert session.get_one(Schedule, "ticking").paused_at is not None


def test_two_that_declare_the_same_at_once_make_it_once(engine: Engine) -> None:
    with races.transaction(engine) as first, races.transaction(engine) as second:
        assert put(first.session, declared=True)
        other = second.begin_blocked(lambda session: put(session, declared=True))
        first.session.commit()
        assert other.result() is False


def test_a_resumed_one_is_planned_again_and_one_that_is_not_paused_is_left_alone(engine: Engine) -> None:
    insert_due(engine)
    queued = row_of(engine).next_at
    make_due(engine, queued_at=queued)
    with Session(engine) as session, session.begin():
        assert schedules.resume(session, "ticking")
        assert not schedules.resume(session, "unknown")
    assert row_of(engine).queued_at == queued
    assert row_of(engine).next_at is not None
    with Session(engine) as session, session.begin():
        schedules.pause(session, "ticking", reason="x")
        assert schedules.resume(session, "ticking")
    row = row_of(engine)
    assert (row.queued_at, row.next_at, row.paused_at, row.pause_reason) == (None,) * 4


@pytest.mark.parametrize("how", ["made", "changed", "resumed"])
def test_the_first_tick_after_it_was_made_changed_or_resumed_is_missed_like_any_other(engine: Engine, how: str) -> None:
    """No worker was there to plan it."""
    with Session(engine) as session, session.begin():
        put(session, ScheduleOptions.of(every=2 * HOUR) if how == "changed" else HOURLY)
    with Session(engine) as session, session.begin():
        if how == "changed":
            put(session)
        if how == "resumed":
            schedules.pause(session, "ticking", reason=None)
            schedules.resume(session, "ticking")
    with Session(engine) as session, session.begin():
        session.execute(text("UPDATE durable.schedule SET due_at = due_at - interval '90 minutes'"))
    found = read_one(engine)
    tick = found.state.next_at
    assert tick is not None
    assert HOUR / 2 <= found.state.now - tick < 3 * HOUR / 2
    assert committed(engine, found) == 1


def test_one_of_plain_sql_and_one_that_was_postponed_begin_now(engine: Engine) -> None:
    insert(engine)
    found = read_one(engine)
    assert found.state.next_at is None
    with Session(engine) as session, session.begin():
        schedules.postpone(session, name="ticking", row_version=found.row_version, seconds=2 * HOUR.total_seconds())
        row = schedules.lock(session, "ticking")
        assert row is not None
        state = schedules.due_schedule(row).state
        assert state.next_at == HOURLY.calendar.next_after(state.now)


# Costs


@pytest.mark.new_database
@pytest.mark.parametrize("due", [0, 20])
@pytest.mark.parametrize("is_vacuumed", [False, True])
def test_a_poll_and_what_reads_due_schedules_cost_a_few_pages_among_many(
    engine: Engine, due: int, is_vacuumed: bool
) -> None:
    with Session(engine) as session:
        fill(session)
        session.execute(
            text(
                "INSERT INTO durable.schedule (name, workflow, cron, next_at, due_at, paused_at) "
                "SELECT 'tenant ' || n, 'checkout', '{0 3 * * *}', at, at, "
                "CASE WHEN n % 10 = 0 THEN statement_timestamp() END FROM (SELECT n, statement_timestamp() + "
                "CASE WHEN n <= :due THEN interval '-1 second' ELSE n * interval '1 minute' END AS at "
                "FROM generate_series(1, 10000) AS n) AS made"
            ),
            {"due": due},
        )
        session.commit()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE durable.schedule" if is_vacuumed else "ANALYZE durable.schedule"))
    ranges = races.from_front(["default"])
    poll: dict[str, object] = {"polling_id": races.WORKER, **name_parameters(["checkout"], ["1"])}
    poll |= range_parameters(ranges) | BEGIN
    for mode in MODES:
        with Session(engine) as session:
            (polled, looked) = (
                min((explain(session, statement, given, mode=mode) for _ in range(2)), key=Plan.buffers)
                for statement, given in ((_FIND_WORK, poll), (_DUE, {"limit": 100}))
            )
        for plan in (polled, looked):
            assert plan.uses("schedule_due_idx"), plan
            assert not plan.scans("schedule"), plan
            assert not plan.scans("workflow"), plan
        assert looked.uses("workflow_schedule_idx"), looked
        assert polled.buffers() < 60, polled
        assert looked.buffers() < 20 + 10 * due, looked
