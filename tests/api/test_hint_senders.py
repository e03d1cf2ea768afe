"""The senders of hints: what they send together, and what they leave when an engine, a loop or a process ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

import pytest
from sqlalchemy import (
    AsyncAdaptedQueuePool,
    Engine,
    NullPool,
    Pool,
    QueuePool,
    StaticPool,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_durable.api import hints
from sqla_durable.api.hints import announce
from tests.api.notifying import DRIVERS, Make, Statements, asynchronous, commit_hint, mail
from tests.support.notifications import PATIENCE, Ear
from tests.support.sampling import thorough_cases


def _setter(happened: asyncio.Event) -> Callable[..., None]:
    def set_event(*_args: object, **_options: object) -> None:
        happened.set()

    return set_event


def join_senders() -> None:
    for thread in threading.enumerate():
        if thread.name == "durable-hints":
            thread.join(PATIENCE)


class Connections:
    """The driver's connections that an engine has opened and not closed."""

    def __init__(self, engine: Engine) -> None:
        self.opened: list[object] = []
        event.listen(engine, "connect", self._note)
        for end in ("close", "close_detached"):
            event.listen(engine, end, self._forget)

    def _note(self, connection: object, _record: object) -> None:
        self.opened.append(connection)

    def _forget(self, connection: object, *_: object) -> None:
        self.opened.remove(connection)


def test_hints_that_gather_are_sent_together_and_a_pool_of_one_connection_is_enough(make: Make, ear: Ear) -> None:
    engine = make(pool_size=1, max_overflow=0)
    statements = Statements(engine)
    queues = [f"queue {number}" for number in range(20)]
    with engine.connect() as connection:
        for queue in queues:
            with Session(connection) as session:
                announce(session, queue)
                session.commit()
    assert sorted(ear.hears(20)) == sorted(queues)
    assert len(statements.notifying) <= 2  # the first may have gone ahead


@DRIVERS
async def test_async_hints_that_gather_are_sent_together(direct_url: str, ear: Ear, driver: str) -> None:
    engine = create_async_engine(
        make_url(direct_url).set(drivername=f"postgresql+{driver}"), pool_size=1, max_overflow=0
    )
    statements = Statements(engine.sync_engine)
    queues = [f"queue {number}" for number in range(20)]
    async with engine.connect() as connection:
        for queue in queues:
            async with AsyncSession(connection) as session:
                await session.run_sync(announce, queue)
                await session.commit()
    assert sorted(await asyncio.to_thread(ear.hears, 20)) == sorted(queues)
    assert len(statements.notifying) <= 2
    await engine.dispose()


def test_hint_that_cannot_be_sent_is_logged_and_forgotten(
    make: Make, ear: Ear, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make(pool_size=1, max_overflow=0, pool_timeout=0.01)
    caplog.set_level(logging.DEBUG, "sqla_durable")
    with engine.connect() as connection:
        with Session(connection) as session:
            announce(session, "lost")
            session.commit()
        join_senders()
    assert [(each.levelno, each.message[:23]) for each in caplog.records] == [
        (logging.DEBUG, "a hint was not sent, wo")
    ]
    commit_hint(engine, "next")
    assert ear.hears() == ["next"]


def test_pool_that_shares_its_connection_gives_no_hints(make: Make, own: Engine, ear: Ear) -> None:
    engine = make(poolclass=StaticPool)
    statements = Statements(engine)
    with Session(engine) as session:
        mail.start(session)
        session.commit()
    commit_hint(own, "last")
    assert ear.hears() == ["last"]
    assert statements.notifying == []


@pytest.mark.parametrize("moment", ["checkout", "before_cursor_execute", "checkin"])
def test_engine_that_is_disposed_of_while_a_hint_is_sent_leaves_no_connection(
    make: Make, ear: Ear, moment: str
) -> None:
    engine = make()
    there, disposed = threading.Event(), threading.Event()
    connections = Connections(engine)

    @event.listens_for(engine, moment)
    def wait(*_: object) -> None:
        if threading.current_thread().name == "durable-hints":
            there.set()
            assert disposed.wait(PATIENCE)

    commit_hint(engine, "q:mail")
    assert there.wait(PATIENCE)
    engine.dispose()
    disposed.set()
    assert ear.hears() == ["q:mail"]
    join_senders()
    assert connections.opened == []


def test_engine_that_is_disposed_of_before_a_hint_is_sent_leaves_no_connection(make: Make, ear: Ear) -> None:
    engine = make()
    disposed = threading.Event()
    connections = Connections(engine)

    @event.listens_for(engine, "before_cursor_execute")
    def wait(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if "pg_notify" in statement and "first" in str(parameters):
            assert disposed.wait(PATIENCE)

    commit_hint(engine, "first")
    commit_hint(engine, "second")  # gathers while the first is held up
    engine.dispose()
    disposed.set()
    assert sorted(ear.hears(2)) == ["first", "second"]
    join_senders()
    assert connections.opened == []


def test_connection_that_goes_back_between_the_emptying_of_a_pool_and_its_end_is_closed(make: Make, ear: Ear) -> None:
    emptied = threading.Event()

    class Slow(QueuePool):
        def dispose(self) -> None:
            super().dispose()
            if threading.current_thread() is threading.main_thread() and not emptied.is_set():
                emptied.set()
                sender = hints._senders[self]  # pyright: ignore[reportPrivateUsage]
                assert isinstance(sender, hints._ThreadSender)  # pyright: ignore[reportPrivateUsage]
                sender.settle(PATIENCE)

    engine = make(poolclass=Slow)
    connections = Connections(engine)

    @event.listens_for(engine, "checkin")
    def wait(*_: object) -> None:
        if threading.current_thread().name == "durable-hints":
            assert emptied.wait(PATIENCE)

    commit_hint(engine, "mail")
    assert ear.hears() == ["mail"]
    engine.dispose()
    join_senders()
    assert connections.opened == []


MOMENTS = {
    AsyncAdaptedQueuePool: ["commit", "checkout", "before_cursor_execute"],
    NullPool: ["commit", "do_connect", "connect", "checkout", "before_cursor_execute"],
}


ENDS = [
    (driver, pool, *pair)
    for driver in ("psycopg", "asyncpg")
    for pool, moments in MOMENTS.items()
    for pair in combinations_with_replacement(moments, 2)
]


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize(("driver", "pool", "first", "last"), [*ENDS[::2], *thorough_cases(ENDS[1::2])])
def test_loop_that_ends_while_a_hint_is_sent_leaves_nothing_behind(
    direct_url: str, driver: str, pool: type[Pool], first: str, last: str
) -> None:
    """The engine is disposed of right after the commit, or at a moment of what follows; the loop ends then or later."""

    async def start() -> None:
        engine = asynchronous(direct_url, driver, poolclass=pool)
        come = {moment: asyncio.Event() for moment in (first, last)}
        async with AsyncSession(engine) as session:
            await mail.start(session)
            for moment in come.keys() - {"commit"}:
                event.listen(engine.sync_engine, moment, _setter(come[moment]))
            await session.commit()
        for moment in (first, last):
            if moment != "commit":
                await come[moment].wait()
            await engine.dispose()

    for _ in range(2):
        asyncio.run(start())
    gc.collect()  # what was left open warns, and a warning is an error


@DRIVERS
def test_each_event_loop_sends_its_own(direct_url: str, ear: Ear, driver: str) -> None:
    engine = asynchronous(direct_url, driver)

    async def start() -> None:
        async with AsyncSession(engine) as session:
            await mail.start(session)
            await session.commit()
        assert await asyncio.to_thread(ear.hears) == ["q:mail"]
        await engine.dispose()

    asyncio.run(start())
    asyncio.run(start())


@pytest.mark.usefixtures("few_objects")
def test_sender_keeps_no_engine(direct_url: str, ear: Ear) -> None:
    engine = create_engine(direct_url)
    commit_hint(engine, "q:mail")
    assert ear.hears() == ["q:mail"]
    join_senders()
    engine.dispose()
    kept = weakref.ref(engine)
    del engine
    gc.collect()
    assert kept() is None


def test_script_that_starts_a_workflow_and_ends_gives_its_hint(direct_url: str, ear: Ear) -> None:
    _execute(
        f"""
        engine = create_engine({direct_url!r})
        with Session(engine) as session:
            announce(session, "from the script")
            session.commit()
        """
    )
    assert ear.hears() == ["from the script"]


def test_forked_process_gives_its_own_hints(direct_url: str, ear: Ear) -> None:
    _execute(
        f"""
        engine = create_engine({direct_url!r})

        def commit(queue):
            with Session(engine) as session:
                announce(session, queue)
                session.commit()

        commit("parent")
        child = os.fork()
        if child == 0:
            engine.dispose(close=False)
            commit("child")
        else:
            assert os.waitpid(child, 0)[1] == 0
        """
    )
    assert sorted(ear.hears(2)) == ["child", "parent"]


def _execute(code: str) -> None:
    header = """
        import os
        from sqlalchemy import create_engine
        from sqlalchemy.orm import Session
        from sqla_durable.api.hints import announce
    """
    script = textwrap.dedent(header) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
