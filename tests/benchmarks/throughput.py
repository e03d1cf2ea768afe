"""How many one-step workflows a second one worker process carries, beside the naive way in the same run.

    python -m tests.benchmarks.throughput [WORKFLOWS]

Embedded PostgreSQL with fsync and synchronous_commit on, in a temporary directory; or DATABASE_URL. The naive way
claims, checkpoints and finishes one workflow at a time, each in a commit of its own.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from sqlalchemy import create_engine, func, make_url, select, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import AsyncWorkflowFunction, Durable, Worker, Workflow, WorkflowFunction, metadata, start_many
from sqla_durable.embedded import server
from sqla_durable.status import StepStatus, WorkflowStatus
from sqla_durable.store import Checkpoint, Completion, queues, steps, workflows

NAIVE = 500

durable = Durable()


@durable.step
def increment(number: int) -> int:
    return number + 1


@durable.workflow
def in_threads(number: int) -> int:
    return increment(number)


@durable.step
async def increment_on_loop(number: int) -> int:
    return number + 1


@durable.workflow
async def on_loop(number: int) -> int:
    return await increment_on_loop(number)


@dataclass(frozen=True)
class Figure:
    what: str
    workflows: int
    seconds: float
    commits: int

    @property
    def rate(self) -> float:
        return self.workflows / self.seconds

    def show(self, naive: Figure) -> str:
        commits = self.commits / self.workflows
        return f"{self.what:34}{self.rate:10,.0f} /s{self.rate / naive.rate:8.1f} x naive{commits:8.2f} commits each"


def main(count: int) -> None:
    with _database() as url:
        engine = create_engine(url)
        metadata.create_all(engine)
        sessions = sessionmaker(engine)
        naive = _naive(sessions, NAIVE)
        with sessions.begin() as session:
            session.execute(text("TRUNCATE durable.workflow CASCADE"))
        print(naive.show(naive))
        print(_bulk(sessions, on_loop, count).show(naive))
        print(asyncio.run(_worker(sessions, on_loop, count)).show(naive))
        _bulk(sessions, in_threads, count)
        print(asyncio.run(_worker(sessions, in_threads, count)).show(naive))
        engine.dispose()


@contextmanager
def _database() -> Generator[str]:
    given = os.environ.get("DATABASE_URL")
    with nullcontext() if given else server() as embedded:
        yield given or str(embedded.url if embedded else "")


def _naive(sessions: sessionmaker[Session], count: int) -> Figure:
    _bulk(sessions, in_threads, count)
    with sessions() as session:
        return _measured("naive: one at a time, three commits", session, count, lambda: _one_at_a_time(session, count))


def _one_at_a_time(session: Session, count: int) -> None:
    for _ in range(count):
        front = {"default": queues.FRONT}
        batch = queues.claim(session, worker_id=uuid7(), token=uuid7(), after=front, names=["in_threads"], limit=1)
        (claimed,) = batch.claimed
        session.commit()
        recorded = Checkpoint(claimed.fence, "increment", "increment", 1, StepStatus.SUCCEEDED, "1", None, 1, 1, 0.0)
        steps.record(session, recorded)
        session.commit()
        workflows.finish(session, Completion(claimed.fence, WorkflowStatus.SUCCEEDED, output="1"))
        session.commit()


def _bulk(
    sessions: sessionmaker[Session],
    workflow: WorkflowFunction[[int], int] | AsyncWorkflowFunction[[int], int],
    count: int,
) -> Figure:
    with sessions() as session:

        def start() -> None:
            start_many(session, (workflow.bind(number) for number in range(count)))
            session.commit()

        return _measured("start_many", session, count, start)


async def _worker(
    sessions: sessionmaker[Session],
    workflow: WorkflowFunction[[int], int] | AsyncWorkflowFunction[[int], int],
    count: int,
) -> Figure:
    bind = sessions.kw["bind"]
    engine = create_async_engine(make_url(bind.url))
    with sessions() as session:
        commits, began = _commits(session), time.perf_counter()
        async with Worker(durable, async_sessionmaker=async_sessionmaker(engine)):
            while _succeeded(session, workflow.name) < count:
                await asyncio.sleep(0.05)
            seconds = time.perf_counter() - began
        figure = Figure(f"worker: {workflow.name}", count, seconds, _commits(session) - commits)
    await engine.dispose()
    return figure


def _measured(what: str, session: Session, count: int, work: Callable[[], None]) -> Figure:
    commits, began = _commits(session), time.perf_counter()
    work()
    return Figure(what, count, time.perf_counter() - began, _commits(session) - commits)


def _succeeded(session: Session, name: str) -> int:
    done = select(func.count()).where(Workflow.name == name, Workflow.status == WorkflowStatus.SUCCEEDED)
    found = session.scalars(done).one()
    session.rollback()
    return found


def _commits(session: Session) -> int:
    session.execute(text("SELECT pg_stat_force_next_flush(), pg_stat_clear_snapshot()"))
    session.rollback()
    found = session.scalars(text("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")).one()
    session.rollback()
    return int(found)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5_000)
