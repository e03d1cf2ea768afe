"""What users' code raises that is no `Exception`: each of it has one meaning, wherever it is raised, and no cycle."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import tenacity
from sqlalchemy import select
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import Execution, Interceptor, Saga, Workflow, WorkflowStatus, errors, parallel, unwinding
from sqla_durable.errors import MaxAttemptsError, UsageError, WorkflowFailedError
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell

pytestmark = pytest.mark.few_shells

WORKERS = pytest.mark.shells(("worker", "asyncpg-worker"))


class Odd(BaseException):
    """Neither an `Exception` nor anything of ours."""


def ends_client() -> None:
    """Do what a client library does that cancels a task of its own, in `def` code."""

    async def client() -> None:
        task = asyncio.create_task(asyncio.sleep(3600))
        task.cancel()
        await task

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(client())
    raise asyncio.CancelledError


def raising(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


OWN: dict[str, Callable[[], None]] = {
    "CancelledError": ends_client,
    "CancelledError of a future": raising(concurrent.futures.CancelledError()),
    "SystemExit": lambda: sys.exit(3),
    "a group": raising(BaseExceptionGroup("both", [asyncio.CancelledError(), ValueError("x")])),
    "StopIteration": raising(StopIteration(1)),
    "StopAsyncIteration": raising(StopAsyncIteration()),
    "Released": raising(unwinding.Released()),
    "Suspended": raising(unwinding.Suspended()),
    "a group with Released": raising(BaseExceptionGroup("both", [unwinding.Released(), ValueError("x")])),
}
"""What is the failure of the code that raises it."""


# behaviour: O4
def test_what_a_step_raises_is_its_failure_and_the_workflow_goes_on(shell: Shell, app: Application) -> None:
    executed: list[str] = []

    def fail(kind: str) -> None:
        executed.append(kind)
        OWN[kind]()

    def fail_in(session: Session, kind: str) -> None:
        fail(kind)

    steps = app.plain(fail), app.transactional(fail_in)

    async def careful() -> list[str]:
        caught: list[str] = []
        for step in steps:
            for kind in OWN:
                try:
                    await step(kind)
                except Exception as error:
                    caught.append(f"{type(error).__name__}: {error}")
        return caught

    caught = shell.run(app.workflow(careful))
    assert executed == [*OWN, *OWN]
    assert [each.split(":")[0] for each in caught[: len(OWN)]] == [each.split(":")[0] for each in caught[len(OWN) :]]
    assert caught[0] == "CancelledError: step 'fail' ended with a CancelledError of its own."
    assert caught[2] == "StepFailedError: step 'fail#3' failed with builtins:SystemExit: 3"
    assert "only the engine may raise" in caught[6]
    assert _only(shell).crashes == 0


# behaviour: O4
def test_what_a_workflow_raises_is_its_failure(shell: Shell, app: Application) -> None:
    executed: list[str] = []
    kinds = ["CancelledError", "a group", "Released"]

    async def careless(kind: str) -> None:
        executed.append(kind)
        OWN[kind]()

    workflow = app.workflow(careless)
    for kind in kinds:
        with pytest.raises((errors.UsageError, WorkflowFailedError), match=r"CancelledError|only the engine|both"):
            shell.run(workflow, kind)
    assert (_only(shell).status, _only(shell).attempt, executed) == (WorkflowStatus.FAILED, 1, kinds)


# behaviour: O4
def test_a_step_that_was_cancelled_within_is_tried_again_as_its_policy_says(shell: Shell, app: Application) -> None:
    tries: list[None] = []

    def flaky() -> str:
        tries.append(None)
        if len(tries) < 3:
            ends_client()
        return "done"

    step = app.plain(flaky, wait=tenacity.wait_none())

    async def patient() -> str:
        return await step()

    assert shell.run(app.workflow(patient)) == "done"
    assert len(tries) == 3


# behaviour: O4
def test_what_an_interceptor_raises_is_the_failure_of_what_it_is_around(shell: Shell, app: Application) -> None:
    class Breaking(Interceptor):
        @contextmanager
        def step(self, execution: Execution) -> Generator[None]:
            yield
            ends_client()

        @contextmanager
        def workflow(self, execution: Execution) -> Generator[None]:
            yield
            raise asyncio.CancelledError

    app.durable.intercept(Breaking())
    step = app.plain(_nothing)

    async def observed() -> str:
        try:
            await step()
        except concurrent.futures.CancelledError:
            return "caught"
        return "passed"

    with pytest.raises(errors.UsageError, match="CancelledError of its own"):
        shell.run(app.workflow(observed))
    steps = shell.one(shell.only).steps
    assert [each.status for each in steps] == ["failed"]


# behaviour: O4
def test_a_saga_undoes_what_was_done_before_a_cancelled_error_and_all_of_it(shell: Shell, app: Application) -> None:
    undone: list[str] = []

    def undo(what: str) -> None:
        undone.append(what)
        if what == "hotel":
            ends_client()

    step = app.plain(undo)

    async def travel() -> None:
        saga = either.Saga()
        await _enter(saga)
        try:
            saga.add(step.step, "flight")
            saga.add(step.step, "hotel")
            saga.add(ends_client)
            ends_client()
        except BaseException as error:
            await _leave(saga, error)
            raise

    with pytest.raises(errors.CompensationFailedError, match="2 of 3"):
        shell.run(app.workflow(travel))
    assert undone == ["hotel", "flight"]


# behaviour: O4
@pytest.mark.shells(("worker", "executor"))
def test_a_branch_in_a_thread_that_raises_fails_its_workflow_only(shell: Shell, app: Application) -> None:
    executed: list[None] = []

    async def splitting(kind: str) -> None:
        executed.append(None)
        parallel(_nothing, OWN[kind])

    workflow = app.workflow(splitting)
    for kind in ("CancelledError", "Released"):
        with pytest.raises(errors.UsageError, match=r"CancelledError of its own|only the engine"):
            shell.run(workflow, kind)
    assert len(executed) == 2


# behaviour: O4
@WORKERS
@pytest.mark.parametrize("error", [Odd(), GeneratorExit()], ids=repr)
def test_what_ends_an_attempt_on_a_worker_is_counted(shell: Shell, app: Application, error: BaseException) -> None:
    async def poison() -> None:
        await step()

    step = app.plain(raising(error))
    workflow = app.workflow(poison)
    workflow_id = shell.begin(workflow)
    with shell.background(max_attempts=1), pytest.raises(MaxAttemptsError, match=type(error).__name__):
        shell.result(workflow, workflow_id)
    assert shell.one(workflow_id).crashes == 1


# behaviour: O4
@pytest.mark.shells(("worker",))
def test_ctrl_c_in_a_thread_is_an_error_of_its_code(shell: Shell, app: Application) -> None:
    """No signal arrives there: it is raised by the code itself."""

    async def odd() -> None:
        raise KeyboardInterrupt

    with pytest.raises(WorkflowFailedError, match="KeyboardInterrupt"):
        shell.run(app.workflow(odd))


# behaviour: O4
@pytest.mark.shells(("executor", "async-executor"))
def test_what_ends_an_attempt_of_an_executor_is_raised_as_it_is(shell: Shell, app: Application) -> None:
    kinds: dict[str, BaseException] = {"odd": Odd(), "ctrl-c": KeyboardInterrupt(), "closed": GeneratorExit()}

    async def poison(kind: str) -> None:
        await step(kind)

    def die(kind: str) -> None:
        raise kinds[kind]

    step = app.plain(die)
    workflow = app.workflow(poison)
    for kind, error in kinds.items():
        with pytest.raises(type(error)):
            shell.run(workflow, kind)
        record = _only(shell)
        assert (record.status, record.crashes) == (WorkflowStatus.PENDING, 0)


# behaviour: O4
@pytest.mark.shells(("async-executor", "asyncpg-worker"))
def test_a_call_that_a_task_group_cancels_because_the_attempt_ends_is_made_again(
    shell: Shell, app: Application
) -> None:
    """Not recorded as cancelled: the next attempt would wait for a cancel that does not come."""
    tries: list[str] = []
    begun: asyncio.Event

    @app.durable.step
    async def dying() -> str:
        if not tries:
            await begun.wait()
        tries.append("dying")
        if len(tries) == 1:
            raise Odd
        return "alive"

    @app.durable.step
    async def slow() -> str:
        begun.set()
        while not tries:
            await asyncio.sleep(3600)
        return "done"

    @app.durable.workflow
    async def both() -> list[str]:
        nonlocal begun
        begun = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            made = [group.create_task(each()) for each in (dying, slow)]
        return [each.result() for each in made]

    workflow_id = shell.begin(both)
    with suppress(BaseExceptionGroup):  # of the executor
        shell.finish(both, workflow_id)
    assert shell.finish(both, workflow_id) == ["alive", "done"]
    assert tries == ["dying", "dying"]


# behaviour: O4
@pytest.mark.shells(("asyncpg-worker",))
def test_a_workflow_that_cancels_its_own_task_fails(shell: Shell, app: Application) -> None:
    executed: list[None] = []

    async def self_cancelled() -> None:
        executed.append(None)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(3600)

    with pytest.raises(UsageError, match="ended with a CancelledError of its own"):
        shell.run(app.workflow(self_cancelled))
    assert len(executed) == 1


# behaviour: O4
@pytest.mark.shells(("mixed-worker",))
def test_what_a_sync_step_of_an_async_workflow_raises_is_its_failure(shell: Shell, app: Application) -> None:
    """In a thread, and beside others: asyncio would end the event loop for some of what its tasks raise."""
    kinds: dict[str, Callable[[], None]] = {**OWN, "ctrl-c": raising(KeyboardInterrupt()), "nothing": lambda: None}

    @app.durable.step
    def fail(kind: str) -> None:
        kinds[kind]()

    @app.durable.step
    def fail_in(session: Session, kind: str) -> None:
        kinds[kind]()

    @app.durable.workflow
    async def careful() -> list[str]:
        calls: list[Any] = [
            aio.to_thread(step, kind) for step in (fail, fail_in) for kind in kinds if kind != "nothing"
        ]
        outcomes: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        try:
            await aio.to_thread(fail_in, "CancelledError")
        except concurrent.futures.CancelledError as error:  # and no cancel of this task
            outcomes.append(error)
        await aio.to_thread(fail, "nothing")
        return [f"{type(each).__name__}: {each}" for each in outcomes]

    caught = shell.run(careful)
    assert "ended with a CancelledError of its own" in caught.pop()
    assert len(caught) == 2 * len(kinds) - 2
    assert "ended with a CancelledError of its own" in caught[0]
    assert "KeyboardInterrupt" in caught[len(OWN)]
    assert "KeyboardInterrupt" in caught[-1]
    assert _only(shell).crashes == 0


def _nothing() -> None:
    pass


async def _enter(saga: Saga | aio.Saga) -> None:
    if isinstance(saga, aio.Saga):
        await saga.__aenter__()
    else:
        saga.__enter__()


async def _leave(saga: Saga | aio.Saga, error: BaseException) -> None:
    how: Any = type(error), error, error.__traceback__
    if isinstance(saga, aio.Saga):
        await saga.__aexit__(*how)
    else:
        saga.__exit__(*how)


def _only(shell: Shell) -> Workflow:
    with shell.sessionmaker() as session:
        return session.scalars(select(Workflow)).all()[-1]
