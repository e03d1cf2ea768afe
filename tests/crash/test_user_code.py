"""Errors, exits and sessions of user code that might make a worker lose something or hang."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, select
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Executor, Workflow, WorkflowStatus, models, run_step
from tests.crash.outcomes import run
from tests.support.domain import Entry


@pytest.fixture
def outcome(session_factory: sessionmaker[Session], engine: Engine) -> Callable[..., Workflow]:
    return partial(run, session_factory, engine)


# Errors of every kind


class Odd(BaseException):
    """Neither an `Exception` nor anything of ours."""


@pytest.mark.parametrize("odd", [Odd("x"), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("form", ["sync", "async"])
def test_a_base_exception_ends_its_workflow_and_not_the_worker(
    outcome: Callable[..., Workflow], odd: BaseException, form: str
) -> None:
    if form == "async" and isinstance(odd, SystemExit):
        pytest.skip("on the event loop's own thread sys.exit() ends the program, as in any asyncio program")
    durable = Durable()

    def exits() -> None:
        raise odd

    @durable.workflow(name="sync")
    def in_thread() -> None:
        run_step("exits", exits)

    @durable.workflow(name="async")
    async def on_loop() -> None:
        raise odd

    assert outcome(durable, form, max_attempts=2).status is WorkflowStatus.FAILED


def test_a_sync_step_that_exits_does_not_end_the_worker_of_an_async_workflow(outcome: Callable[..., Workflow]) -> None:
    durable = Durable()

    @durable.workflow
    async def exits() -> None:
        await aio.run_step("exit", sys.exit, 3)

    assert outcome(durable, "exits", max_attempts=2).status is WorkflowStatus.FAILED


def test_a_workflow_that_cancels_itself_ends(outcome: Callable[..., Workflow]) -> None:
    """Nothing from outside ended the attempt, so it must not be released and claimed again for ever."""
    durable = Durable()
    executions: list[None] = []

    @durable.workflow
    async def self_cancelled() -> None:
        executions.append(None)
        inner = asyncio.create_task(asyncio.sleep(3600))
        inner.cancel()
        await inner

    record = outcome(durable, "self_cancelled", max_attempts=3)
    assert record.status is WorkflowStatus.FAILED
    assert len(executions) <= 3


def test_a_step_that_raises_stop_iteration_does_not_hang_its_workflow(outcome: Callable[..., Workflow]) -> None:
    """A future does not take a StopIteration from a thread: Python 3.11 drops it, and the await never ends."""
    durable = Durable()

    def first_of_none() -> int:
        return next(iter(list[int]()))

    @durable.workflow
    async def stops() -> int:
        return await aio.to_thread(durable.step(first_of_none))

    assert outcome(durable, "stops").status is WorkflowStatus.FAILED


def test_an_error_with_arguments_that_json_does_not_hold_ends_its_workflow(outcome: Callable[..., Workflow]) -> None:
    durable = Durable()

    class Uncomparable:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("no")

    @durable.workflow
    def fails() -> None:
        raise ValueError({1: "a", 2: "b"}, Uncomparable())

    record = outcome(durable, "fails", max_attempts=2)
    assert record.error is not None
    assert record.error["type"] == "builtins:ValueError"
    assert record.attempt == 1


# Sessions


def test_a_session_that_cannot_be_made_frees_its_slot(engine: Engine, outcome: Callable[..., Workflow]) -> None:
    durable = Durable()
    failures = iter(range(3))

    class Flaky(Session):
        def __init__(self, **options: Any) -> None:
            if "close_resets_only" in options and next(failures, None) is not None:
                raise RuntimeError("no session today")
            super().__init__(**options)

    @durable.step
    def write(session: Session) -> None:
        session.add(Entry(account="a", cents=1))

    @durable.workflow
    def tries() -> None:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="no session today"):
                write()
        write()

    made = sessionmaker(engine, class_=Flaky)
    assert outcome(durable, "tries", sessionmaker=made, transactions=1).status is WorkflowStatus.SUCCEEDED


def test_an_error_after_the_commit_does_not_contradict_the_checkpoint(
    engine: Engine, outcome: Callable[..., Workflow]
) -> None:
    """A listener of the user's raises when everything is committed: the first run must see what a replay will."""
    durable = Durable()
    seen: list[str] = []

    class Loud(Session):
        pass

    @event.listens_for(Loud, "after_commit")
    def raise_after_commit(session: Session) -> None:
        raise RuntimeError("after the commit")

    @durable.step
    def write(session: Session) -> str:
        session.add(Entry(account="a", cents=1))
        return "written"

    @durable.workflow
    def commits() -> None:
        try:
            seen.append(write())
        except RuntimeError as error:
            seen.append(str(error))

    # The handle and the worker's own statements use plain sessions, so only the step meets the listener.
    record = outcome(durable, "commits", sessionmaker=sessionmaker(engine, class_=Loud))
    assert [(each.key, each.output) for each in record.steps] == [("write", "written")]
    assert seen == ["written"]


def test_a_step_that_writes_only_to_another_database_is_refused(
    engine: Engine, empty_database_url: str, outcome: Callable[..., Workflow]
) -> None:
    """Its checkpoint is in ours: two commits, and a crash between them."""
    durable = Durable()
    other = create_engine(empty_database_url)
    Entry.metadata.tables["entry"].create(other)

    @durable.step
    def elsewhere(session: Session) -> None:
        session.add(Entry(account="a", cents=1))
        session.flush()

    @durable.workflow
    def two_databases() -> None:
        elsewhere()

    both = sessionmaker(binds={Entry: other, models.Base: engine})
    record = outcome(durable, "two_databases", sessionmaker=both)
    with other.connect() as connection:
        assert connection.execute(select(Entry.id)).all() == []
    other.dispose()
    assert record.status is WorkflowStatus.FAILED
    assert record.error is not None
    assert record.error["type"] == "sqla_durable.errors:UsageError"


def test_an_engine_in_autocommit_is_refused(database_url: str, engine: Engine) -> None:
    """Without transactions there is no exactly-once: the business write would stand without its checkpoint."""
    durable = Durable()

    @durable.workflow
    def small() -> int:
        return 1

    careless = create_engine(database_url, isolation_level="AUTOCOMMIT")
    with Session(careless) as session, pytest.raises(Exception, match="AUTOCOMMIT"):
        Executor(session).run(small)
    careless.dispose()
