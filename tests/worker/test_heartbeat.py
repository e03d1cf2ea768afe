"""A heartbeat releases what is claimed by its worker and not executed, but for claims that are on their way."""

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
from sqla_durable.execution.worker.heartbeat import Heartbeat
from sqla_durable.execution.worker.hints import Wakeups
from sqla_durable.execution.worker.isolation import Isolation
from sqla_durable.execution.worker.limited_queues import LimitedQueues
from sqla_durable.execution.worker.recorder import Resources, Sessions, Slots
from sqla_durable.execution.worker.settings import Settings
from sqla_durable.execution.worker.subscribed import Subscribed
from sqla_durable.execution.worker.writer import StreamWriter
from sqla_durable.operations.suspending import Wakers
from sqla_durable.runtime.waiting import InThread, OnLoop
from sqla_durable.store import claims
from tests.store import races


@pytest.fixture
def threads() -> Generator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


def heartbeat_of(database: ThreadDatabase, engine: Engine, threads: ThreadPoolExecutor) -> Heartbeat:
    stopping, loop = threading.Event(), asyncio.get_running_loop()
    resources = Resources(
        database=database,
        transacting=database,
        writer=races.writer(database),
        stream_writer=StreamWriter(database),
        threads=threads,
        sync_sessions=Sessions.in_threads(sessionmaker(engine), places=1),
        async_sessions=Sessions.on_loop(None, places=1),
        stopping=stopping,
        loop=loop,
        waiting_on_loop=OnLoop(),
        waiting_in_threads=InThread(loop=loop),
        slots=Slots(1),
        wakers=Wakers(),
    )
    isolation, wakeups = Isolation(database), Wakeups()
    limited = LimitedQueues([], wakeups.claims)
    attempts = Attempts(Durable().registry, resources, isolation, limited, wakeups.maintenance, max_attempts=9)
    settings = Settings(
        worker_id=races.WORKER,
        name="ada",
        queues=Subscribed(["default"]),
        names=[],
        versions=[],
        concurrency=1,
        transactions=1,
        lease=races.LEASE,
        poll_interval=races.LEASE,
        grace=races.LEASE,
        max_attempts=9,
    )
    return Heartbeat(database, attempts, isolation, wakeups.heartbeat, settings)


async def test_what_a_claim_takes_is_not_released_before_its_answer_but_after_it_was_lost(
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
