"""Rows that no claim can read or change, in queues with limits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Worker, Workflow, WorkflowStatus, manage
from tests.acceptance.shells import POLL
from tests.support.sampling import thorough_cases
from tests.worker.test_hostile_rows import REFUSED, curse, durable, ended, hostile_rows, insert, start_well

SETTINGS: list[dict[str, Any]] = [
    {"concurrency": 1},
    {"per_key": 1},
    {"fifo": "skip"},
    {"fair": True, "concurrency": 2},
    {"aging": timedelta(days=366)},
    {"aging": timedelta(milliseconds=1), "fair": True, "concurrency": 2},
    {"rate": (1000, timedelta(days=366)), "key_rate": (1000, timedelta(days=1))},
]


SLOTS = pytest.mark.parametrize("slots", [8, *thorough_cases([1])])
"""With one slot each claim takes one row."""


@pytest.fixture(params=SETTINGS, ids=str)
def settings(session_factory: sessionmaker[Session], request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings of the queue `default`."""
    settings: dict[str, Any] = request.param
    with session_factory.begin() as session:
        manage.put_queue(session, "default", **settings)
    return settings


@pytest.mark.usefixtures("settings")
@SLOTS
def test_rows_that_no_claim_can_read_fail_alone(
    engine: Engine, session_factory: sessionmaker[Session], slots: int
) -> None:
    columns = hostile_rows(engine)
    healthy = start_well(session_factory)
    with session_factory.begin() as session:
        session.execute(update(Workflow).values(by="a"))
    healthy = [*healthy, *start_well(session_factory)]
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL, concurrency=slots):
        errors = ended(session_factory, *columns, *healthy)
    assert [errors[each] for each in healthy] == [{}] * len(healthy)
    assert {errors[each]["type"] for each in columns} == {REFUSED}


@SLOTS
def test_what_cannot_even_be_failed_keeps_no_place(
    engine: Engine, session_factory: sessionmaker[Session], settings: dict[str, Any], slots: int
) -> None:
    """Nor its key; with fifo, what is behind it waits."""
    curse(engine)
    bad = insert(engine, name="ill", by="a", enqueued_at="2020-01-01")
    behind = insert(engine, name="well", by="a")
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL, concurrency=slots):
        ended(session_factory, *start_well(session_factory))
        ended(session_factory, *([] if "fifo" in settings else [behind]), insert(engine, name="well", by="b"))
    with session_factory() as session:
        for each in (bad, behind)[: 2 if "fifo" in settings else 1]:
            assert session.get_one(Workflow, each).status is WorkflowStatus.PENDING
