"""Processes that can be killed: workers and executors, forked from a server that has everything imported."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

from sqlalchemy import NullPool, create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Executor, Worker
from sqla_durable.testing.crash_points import CrashPoint, ProcessKiller
from tests.crash import application
from tests.support.processes import forked

LEASE = timedelta(seconds=0.6)
POLL = timedelta(seconds=0.02)


@dataclass(frozen=True)
class Plan:
    """Where a process is to die: at a visit to a point in the application, or around one of its commits.

    Attributes:
        place: the point in the application.
        visits: at which visit to it.
        point: the commit, and the moment around it.
    """

    place: str | None = None
    visits: int = 1
    point: CrashPoint | None = None


@contextmanager
def worker(url: str, plan: Plan | None = None, **options: Any) -> Generator[BaseProcess]:
    """A worker in a process of its own; it is killed at the end if it has not died before."""
    yield from _process(_work, url, plan or Plan(), options)


def kill_worker_after(seconds: float, url: str, **options: Any) -> None:
    """Let a worker execute workflows for a moment, in a process of its own, and kill it."""
    with worker(url, **options) as process:
        process.join(seconds)
        assert process.exitcode is None
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL


@contextmanager
def executor(url: str, plan: Plan, key: str) -> Generator[BaseProcess]:
    """An executor of the workflow `small`, committing per step, in a process of its own."""
    yield from _process(_execute, url, plan, key)


def _process(target: Any, *args: Any) -> Generator[BaseProcess]:
    process = forked.Process(target=target, args=args, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def make_worker(url: str, **options: Any) -> Worker:
    """Make a worker of the application that crashes."""
    settings: dict[str, Any] = {
        "lease": LEASE,
        "poll_interval": POLL,
        "concurrency": 8,
        "max_attempts": 1_000,
        **options,
    }
    return Worker(
        application.durable,
        sessionmaker=sessionmaker(create_engine(url)),
        async_sessionmaker=async_sessionmaker(create_async_engine(url)),
        **settings,
    )


def _work(url: str, plan: Plan, options: dict[str, Any]) -> None:
    os.environ["CRASH_URL"] = url
    application.fate.set(plan.place, plan.visits)
    _light(plan)
    make_worker(url, **options).run()


def _execute(url: str, plan: Plan, key: str) -> None:
    os.environ["CRASH_URL"] = url
    engine = create_engine(url, poolclass=NullPool)
    _light(plan)
    application.fate.set(plan.place, plan.visits)
    with Session(engine) as session:
        Executor(session, lease=LEASE).run(application.small.options(key=key), key)


def _light(plan: Plan) -> None:
    if plan.point is not None:
        ProcessKiller(plan.point, workflow_id=None, on_point=lambda _: None).install()
