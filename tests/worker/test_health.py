"""What a worker says of itself to probes: whether it serves, and whether its event loop answers."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import sessionmaker

from sqla_durable import Durable, Worker

SOON = timedelta(milliseconds=50)


def said(worker: Worker) -> tuple[bool, bool]:
    """Return whether it serves, and whether its event loop answers."""
    return worker.is_serving, worker.responds()


def test_it_serves_from_its_start_to_its_stop(engine: Engine) -> None:
    worker = Worker(Durable(), sessionmaker=sessionmaker(engine))
    assert said(worker) == (False, True)
    with worker:
        assert said(worker) == (True, True)
        assert worker._serving is not None  # pyright: ignore[reportPrivateUsage]
        heartbeat: Any = worker._serving._heartbeat  # pyright: ignore[reportPrivateUsage]
        heartbeat._valid_until = float("-inf")  # as after an outage that was longer than the lease
        assert said(worker) == (False, True)
        heartbeat._valid_until = float("inf")
        worker.stop()
        assert said(worker) == (False, True)
    assert said(worker) == (False, True)


def test_an_event_loop_that_is_blocked_does_not_answer(
    engine: Engine, async_session_factory: async_sessionmaker[AsyncSession]
) -> None:
    durable, blocked, end = Durable(), threading.Event(), threading.Event()

    @durable.workflow
    async def block() -> None:
        blocked.set()
        end.wait()

    with sessionmaker(engine).begin() as session:
        block.start(session)
    with Worker(durable, async_sessionmaker=async_session_factory) as worker:
        blocked.wait()
        assert not worker.responds(within=SOON)
        end.set()
        assert worker.responds()
