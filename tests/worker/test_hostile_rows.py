"""A row that makes a statement of the worker fail hurts its own workflow, and no other.

The checks of the tables refuse most of them: here they are dropped, or a trigger of the application refuses a row.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow, WorkflowStatus, manage, start_many
from sqla_durable.asyncio import wait_signal
from sqla_durable.errors import RowRefusedError
from sqla_durable.store import children
from sqla_durable.unwinding import AttemptLost
from tests.acceptance.shells import PATIENCE, POLL
from tests.store import races
from tests.support.forged import forged

Sessions = sessionmaker[Session]

REFUSED = "sqla_durable.errors:RowRefusedError"
durable = Durable()


@durable.workflow
def well(number: int = 0) -> int:
    return number


@durable.workflow
def ill(number: int = 0) -> int:
    return number


@durable.workflow
async def patient() -> str:
    return await wait_signal("go", str)


def insert(engine: Engine, table: str = "workflow", **columns: Any) -> UUID:
    """Insert a row, of texts that PostgreSQL reads."""
    names, values = ", ".join(columns), ", ".join(f":{each}" for each in columns)
    returned = "id" if table in ("workflow", "worker") else "NULL"
    with engine.begin() as connection:
        statement = text(f"INSERT INTO durable.{table} ({names}) VALUES ({values}) RETURNING {returned}")
        with forged(connection, columns if table == "workflow" else ()):
            found: UUID = connection.execute(statement, columns).scalar_one()
    return found


def execute(engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement))


def drop(engine: Engine, *checks: str) -> None:
    for each in checks:
        execute(engine, f"ALTER TABLE durable.workflow DROP CONSTRAINT workflow_{each}_check")


def curse(engine: Engine, *, unless: str = "false", table: str = "workflow", name: str = "ill") -> None:
    """Let a trigger of the application refuse every change of the rows of a name."""
    execute(
        engine,
        "CREATE FUNCTION refuse_ill() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN IF NOT coalesce({unless}, false) THEN RAISE 'it is cursed'; END IF; RETURN NEW; END $$",
    )
    execute(
        engine,
        f"CREATE TRIGGER refuse_ill BEFORE UPDATE ON durable.{table} FOR EACH ROW WHEN (NEW.name = '{name}') "
        "EXECUTE FUNCTION refuse_ill()",
    )


def start_well(maker: Sessions, count: int = 3) -> Sequence[UUID]:
    with maker.begin() as session:
        return start_many(session, [well.bind(each) for each in range(count)])


def ended(maker: Sessions, *ids: UUID) -> dict[UUID, dict[str, Any]]:
    """Wait for the ends of these workflows; return their errors."""

    def found() -> dict[UUID, dict[str, Any]]:
        with maker() as session:
            query = select(Workflow.id, Workflow.error).where(Workflow.id.in_(ids), Workflow.finished_at.is_not(None))
            return {row.id: row.error or {} for row in session.execute(query)}

    races.wait_until(lambda: len(found()) == len(ids), what="the ends", seconds=PATIENCE.total_seconds())
    return found()


NESTED = "[" * 1_500 + "]" * 1_500


def hostile_rows(engine: Engine) -> dict[UUID, str]:
    """Insert rows that no claim can compute with, or read; return the columns that they are hostile in."""
    drop(engine, "timeout", "headers", "times")
    first = {"enqueued_at": "2020-01-01"}
    return {
        insert(engine, name="ill", timeout="293000 years", **first): "timeout",
        insert(engine, name="ill", headers=f'{{"tenant": {"9" * 5_000}}}', **first): "headers",
        insert(engine, name="ill", headers=f'{{"tenant": {NESTED}}}', **first): "headers",
        insert(engine, name="ill", enqueued_at="0044-03-15 BC"): "enqueued_at",
    }


def test_rows_that_no_claim_can_read_fail_alone_and_say_why(engine: Engine, session_factory: Sessions) -> None:
    columns = hostile_rows(engine)
    healthy = start_well(session_factory)
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        errors = ended(session_factory, *columns, *healthy)
    assert [errors[each] for each in healthy] == [{}] * len(healthy)
    for workflow_id, column in columns.items():
        assert errors[workflow_id]["type"] == REFUSED
        assert f"out of bounds: {column} of type" in errors[workflow_id]["message"]


async def test_they_do_so_with_a_driver_that_reads_rows_its_own_way(
    engine: Engine, session_factory: Sessions, async_engine: AsyncEngine
) -> None:
    columns = hostile_rows(engine)
    healthy = start_well(session_factory)
    maker = async_sessionmaker(async_engine)
    async with Worker(durable, async_sessionmaker=maker, sessionmaker=session_factory, poll_interval=POLL):
        errors = await asyncio.to_thread(ended, session_factory, *columns, *healthy)
    assert {each for each, error in errors.items() if error} == columns.keys()


def test_a_claim_that_a_trigger_refuses_fails_the_workflow_which_goes_on_when_that_is_mended(
    engine: Engine, session_factory: Sessions
) -> None:
    curse(engine, unless="NEW.status <> 'running'")
    bad = insert(engine, name="ill")
    healthy = start_well(session_factory)
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        errors = ended(session_factory, bad, *healthy)
        assert errors[bad]["message"] == "the database refuses to claim it: (psycopg.errors.RaiseException) it is " + (
            "cursed [P0001]"
        )
        with pytest.raises(RowRefusedError, match="it is cursed"):
            ill.handle(session_factory, bad).result(timeout=PATIENCE)
        execute(engine, "DROP TRIGGER refuse_ill ON durable.workflow")
        with session_factory.begin() as session:
            assert manage.resume(session, bad) == [bad]
        assert ill.handle(session_factory, bad).result(timeout=PATIENCE) == 0


def test_what_cannot_even_be_failed_is_set_aside_and_logged(
    engine: Engine, session_factory: Sessions, caplog: pytest.LogCaptureFixture
) -> None:
    curse(engine)
    bad = insert(engine, name="ill", enqueued_at="2020-01-01")
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        ended(session_factory, *start_well(session_factory))
        ended(session_factory, *start_well(session_factory))
    with session_factory() as session:
        assert session.get_one(Workflow, bad).status is WorkflowStatus.PENDING
    said = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert len([each for each in said if "refuses to claim it" in each]) == 1, "it is not met again at once"
    assert f"workflow {bad}: this worker sets it aside for 60 s" in said


def test_whatever_a_worker_does_to_many_goes_on_without_the_one_that_is_refused(
    engine: Engine, session_factory: Sessions
) -> None:
    """Timers, deliveries, reclaims and deadlines."""
    curse(engine, unless=f"NEW.error ->> 'type' = '{REFUSED}'")
    gone, past = {"worker_id": str(races.WORKER), "token": str(races.WORKER)}, "2020-01-01"
    bad = {
        insert(engine, name="ill", status="suspended", wake_at=past): "wake",
        insert(engine, name="ill", status="running", started_at=past, **gone): "reclaim",
        insert(engine, name="ill", status="suspended", deadline_at=past): "fail",
        (sleeper := insert(engine, name="ill", status="suspended", awaits='[{"signal": "go"}]')): "deliver to",
    }
    insert(engine, "signal", workflow_id=str(sleeper), name="go")
    good = [
        insert(engine, name="well", status="suspended", wake_at=past),
        insert(engine, name="well", status="running", started_at=past, **gone),
        (waiting := insert(engine, name="patient")),
    ]
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        insert(engine, "signal", workflow_id=str(waiting), name="go", payload='"went"')
        errors = ended(session_factory, *bad, *good)
    assert [errors[each] for each in good] == [{}] * len(good)
    messages = {each: errors[each]["message"] for each in bad}
    assert {each: what in messages[each] for each, what in bad.items()} == dict.fromkeys(bad, True), messages


def test_numbers_of_attempts_and_crashes_stop_at_what_their_columns_hold(
    engine: Engine, session_factory: Sessions
) -> None:
    gone = {"status": "running", "worker_id": str(races.WORKER), "token": str(races.WORKER), "started_at": "2020-01-01"}
    most = 2**31 - 1
    last = insert(engine, name="well", attempt=most, **gone)
    crashed = insert(engine, name="well", attempt=most, crashes=2**15 - 1, **gone)
    equal = insert(engine, name="well", attempt=10, crashes=10, **gone)
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        errors = ended(session_factory, last, crashed, equal)
    assert errors[last] == {}
    assert errors[crashed]["type"] == errors[equal]["type"] == "sqla_durable.errors:MaxAttemptsError"
    with session_factory() as session:
        assert session.scalars(select(Workflow.attempt).where(Workflow.id == last)).one() == most


def test_a_signal_of_a_later_time_keeps_none_from_being_delivered(engine: Engine, session_factory: Sessions) -> None:
    insert(engine, "signal", workflow_id=str(insert(engine, name="nobody")), name="go", created_at="9999-12-30 00:00Z")
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        workflow_id = insert(engine, name="patient")
        suspended = select(func.count()).where(Workflow.status == WorkflowStatus.SUSPENDED)

        def is_suspended() -> bool:
            with session_factory() as session:
                return session.scalars(suspended).one() == 1

        races.wait_until(is_suspended, what="the suspend")
        insert(engine, "signal", workflow_id=str(workflow_id), name="go", payload='"went"')
        assert patient.handle(session_factory, workflow_id).result(timeout=timedelta(seconds=60)) == "went"


def test_workflows_that_are_each_other_s_parents_are_cancelled_and_deleted(
    engine: Engine, session_factory: Sessions
) -> None:
    one, other = insert(engine, name="nobody"), insert(engine, name="nobody")
    execute(engine, f"UPDATE durable.workflow SET parent_id = '{other}' WHERE id = '{one}'")
    execute(engine, f"UPDATE durable.workflow SET parent_id = '{one}' WHERE id = '{other}'")
    with session_factory.begin() as session:
        assert set(manage.cancel(session, one)) == {one, other}
        assert set(manage.delete(session, other)) == {one, other}


def test_a_parent_that_gives_up_cancels_its_children_whatever_circle_is_under_them(
    engine: Engine, session_factory: Sessions
) -> None:
    fence = races.claimed_fences(engine, 1)[0]
    first = insert(engine, name="nobody", parent_id=str(fence.workflow_id))
    second = insert(engine, name="nobody", parent_id=str(first))
    execute(engine, f"UPDATE durable.workflow SET parent_id = '{second}' WHERE id = '{fence.workflow_id}'")
    checkpoint = races.checkpoint(fence, "join")
    with session_factory() as session, pytest.raises(AttemptLost):  # which is cancelled with them
        children.cancel_rest(session, checkpoint, ids=[first])
