"""Crash everywhere: one run for each point before, inside and after each commit; the end state is always the same."""

from __future__ import annotations

import signal
from functools import partial
from itertools import count
from multiprocessing.process import BaseProcess
from typing import Any, cast
from uuid import UUID

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqla_durable import Executor, Workflow
from tests.crash import application, child, ledger
from tests.store import races

MOMENTS = ["before", "inside", "after"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", ["small", "small_async"])
def test_a_worker_that_dies_around_any_commit_leaves_the_same_end_state(
    database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    monkeypatch.setenv("CRASH_URL", database_url)
    ends: list[tuple[object, ...]] = []
    for commit in count(1):
        (workflow_id,) = ledger.start(engine, [name])
        with child.worker(database_url, child.Plan(commit=commit, moment=moment)) as process:
            races.wait_until(partial(_died_or_finished, process, engine, workflow_id))
            process.join(0.2)
            died = process.exitcode == -signal.SIGKILL
        races.expire_leases(engine)
        with child.worker(database_url):
            races.wait_until(partial(_finished, engine, workflow_id))
        ends.append(ledger.end_state(engine, workflow_id))
        if not died:
            break
    assert len(ends) >= 5, "claim, three operations and the outcome have at least four commits"
    assert all(end == ends[-1] for end in ends)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("successor", ["executor", "worker"])
def test_an_executor_that_dies_around_any_commit_is_taken_up(
    database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, moment: str, successor: str
) -> None:
    """By another run with the same key, or by a worker of its queue, once the lease has run out."""
    monkeypatch.setenv("CRASH_URL", database_url)
    ends: list[tuple[object, ...]] = []
    for commit in count(1):
        key = f"{moment}-{commit}"
        with child.executor(database_url, child.Plan(commit=commit, moment=moment), key) as process:
            process.join(30)
            died = process.exitcode == -signal.SIGKILL
            assert died or process.exitcode == 0
        races.expire_leases(engine)
        if successor == "worker" and _id_of(engine, key) is not None:
            with child.worker(database_url):
                races.wait_until(partial(_finished, engine, _require(_id_of(engine, key))))
        with Session(engine) as session:
            assert Executor(session).run(application.small.options(key=key), key) == f"{key}/1"
        ends.append(ledger.end_state(engine, _require(_id_of(engine, key))))
        if not died:
            break
    assert len(ends) >= 6
    assert all(end == ends[-1] for end in ends)


def _died_or_finished(process: BaseProcess, engine: Engine, workflow_id: UUID) -> bool:
    return not process.is_alive() or _finished(engine, workflow_id)


def _finished(engine: Engine, workflow_id: UUID) -> bool:
    return races.status_of(engine, workflow_id).finished


def _id_of(engine: Engine, key: str) -> object:
    with Session(engine) as session:
        return session.scalars(select(Workflow.id).where(Workflow.key == key)).one_or_none()


def _require(found: object) -> UUID:
    assert isinstance(found, UUID)
    return found


@pytest.mark.parametrize("point", [each for each in application.POINTS if each.startswith("sync t")])
def test_an_executor_that_dies_inside_a_step_is_taken_up_after_its_lease(
    database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv("CRASH_URL", database_url)
    with child.executor(database_url, child.Plan(point, 2), "k") as process:
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    workflow_id = _require(_id_of(engine, "k"))
    with child.worker(database_url):
        races.wait_until(lambda: races.status_of(engine, workflow_id).finished)
    status, _, history, credited, calls = ledger.end_state(engine, workflow_id)
    assert str(status) == "succeeded"
    assert [each[0] for each in cast("list[tuple[Any, ...]]", history)] == ["credit", "call", "credit#2"]
    assert credited == [("/0", 1), ("/1", 1)]
    assert calls == ["/call"]
