"""Queues with limits that keep nobody else waiting: whose claims fail, that are many, or that somebody changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, event, func, text
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, manage, start_many
from sqla_durable.models.queues import QueueUse
from tests.acceptance.shells import PATIENCE, POLL
from tests.store.races import wait_until

REFUSE = """
CREATE FUNCTION refuse_claims() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.name = 'ill' THEN RAISE EXCEPTION 'not now' USING ERRCODE = '{code}'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse_claims BEFORE UPDATE ON durable.queue FOR EACH ROW EXECUTE FUNCTION refuse_claims();
"""


@contextmanager
def listening(engine: Engine, note: Callable[..., None]) -> Generator[None]:
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", note)


@pytest.mark.parametrize("code", ["57014", "55P03", "53200"])
def test_a_queue_whose_claims_fail_does_not_keep_the_others_waiting(
    engine: Engine, session_factory: sessionmaker[Session], code: str
) -> None:
    durable = Durable()
    for each in ("ill", "well"):
        durable.queue(each, concurrency=2)

    @durable.workflow
    def work() -> int:
        return 1

    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        with engine.begin() as connection:
            connection.execute(text(REFUSE.format(code=code)))
        with session_factory.begin() as session:
            (ill,) = start_many(session, [work.options(queue="ill").bind()])
        for queue in ("well", "default") * 5:
            with session_factory.begin() as session:
                (started,) = start_many(session, [work.options(queue=queue).bind()])
            assert work.handle(session_factory, started).result(timeout=timedelta(seconds=5)) == 1
        with engine.begin() as connection:
            connection.execute(text("DROP TRIGGER refuse_claims ON durable.queue"))
        assert work.handle(session_factory, ill).result(timeout=PATIENCE) == 1


def test_many_queues_with_limits_do_not_keep_the_others_waiting(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    """Their claims are tried again and again, though their rates have no room for days."""
    durable, count = Durable(), 100

    @durable.workflow
    def work() -> int:
        return 1

    with session_factory.begin() as session:
        for number in range(count):
            manage.put_queue(session, f"full.{number}", rate=(1, timedelta(days=9)))
            session.add(QueueUse(queue=f"full.{number}", by="", used_at=func.now(), claim=uuid4(), number=1))
        start_many(session, [work.options(queue=f"full.{number}").bind() for number in range(count)])
    claims: list[str] = []

    def note(*given: Any) -> None:
        if "UPDATE durable.workflow SET status=" in given[2]:
            claims.append("limited" if "durable.queue_use" in given[2] else "ordinary")

    with (
        listening(engine, note),
        Worker(durable, sessionmaker=session_factory, queues=["default", "full.*"], poll_interval=POLL),
    ):
        wait_until(lambda: claims.count("limited") > 2 * count)
    between = [len([*group]) for kind, group in itertools.groupby(claims) if kind == "limited"]
    assert max(between) <= 40


def test_a_worker_that_waits_for_the_row_of_a_queue_can_be_stopped(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    """It does not begin without the limits that its code declares."""
    durable = Durable()
    durable.queue("mail", concurrency=2)
    worker = Worker(durable, sessionmaker=session_factory, poll_interval=POLL)
    with session_factory.begin() as session, ThreadPoolExecutor() as threads:
        manage.put_queue(session, "mail", concurrency=3)
        running = threads.submit(worker.run)
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        with engine.connect() as connection:
            wait_until(lambda: connection.execute(text(waits)).scalar())
        worker.stop()
        running.result(timeout=60)
