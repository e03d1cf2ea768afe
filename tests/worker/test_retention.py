"""Workers delete what the policies say: those of the code, of a row, and of a row that changes."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqla_durable import Durable, Worker, manage
from sqla_durable.definitions.registry import Registry
from sqla_durable.errors import ArgumentError, DefinitionError
from sqla_durable.execution.worker.database import open_databases
from sqla_durable.execution.worker.retention import Retention
from sqla_durable.models import Retention as Policy
from tests.acceptance.shells import POLL
from tests.support.retained import DAY, ended, left, row_of
from tests.worker.ticking import Sessions, until


def declaring(*names: str, keep: timedelta = 5 * DAY) -> Durable:
    durable = Durable()

    @durable.workflow
    def checkout() -> None: ...

    for each in names:
        durable.retention(each, workflow=None if each == "all" else "checkout", keep=keep)
    return durable


def test_a_worker_carries_out_what_the_code_declares_and_obeys_a_change_by_sql(
    engine: Engine, session_factory: Sessions, caplog: pytest.LogCaptureFixture
) -> None:
    with session_factory() as session:
        old, young, other = ended(session), ended(session, days=3), ended(session, name="other")
        manage.put_retention(session, "by hand", workflow="another", keep=DAY)
        session.commit()
    with Worker(declaring("orders"), sessionmaker=session_factory, poll_interval=POLL):
        until(lambda: left(engine) == {young, other}, "the first deletion")
        with engine.begin() as connection:
            connection.execute(text("UPDATE durable.retention SET keep = '1 day', due_at = NULL WHERE name = 'orders'"))
        until(lambda: left(engine) == {other}, "the deletion after the change")
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO durable.retention (name, keep) VALUES ('rest', '1 day')"))
        until(lambda: left(engine) == set(), "the deletion of the rest")
    assert old != young
    assert row_of(engine, "orders").deleted == 2
    caplog.set_level(logging.INFO, "sqla_durable.worker")
    with Worker(declaring("all"), sessionmaker=session_factory, poll_interval=POLL):
        pass
    with Session(engine) as session:
        assert {each.name: each.declared for each in session.query(Policy)} == {
            "all": True,
            "by hand": False,
            "rest": False,
        }
    assert "retention 'orders' is dropped: the code no longer declares it" in caplog.text
    assert "retention 'all' is as the code declares it now" in caplog.text
    with Worker(declaring(), sessionmaker=session_factory, poll_interval=POLL):
        pass
    assert row_of(engine, "all").declared
    assert "retention 'all' was declared by other code than this, and goes on" in caplog.text


def test_a_batch_that_fails_is_made_smaller_and_then_passed_over(
    engine: Engine, session_factory: Sessions, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails is a whole transaction, such as one that takes too long; nothing of it is deleted."""
    with session_factory() as session:
        first, second = ended(session, days=20), ended(session)
        manage.put_retention(session, "all", keep=DAY)
        session.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF OLD.id = "
                f"'{first}' THEN RAISE EXCEPTION USING ERRCODE = '57014'; END IF; RETURN OLD; END $$"
            )
        )
        session.execute(
            text("CREATE TRIGGER refuse BEFORE DELETE ON durable.workflow FOR EACH ROW EXECUTE FUNCTION refuse()")
        )
        session.commit()

    async def carry_out() -> int:
        databases = open_databases(engine, hold=0, limit=5.0, beat_limit=5.0)
        retention = Retention(databases, Registry())
        for _ in range(2):
            assert await retention.execute() is None
            assert left(engine) == {first, second}
        assert f"passing over workflow {first}, which cannot be deleted now: " in caplog.text
        batch = await retention.execute()
        assert batch is None, "it is due once the walk has passed over it"
        with engine.begin() as connection:
            connection.execute(text("UPDATE durable.retention SET due_at = NULL"))
        batch = await retention.execute()
        assert batch is not None
        for each in databases.all:
            await each.close()
        return batch.deleted

    assert asyncio.run(carry_out()) == 1
    assert left(engine) == {first}
    assert row_of(engine, "all").refused == 1
    with engine.begin() as connection:
        connection.execute(text("DROP FUNCTION refuse() CASCADE"))


def test_a_declaration_that_is_none_is_refused() -> None:
    durable = declaring("orders")
    durable.retention("orders", workflow="checkout", keep=5 * DAY)
    with pytest.raises(DefinitionError, match="two policies of retention are named 'orders'"):
        durable.retention("orders", keep=DAY)
    with pytest.raises(ArgumentError, match="less than a second"):
        durable.retention("a", keep=timedelta(0))
    with pytest.raises(ArgumentError, match="status='running' is none of succeeded, failed, cancelled"):
        durable.retention("a", keep=DAY, status="running")
    with pytest.raises(ArgumentError, match="policy's name"):
        durable.retention(" ", keep=DAY)
