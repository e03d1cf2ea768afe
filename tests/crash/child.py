"""Processes that can be killed: workers and executors, forked from a server that has everything imported."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

from sqlalchemy import Engine, NullPool, create_engine, event
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Executor, Worker
from tests.crash import application

LEASE = timedelta(seconds=0.6)
POLL = timedelta(seconds=0.02)

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.crash.child"])


@dataclass(frozen=True)
class Plan:
    """Where a process is to die: at a visit to a point in the application, or around one of its commits.

    Attributes:
        commit: the number of the commit, from 1, counting those that change workflows or checkpoints.
        moment: `before` it is sent, `inside`: sent and not answered, `after` its answer.
    """

    point: str | None = None
    visits: int = 1
    commit: int = 0
    moment: str = ""


@contextmanager
def worker(url: str, plan: Plan | None = None, **options: Any) -> Generator[BaseProcess]:
    """A worker in a process of its own; it is killed at the end if it has not died before."""
    yield from _process(_work, url, plan or Plan(), options)


@contextmanager
def executor(url: str, plan: Plan, key: str) -> Generator[BaseProcess]:
    """An executor of the workflow `small`, committing per step, in a process of its own."""
    yield from _process(_execute, url, plan, key)


def _process(target: Any, *args: Any) -> Generator[BaseProcess]:
    process = _processes.Process(target=target, args=args, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def _work(url: str, plan: Plan, options: dict[str, Any]) -> None:
    os.environ["CRASH_URL"] = url
    application.fate.set(plan.point, plan.visits)
    engine = create_engine(url)
    on_loop = create_async_engine(url)
    commits = _Commits(plan)
    commits.watch(engine)
    commits.watch(on_loop.sync_engine)
    settings: dict[str, Any] = {
        "lease": LEASE,
        "poll_interval": POLL,
        "concurrency": 8,
        "max_attempts": 1_000,
        **options,
    }
    Worker(
        application.durable,
        sessionmaker=sessionmaker(engine),
        async_sessionmaker=async_sessionmaker(on_loop),
        **settings,
    ).run()


def _execute(url: str, plan: Plan, key: str) -> None:
    os.environ["CRASH_URL"] = url
    engine = create_engine(url, poolclass=NullPool)
    _Commits(plan).watch(engine)
    application.fate.set(plan.point, plan.visits)
    with Session(engine) as session:
        Executor(session, lease=LEASE).run(application.small.options(key=key), key)


class _Commits:
    """Counts the commits that matter, and dies around one of them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._count = 0

    def watch(self, engine: Engine) -> None:
        """Watch the commits of an engine."""
        if not self._plan.commit:
            return
        event.listen(engine, "after_cursor_execute", self._note)
        commit = engine.dialect.do_commit
        plan = self._plan

        def do_commit(connection: Any) -> None:
            if not _wrote.pop(_server_process(connection), False):
                return commit(connection)
            self._count += 1
            if self._count == plan.commit and plan.moment == "before":
                application.die()
            if self._count == plan.commit and plan.moment == "inside":
                getattr(connection, "driver_connection", connection).pgconn.send_query(b"COMMIT")
                application.die()
            commit(connection)
            if self._count == plan.commit and plan.moment == "after":
                application.die()
            return None

        engine.dialect.do_commit = do_commit  # type: ignore[method-assign,assignment]

    @staticmethod
    def _note(connection: Any, cursor: Any, statement: str, *_: object) -> None:
        if cursor.rowcount > 0 and ("INTO durable.step" in statement or "UPDATE durable.workflow" in statement):
            _wrote[_server_process(connection.connection.dbapi_connection)] = True


_wrote: dict[int, bool] = {}


def _server_process(connection: Any) -> int:
    return int(getattr(connection, "driver_connection", connection).pgconn.backend_pid)
