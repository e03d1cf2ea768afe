"""What kills its workers, or fails for ever, ends or waits by itself; what stands beside it in the queue goes on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow, WorkflowStatus, errors, manage
from tests.crash import poison
from tests.store import races
from tests.support.domain import Entry
from tests.support.sampling import thorough_cases

LONG = 60.0
LONG_WAIT = timedelta(seconds=LONG)
"""Seconds; several back-offs, and processes that start on a machine that is busy."""


def start(engine: Engine, name: str, count: int = 1, **arguments: Any) -> list[UUID]:
    with Session(engine) as session:
        return races.enqueue(session, count, name=name, input=arguments)


def record(engine: Engine, workflow_id: UUID) -> Workflow:
    with Session(engine, expire_on_commit=False) as session:
        return session.get_one(Workflow, workflow_id)


def succeeded(engine: Engine, ids: list[UUID]) -> bool:
    with Session(engine) as session:
        found = set(session.scalars(select(Workflow.status).where(Workflow.id.in_(ids))))
    assert WorkflowStatus.FAILED not in found
    return found == {WorkflowStatus.SUCCEEDED}


def entries(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return sorted(session.scalars(select(Entry.account)))


@pytest.fixture
def cure(tmp_path: Path) -> Path:
    """A file whose existence makes poison harmless."""
    return tmp_path / "cure"


@pytest.mark.parametrize("name", ["poison", *thorough_cases(["poison_async"])])
def test_poison_is_stopped_after_max_attempts_and_fails_nobody_beside_it(
    engine: Engine, database_url: str, cure: Path, name: str
) -> None:
    # behaviour: R4
    (poison_id,) = start(engine, name, cure=str(cure))
    good = [start(engine, "good", account=f"{number:02}")[0] for number in range(20)]
    with poison.supervised(database_url, concurrency=8, max_attempts=5) as supervisor:
        races.wait_until(lambda: succeeded(engine, good), what="the end of the others", seconds=LONG)
        races.wait_until(lambda: record(engine, poison_id).finished_at, what="the end of the poison", seconds=LONG)
    found = record(engine, poison_id)
    assert found.error is not None
    assert found.error["type"] == "sqla_durable.errors:MaxAttemptsError"
    assert (found.status, found.attempt, found.crashes) == (WorkflowStatus.FAILED, 5, 5)
    assert supervisor.deaths == 5
    assert entries(engine) == [f"{number:02}" for number in range(20)]


def test_poison_in_the_only_slot_does_not_starve_its_queue(engine: Engine, database_url: str, cure: Path) -> None:
    # behaviour: Q4
    (poison_id,) = start(engine, "poison", cure=str(cure))
    good = [start(engine, "good", account=f"{number:02}")[0] for number in range(5)]
    with poison.supervised(database_url, concurrency=1, max_attempts=1_000) as supervisor:
        races.wait_until(lambda: succeeded(engine, good), what="the end of the others", seconds=LONG)
        assert supervisor.deaths >= 1
    assert not record(engine, poison_id).status.finished


def test_poison_that_was_stopped_and_is_resumed_succeeds_when_it_is_cured(
    engine: Engine, database_url: str, cure: Path, session_factory: sessionmaker[Session]
) -> None:
    # behaviour: R4 M1
    (poison_id,) = start(engine, "poison", cure=str(cure))
    handle = poison.poison.handle(session_factory, poison_id)
    with poison.supervised(database_url, max_attempts=2) as supervisor:
        with pytest.raises(errors.MaxAttemptsError):
            handle.result(timeout=LONG_WAIT)
        cure.touch()
        with session_factory.begin() as session:
            stopped = Workflow.error["type"].astext == "sqla_durable.errors:MaxAttemptsError"
            assert manage.resume(session, select(Workflow).where(stopped)) == [poison_id]
        assert handle.result(timeout=LONG_WAIT) == "cured"
        assert supervisor.deaths == 2
    found = record(engine, poison_id)
    assert (found.attempt, found.crashes, found.error) == (3, 0, None)
    assert entries(engine) == ["cured"]


def test_a_long_workflow_that_makes_progress_between_deaths_is_not_stopped(engine: Engine, database_url: str) -> None:
    # behaviour: R4
    (workflow_id,) = start(engine, "long", account="a")
    with poison.supervised(database_url, max_attempts=2) as supervisor:
        races.wait_until(lambda: succeeded(engine, [workflow_id]), seconds=LONG)
        assert supervisor.deaths == poison.STAGES - 1
    assert record(engine, workflow_id).attempt == poison.STAGES
    assert entries(engine) == [f"a/{stage}" for stage in range(poison.STAGES)]


class Broken(BaseException):
    """What the engine takes for a fault of its own."""


def broken(calls: list[int]) -> Durable:
    """Return an application with a workflow that breaks its attempts at once."""
    durable = Durable()

    @durable.workflow
    def poison() -> None:
        calls.append(1)
        raise Broken

    return durable


def failing_for_ever(calls: list[int]) -> Durable:
    """Return an application with a step that fails at once, is tried again at once, and never given up."""
    durable = Durable()

    @durable.step(wait=tenacity.wait_none())
    def fail() -> None:
        calls.append(1)
        raise ConnectionError

    @durable.workflow
    def poison() -> None:
        fail()

    return durable


def failing(calls: list[int]) -> Durable:
    """Return an application with a workflow that fails at once."""
    durable = Durable()

    @durable.workflow
    def poison() -> None:
        calls.append(1)
        raise ConnectionError

    return durable


@pytest.mark.parametrize("make", [broken, failing_for_ever, failing])
def test_what_fails_at_once_does_not_starve_its_queue(
    engine: Engine, session_factory: sessionmaker[Session], make: Callable[[list[int]], Durable]
) -> None:
    """In the only slot, and first in the queue."""
    # behaviour: Q4
    calls: list[int] = []
    durable = make(calls)

    @durable.workflow
    def good(number: int) -> int:
        return number

    start(engine, "poison", 3)
    ids = start(engine, "good", 5, number=1)
    options: dict[str, Any] = {"concurrency": 1, "poll_interval": poison.POLL, "max_attempts": 1_000}
    with Worker(durable, sessionmaker=session_factory, **options):
        races.wait_until(lambda: succeeded(engine, ids), what="the end of the others", seconds=LONG)
    assert len(calls) >= 3


def test_a_step_that_is_tried_at_once_for_ever_leaves_its_slot_after_a_second(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    """From then on it is suspended between its tries; each try comes after what was enqueued before it."""
    # behaviour: Q4 R6
    calls: list[int] = []
    (poison_id,) = start(engine, "poison")
    with Worker(failing_for_ever(calls), sessionmaker=session_factory, concurrency=1, poll_interval=poison.POLL):
        first = races.wait_until(lambda: record(engine, poison_id).started_at)
        suspended = races.wait_until(lambda: _enqueued_again(engine, poison_id), seconds=LONG)
        assert suspended is not None
        assert first is not None
        assert suspended - first >= timedelta(seconds=1)
        tries = len(calls)
        races.wait_until(lambda: len(calls) > tries + 2, what="more tries")
    found = record(engine, poison_id)
    assert (found.attempt, found.crashes, found.status.finished) == (1, 0, False)


def _enqueued_again(engine: Engine, workflow_id: UUID) -> datetime | None:
    found = record(engine, workflow_id)
    return found.enqueued_at if found.enqueued_at > found.created_at else None
