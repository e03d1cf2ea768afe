"""Hints to workers: which of them a caller's transaction gives, after its commit, on another connection."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, func, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from sqla_durable import Executor, Workflow, manage, start_many
from sqla_durable.api.hints import EVERYWHERE
from sqla_durable.models import Base
from tests.api.notifying import DRIVERS, Make, Statements, asynchronous, commit_hint, durable, mail
from tests.support.databases import translated
from tests.support.notifications import Ear

LATER = timedelta(days=1)


@durable.workflow
def plain() -> None: ...


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
def test_hint_comes_after_the_commit_and_not_before(own: Engine, ear: Ear) -> None:
    with Session(own) as session:
        mail.start(session)
        session.flush()
        commit_hint(own, "meanwhile")
        assert ear.hears() == ["meanwhile"]
        session.commit()
        assert ear.hears() == ["q:mail"]


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
@DRIVERS
async def test_hint_comes_after_the_commit_of_an_async_session(
    direct_url: str, ear: Ear, driver: str, durable_schema: str
) -> None:
    engine = asynchronous(direct_url, driver)
    bind = AsyncEngine(translated(engine.sync_engine, durable_schema))
    async with AsyncSession(bind) as session, AsyncSession(bind) as other:
        await mail.start(session)
        await plain.start(other)
        await other.commit()
        assert await asyncio.to_thread(ear.hears) == ["q:default"]
        await session.commit()
        assert await asyncio.to_thread(ear.hears) == ["q:mail"]
    await engine.dispose()


def test_rolled_back_start_gives_no_hint(own: Engine, ear: Ear) -> None:
    with Session(own) as session:
        mail.start(session)
        session.rollback()
        plain.start(session)
        session.commit()
    assert ear.hears() == ["q:default"]


def test_session_that_is_closed_or_resets_gives_no_hint(own: Engine, ear: Ear) -> None:
    session = Session(own)
    for end in (session.close, session.reset, session.invalidate):
        mail.start(session)
        end()
        session.commit()
    commit_hint(own, "last")
    assert ear.hears() == ["last"]


def test_released_savepoint_gives_no_hint_before_the_commit(own: Engine, ear: Ear) -> None:
    with Session(own) as session:
        with session.begin_nested():
            mail.start(session)
        commit_hint(own, "meanwhile")
        assert ear.hears() == ["meanwhile"]
        session.commit()
    assert ear.hears() == ["q:mail"]


def test_session_gives_hints_transaction_by_transaction(own: Engine, ear: Ear) -> None:
    with Session(own) as session:
        for workflow, queue in ((mail, "q:mail"), (plain, "q:default"), (mail, "q:mail")):
            workflow.start(session)
            session.commit()
            assert ear.hears() == [queue]
        session.commit()
    commit_hint(own, "last")
    assert ear.hears() == ["last"]


def test_session_bound_to_a_connection_gives_hints(own: Engine, ear: Ear) -> None:
    with own.connect() as connection, Session(connection, join_transaction_mode="create_savepoint") as session:
        mail.start(session)
        session.commit()
        assert ear.hears() == ["q:mail"]


def test_session_of_several_engines_gives_hints_where_our_tables_are(own: Engine, ear: Ear) -> None:
    elsewhere = create_engine("sqlite://")
    with Session(elsewhere, binds={Base: own}) as session:
        mail.start(session)
        session.commit()
    elsewhere.dispose()
    assert ear.hears() == ["q:mail"]


def test_start_with_a_delay_hints_at_a_timer(own: Engine, ear: Ear) -> None:
    with Session(own) as session:
        mail.options(delay=LATER).start(session)
        session.commit()
    assert ear.hears() == [EVERYWHERE]


def test_bulk_start_hints_at_each_queue_once(own: Engine, ear: Ear) -> None:
    with Session(own) as session:
        start_many(session, [mail.bind(), plain.bind(), mail.bind(), mail.options(delay=LATER).bind()])
        session.commit()
    assert sorted(ear.hears(3)) == [EVERYWHERE, "q:default", "q:mail"]
    commit_hint(own, "last")
    assert ear.hears() == ["last"]


def test_resumed_workflow_may_be_on_any_queue(own: Engine, ear: Ear) -> None:
    with Session(own) as session:
        record = mail.start(session)
        session.commit()
        assert ear.hears() == ["q:mail"]
        manage.cancel(session, record)
        session.commit()
        manage.resume(session, record)
        session.commit()
        assert ear.hears() == [EVERYWHERE]
        assert manage.resume(session, record) == []
        session.commit()
    commit_hint(own, "last")
    assert ear.hears() == ["last"]


def test_cancel_sends_one_hint_to_each_worker_that_executes_part_of_the_tree(own: Engine, ear: Ear) -> None:
    worker_id = uuid4()
    with Session(own) as session:
        ids = start_many(session, [mail.bind() for _ in range(5)])
        running = {"status": "running", "token": uuid4(), "worker_id": worker_id, "started_at": func.now()}
        session.execute(update(Workflow).where(Workflow.id.in_(ids[:3])).values(running))
        session.commit()
        assert ear.hears() == ["q:mail"]
        assert manage.cancel(session, ids[3]) == [ids[3]]
        assert len(manage.cancel(session, select(Workflow))) == 4
        session.commit()
        assert ear.hears() == [f"w:{worker_id}"]
        manage.cancel(session, select(Workflow))
        session.commit()
    commit_hint(own, "last")
    assert ear.hears() == ["last"]


def test_executor_needs_no_worker_and_gives_no_hint(own: Engine, ear: Ear) -> None:
    with Session(own) as session:
        Executor(session).run(mail)
    commit_hint(own, "last")
    assert ear.hears() == ["last"]


def test_caller_executes_nothing_for_a_hint(make: Make, ear: Ear) -> None:
    engine = make()
    statements = Statements(engine)
    with Session(engine) as session:
        mail.start(session)
        own = session.connection()
        session.commit()
        assert ear.hears() == ["q:mail"]
    assert len(statements.notifying) == 1
    assert own not in statements.notifying
