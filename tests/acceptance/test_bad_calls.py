"""Names that nobody knows, and calls in the wrong place: each error says what happened and what to do."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import Durable, Executor, Step, Worker, Workflow, WorkflowStatus
from sqla_durable.errors import ArgumentError, DefinitionError, NotFoundError, SessionError, UsageError
from tests.acceptance.bad_input import Sessions, aship, bare, book, durable, ship
from tests.acceptance.shells import POLL

pytestmark = pytest.mark.few_shells


# Unknown names of workflows


def test_unknown_workflow_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no workflow named 'shipp' is registered: did you mean 'ship'") as caught:
        durable.registry.workflow("shipp")
    assert "Import the module that defines it" in str(caught.value)
    with pytest.raises(UsageError, match=r"registered are \['aship', "):
        durable.registry.workflow("xyz")


# behaviour: R9
def test_row_that_no_worker_here_knows_stays_for_one_that_does(session_factory: Sessions) -> None:
    stranger = Durable()
    stranger_ship = stranger.workflow(lambda: "strange", name="stranger")
    known = Durable()

    @known.workflow
    def familiar() -> str:
        return "known"

    with session_factory.begin() as session:
        strange_id = stranger_ship.start(session).id
        known_id = familiar.start(session).id
    with Worker(known, sessionmaker=session_factory, poll_interval=POLL):
        assert familiar.handle(session_factory, known_id).result(timeout=timedelta(seconds=30)) == "known"
    with session_factory() as session:
        record = session.get_one(Workflow, strange_id)
        assert (record.status, record.attempt, record.error) == (WorkflowStatus.PENDING, 1, None)
    with Worker(stranger, sessionmaker=session_factory, poll_interval=POLL):
        assert stranger_ship.handle(session_factory, strange_id).result(timeout=timedelta(seconds=30)) == "strange"


def test_worker_warns_of_names_that_it_does_not_know(session_factory: Sessions) -> None:
    known = Durable()
    known.workflow(lambda: None, name="familiar")
    with session_factory.begin() as session:
        session.add(Workflow(name="stranger"))
    warnings: queue.Queue[str] = queue.Queue()
    handler = logging.Handler()
    handler.emit = lambda record: warnings.put(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("sqla_durable.worker")
    log.addHandler(handler)
    try:
        with Worker(known, sessionmaker=session_factory, poll_interval=POLL):
            warning = warnings.get(timeout=30)
    finally:
        log.removeHandler(handler)
    assert "workflows named 'stranger' wait in the queues 'default' and are not registered here" in warning
    assert "a worker that knows them will claim them. Registered here: 'familiar'." in warning


# Calls in the wrong place, and definitions that cannot work


def test_transactional_step_outside_a_workflow_is_explained() -> None:
    with pytest.raises(UsageError, match=r"step 'book' takes a Session, .*pass one, book\(session, ...\)"):
        book(7)


async def test_sync_calls_in_a_running_event_loop_are_refused(session_factory: Sessions) -> None:
    with session_factory.begin() as session:
        record = ship.start(session, 7)
        session.flush()
        session.expunge(record)
    with session_factory() as session:
        with pytest.raises(UsageError, match=r"Executor.run\(\) would block the event loop .*: use AsyncExecutor"):
            Executor(session).run(ship, 1)
        with pytest.raises(UsageError, match=r"Executor.execute\(\) would block"):
            Executor(session).execute(ship, record)
    with pytest.raises(UsageError, match=r"Handle.result\(\) would block .*await ship.handle"):
        ship.handle(session_factory, record).result()
    with pytest.raises(UsageError, match=r"Worker.run\(\) would block .*async with worker"):
        Worker(bare, sessionmaker=session_factory).run()
    with session_factory() as session:
        assert session.scalars(select(Workflow.status)).all() == [WorkflowStatus.PENDING]


def test_workflow_of_the_other_kind_is_refused(session_factory: Sessions) -> None:
    with session_factory() as session:
        with pytest.raises(UsageError, match=r"workflow 'aship' is async def: execute it with AsyncExecutor"):
            Executor(session).run(aship, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(ArgumentError, match=r"an executor runs a function decorated with @durable.workflow, got"):
            Executor(session).run(print, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        assert session.scalars(select(Workflow)).all() == []


def test_executor_refuses_to_wait_for_a_delay(session_factory: Sessions) -> None:
    with session_factory() as session, pytest.raises(ArgumentError, match="an executor executes at once"):
        Executor(session).run(ship.options(delay=timedelta(hours=1)), 1)


def test_unknown_workflow_id_is_explained(session_factory: Sessions) -> None:
    missing = uuid7()
    with session_factory() as session, pytest.raises(NotFoundError, match=f"no workflow {missing} is visible"):
        Executor(session).execute(ship, missing)
    with pytest.raises(NotFoundError, match="is the transaction that started it committed"):
        ship.handle(session_factory, missing).result()


def test_workflow_whose_arguments_have_no_names_is_refused() -> None:
    def positional(*orders: int) -> None: ...
    def named(**orders: int) -> None: ...

    for fn, parameter in ((positional, r"\*orders"), (named, r"\*\*orders")):
        with pytest.raises(DefinitionError, match=f"takes {parameter}.*: arguments are stored by parameter name"):
            Durable().workflow(fn)


def test_definitions_that_cannot_work_are_refused() -> None:
    bad = Durable()

    async def async_with_session(session: Session) -> None: ...
    def sync_with_async_session(session: AsyncSession) -> None: ...
    def workflow_with_session(session: Session) -> None: ...

    with pytest.raises(DefinitionError, match=r"is async def and takes a Session, .*: take an AsyncSession"):
        bad.step(async_with_session)
    with pytest.raises(DefinitionError, match=r"is def and takes an AsyncSession, .*: make it async def"):
        bad.step(sync_with_async_session)
    with pytest.raises(DefinitionError, match="takes a session: a workflow lives longer than any transaction"):
        bad.workflow(workflow_with_session)
    with pytest.raises(DefinitionError, match="name the step with name="):
        bad.step(lambda: None)
    with pytest.raises(DefinitionError, match="which is 1,001 bytes long"):
        bad.workflow(lambda: None, name="a" * 1001)
    with pytest.raises(DefinitionError, match="stop=3 is not a tenacity object: pass, for example"):
        bad.step(lambda: None, name="x", stop=3)  # type: ignore[call-overload]  # pyright: ignore


def test_result_annotation_that_cannot_be_stored_is_found_when_its_name_is_known(session_factory: Sessions) -> None:
    def connect() -> "Connected":  # type: ignore[name-defined]  # noqa: F821, UP037  # pyright: ignore
        called.append(True)

    called: list[bool] = []
    bad = Durable()
    step = bad.step(connect)  # pyright: ignore

    @bad.workflow
    def connecting() -> None:
        ignored: Any = step  # pyright: ignore
        ignored()

    globals()["Connected"] = Engine
    with pytest.raises(DefinitionError, match=r"result of step 'connect' is annotated .*Engine.*cannot be stored"):
        Worker(bad, sessionmaker=session_factory)
    with session_factory() as session, pytest.raises(DefinitionError, match="result of step 'connect'"):
        Executor(session).run(connecting)
    assert not called
    del globals()["Connected"]


def test_step_arguments_may_be_anything(session_factory: Sessions) -> None:
    clients = Durable()

    @clients.step
    def ask(client: Engine, callback: Callable[[], int]) -> int:
        return callback()

    @clients.workflow
    def asking() -> int:
        return ask(create_engine("sqlite://"), lambda: 7)

    with session_factory() as session:
        assert Executor(session).run(asking) == 7
        assert session.scalars(select(Step.output)).all() == [7]


def test_worker_in_the_background_that_cannot_start_says_so_at_once() -> None:
    engine = create_engine("sqlite://")
    with pytest.raises(SessionError, match="is bound to sqlite"), Worker(Durable(), sessionmaker=sessionmaker(engine)):
        pytest.fail("it has not started")
    engine.dispose()
