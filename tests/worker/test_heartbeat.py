"""What a heartbeat hands back: what the tables give to its worker and nobody executes, and no claim on its way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import Durable, WorkflowStatus
from sqla_durable.execution.worker.attempts import Attempts
from sqla_durable.execution.worker.database import ThreadDatabase
from sqla_durable.execution.worker.gatherer import Gatherer
from sqla_durable.execution.worker.heartbeat import Heartbeat
from sqla_durable.execution.worker.runtimes import Surroundings
from sqla_durable.execution.worker.writer import Writer
from sqla_durable.operations.arrivals import Arrivals
from sqla_durable.store import claims
from tests.store import races


@pytest.fixture
def threads() -> Generator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


def heartbeat_of(database: ThreadDatabase, engine: Engine, threads: ThreadPoolExecutor) -> Heartbeat:
    surroundings = Surroundings(
        database=database,
        writer=Writer(database),
        gatherer=Gatherer(database),
        arrivals=Arrivals(),
        threads=threads,
        sessionmaker=sessionmaker(engine),
        async_sessionmaker=None,
        sync_places=threading.Semaphore(1),
        async_places=asyncio.Semaphore(1),
        stopping=threading.Event(),
        stopping_async=asyncio.Event(),
        loop=asyncio.get_running_loop(),
    )
    attempts = Attempts(Durable().registry, surroundings, database, concurrency=1, max_attempts=9)
    return Heartbeat(database, attempts, worker_id=races.WORKER, queues=["default"], lease=races.LEASE, name="ada")


async def test_what_a_claim_takes_is_not_handed_back_before_its_answer_and_is_after_it_was_lost(
    engine: Engine, threads: ThreadPoolExecutor
) -> None:
    database = ThreadDatabase(engine, limit=races.PATIENCE)
    heartbeat = heartbeat_of(database, engine, threads)
    token = uuid7()
    with Session(engine) as session:
        (workflow_id,) = races.enqueue(session)
        with heartbeat.claiming(token):
            claims.claim_one(session, workflow_id, worker_id=races.WORKER, token=token)
            session.commit()
            await heartbeat.release_strays()
            assert races.status_of(engine, workflow_id) is WorkflowStatus.RUNNING
        await heartbeat.release_strays()
        assert races.status_of(engine, workflow_id) is WorkflowStatus.PENDING
    await database.close()
