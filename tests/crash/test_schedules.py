"""SIGKILL on workers that fire schedules: every tick starts one workflow, none is lost and none comes twice."""

from __future__ import annotations

import os
import random
import signal
from contextlib import ExitStack
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from sqla_durable import Workflow
from sqla_durable.store.schedules import tick_key
from tests.crash import child
from tests.store import races
from tests.support.domain import Entry
from tests.support.schedules import insert, make_due, row_of, started_by

SECOND = timedelta(seconds=1)
SEED = 16


def now(engine: Engine) -> datetime:
    with Session(engine) as session:
        found: datetime = session.execute(select(func.statement_timestamp())).scalar_one()
    return found


def has_ticked(engine: Engine, name: str, until: datetime) -> bool:
    last = row_of(engine, name).last_at
    return last is not None and last > until


def has_started(engine: Engine, count: int) -> bool:
    return len(started_by(engine)) == count


def check_ticks(engine: Engine, name: str, since: datetime) -> int:
    """Prove that each second since then until the last tick has started one workflow."""
    last = row_of(engine, name).last_at
    assert last is not None
    keys = [each.key for each in started_by(engine, name)]
    seconds = int((last - since) / SECOND) + 1
    assert keys == [tick_key(name, since + number * SECOND) for number in range(seconds)]
    return seconds


# behaviour: D4
@pytest.mark.timeout(180)
@pytest.mark.parametrize("mode", ["as they come", "missed"])
def test_every_second_is_one_workflow_while_workers_are_killed(
    database_url: str, engine: Engine, thorough: bool, mode: str
) -> None:
    """Three processes, one of which is killed again and again; all are killed once, and what was missed is run."""
    chance = random.Random(SEED)
    since = now(engine).replace(microsecond=0) + SECOND
    names = [f"ticking {number}" for number in range(3)]
    if mode == "missed":  # since some minutes, so that hundreds are started at once
        since -= timedelta(minutes=3)
    options: dict[str, Any] = {"overlap": "allow", "missed": "run_all", "every": SECOND, "starts_at": since}
    for each in names:
        insert(engine, each, workflow="small", input={"account": each}, next_at=since, due_at=since, **options)
    kills = 20 if thorough else 8
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(child.worker(database_url))
        for _ in range(kills):
            child.kill_worker_after(chance.uniform(0.1, 0.5), database_url)
    until = now(engine)
    with child.worker(database_url), child.worker(database_url):
        for each in names:
            races.wait_until(partial(has_ticked, engine, each, until), what="the ticks")
        with engine.begin() as connection:
            connection.execute(text("UPDATE durable.schedule SET paused_at = statement_timestamp()"))
        races.wait_until(lambda: unfinished(engine) == 0, what="the ends", seconds=60)
    counts = [check_ticks(engine, each, since) for each in names]
    assert min(counts) >= (180 if mode == "missed" else 3)
    with Session(engine) as session:
        assert {str(each) for each in session.scalars(select(Workflow.status))} == {"succeeded"}
        entries = session.execute(select(func.count()).where(Entry.note.is_(None))).scalar_one()
    assert entries == 2 * sum(counts)  # what a workflow writes, it has written once


def unfinished(engine: Engine) -> int:
    with Session(engine) as session, session.begin():
        session.execute(text("UPDATE durable.workflow SET wake_at = statement_timestamp() WHERE status = 'suspended'"))
        return session.execute(select(func.count()).where(Workflow.finished_at.is_(None))).scalar_one()


PLACES = {"cancelled, not started": "AFTER UPDATE", "before the commit": "AFTER INSERT"}


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_between_the_cancel_and_the_start_leaves_neither(database_url: str, engine: Engine, place: str) -> None:
    """The process is stopped by a lock in the middle of its transaction, and killed there."""
    insert(engine, workflow="small", input={"account": "a"}, overlap="cancel_running", queue="elsewhere")
    with Session(engine) as session:
        (running,) = races.enqueue(session, schedule="ticking", queue="elsewhere", name="small")
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION wait_here() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN PERFORM set_config('lock_timeout', '0', true); PERFORM pg_advisory_xact_lock(16); "
                "RETURN NULL; END $$"
            )
        )
        connection.execute(
            text(
                f"CREATE TRIGGER wait_here {PLACES[place]} ON durable.workflow FOR EACH ROW "
                "WHEN (NEW.schedule = 'ticking') EXECUTE FUNCTION wait_here()"
            )
        )
    make_due(engine)
    with engine.connect() as holder:
        holder.execute(text("SELECT pg_advisory_xact_lock(16)"))
        with child.worker(database_url) as process:
            races.wait_until(lambda: races.blocked_statements(engine), what="the worker in its transaction")
            process.kill()
            process.join()
        assert states(engine) == ["pending"]
        with engine.begin() as connection:  # the server notices the loss of the client when it writes to it
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0"
                )
            )
        races.wait_until(lambda: not races.blocked_statements(engine), what="the end of the transaction")
    assert states(engine) == ["pending"]
    assert row_of(engine).last_at is None
    with child.worker(database_url):
        races.wait_until(lambda: len(states(engine)) == 2, what="the tick")
    assert str(races.status_of(engine, running)) == "cancelled"
    assert states(engine) == ["cancelled", "pending"]


def states(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return sorted(str(each) for each in session.scalars(select(Workflow.status)))


def test_a_tick_of_a_worker_that_is_frozen_is_fired_by_another(database_url: str, engine: Engine) -> None:
    """Its decision is written late, if ever, and counts for nothing then."""
    insert(engine, workflow="small", input={"account": "a"}, overlap="allow")
    with child.worker(database_url) as frozen, child.worker(database_url):
        races.wait_until(lambda: row_of(engine).next_at, what="the plan")
        assert frozen.pid is not None
        for number in range(1, 6):
            os.kill(frozen.pid, signal.SIGSTOP)
            make_due(engine)
            races.wait_until(partial(has_started, engine, number), what="the tick", seconds=20)
            os.kill(frozen.pid, signal.SIGCONT)
        races.wait_until(lambda: unfinished(engine) == 0, what="the ends", seconds=60)
    assert len(started_by(engine)) == 5
