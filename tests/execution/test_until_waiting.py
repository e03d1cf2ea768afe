"""An executor that returns where its workflow waits: look at it, send what it waits for, and let it go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import tenacity
from sqlalchemy import Engine, NullPool
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import (
    Durable,
    Executor,
    StepStatus,
    UpdateRequest,
    Workflow,
    WorkflowStatus,
    complete_callback,
    create_callback,
    manage,
    models,
    parallel,
    send_signal,
    send_update,
    sleep,
    start_child,
    wait_signal,
    wait_update,
)
from sqla_durable.errors import SessionError, UsageError, WorkflowRunningError, WorkflowTimeoutError
from sqla_durable.testing import advance
from tests.support.domain import Entry

DAY = timedelta(days=1)
durable = Durable()


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="book", cents=cents, note=None))
    return cents


@durable.workflow
def approval(cents: int) -> str:
    book(cents)
    sleep(DAY)
    return f"{wait_signal('approved', str, timeout=DAY)} approved {cents}"


@durable.workflow(name="approval_async")
async def approval_async(cents: int) -> str:
    await aio.to_thread(book, cents)
    await aio.sleep(DAY)
    return f"{await aio.wait_signal('approved', str, timeout=DAY)} approved {cents}"


class Bench:
    """An executor of either kind, with the session that it works on."""

    def __init__(
        self,
        session: Session | AsyncSession,
        executor: Executor | aio.AsyncExecutor,
        runner: asyncio.Runner,
        *,
        joined: bool,
    ) -> None:
        self.session = session
        self.joined = joined
        self.executor: Any = executor
        self.runner = runner
        self.is_async = isinstance(session, AsyncSession)

    def choose(self, sync: Any, async_: Any) -> Any:
        return async_ if self.is_async else sync

    def call(self, method: str, *args: Any) -> Any:
        found = getattr(self.executor, method)(*args)
        return self.runner.run(found) if self.is_async else found

    def do(self, function: Callable[[Session], Any]) -> Any:
        if isinstance(self.session, AsyncSession):
            return self.runner.run(self.session.run_sync(function))
        return function(self.session)


@pytest.fixture(params=["joined", "committing", "async-joined", "async-committing"])
def bench(request: pytest.FixtureRequest, engine: Engine) -> Generator[Bench]:
    kind: type[Any] = aio.AsyncExecutor if request.param.startswith("async") else Executor
    joined = request.param.endswith("joined")
    make = kind.joined if joined else kind
    async_engine = create_async_engine(engine.url, poolclass=NullPool)
    with asyncio.Runner() as runner:
        if kind is aio.AsyncExecutor:
            async_session = AsyncSession(async_engine, expire_on_commit=False)
            yield Bench(async_session, make(async_session), runner, joined=joined)
            runner.run(async_session.close())
        else:
            with Session(engine) as session:
                yield Bench(session, make(session), runner, joined=joined)


def step_of(session: Session, record: Workflow, key: str) -> Any:
    return session.get_one(models.Step, (record.id, key))


def test_workflow_is_executed_until_it_waits_and_goes_on(bench: Bench) -> None:
    workflow = bench.choose(approval, approval_async)
    record = bench.call("run_until_waiting", workflow, 5)
    assert isinstance(record, Workflow)
    assert (record.status, record.awaits) == (WorkflowStatus.SUSPENDED, None)
    assert record.wake_at is not None
    assert bench.do(lambda session: [each.cents for each in session.query(Entry)]) == [5]

    assert bench.call("execute_until_waiting", workflow, record) is record
    assert record.attempt == 1, "nothing is executed before the time has come"

    bench.do(lambda session: advance(session, DAY))
    bench.call("execute_until_waiting", workflow, record)
    assert (record.status, record.awaits) == (WorkflowStatus.SUSPENDED, [{"signal": "approved"}])

    bench.do(lambda session: send_signal(session, record, "approved", "Ada"))
    assert bench.call("execute", workflow, record) == "Ada approved 5"
    assert (record.status, record.awaits) == (WorkflowStatus.SUCCEEDED, None)
    assert bench.do(lambda session: session.query(models.Worker).count()) == 0
    assert bench.do(lambda session: session.query(Entry).count()) == 1


def test_time_limit_of_a_wait_is_over_when_the_clock_was_advanced(bench: Bench) -> None:
    workflow = bench.choose(approval, approval_async)
    record = bench.call("run_until_waiting", workflow, 5)
    for _ in range(2):
        assert bench.do(lambda session: advance(session, DAY)) == 1
        if record.awaits is None:
            bench.call("execute_until_waiting", workflow, record)
    with pytest.raises(TimeoutError, match="no signal 'approved' arrived"):
        bench.call("execute_until_waiting", workflow, record)
    assert record.status is WorkflowStatus.FAILED


@pytest.mark.parametrize("bench", ["async-joined"], indirect=True)
def test_clock_is_moved_on_a_blocking_session(bench: Bench) -> None:
    assert bench.do(lambda session: advance(session, DAY)) == 0
    with pytest.raises(SessionError, match=r"await session.run_sync\(advance, timedelta\(...\)\)"):
        advance(bench.session, DAY)  # type: ignore[arg-type]


def test_workflow_of_a_known_key_is_taken_up_where_it_waits(bench: Bench) -> None:
    workflow = bench.choose(approval, approval_async).options(key="once")
    record = bench.call("run_until_waiting", workflow, 5)
    assert bench.call("run_until_waiting", workflow, 5) is record
    assert bench.do(lambda session: session.query(Entry).count()) == 1
    with pytest.raises(WorkflowRunningError, match=r"is suspended and waits until .*: let the time pass with"):
        bench.call("execute", workflow, record)


def test_message_says_what_a_workflow_waits_for_and_how_it_goes_on(bench: Bench) -> None:
    workflow = bench.choose(approval, approval_async)
    record = bench.call("run_until_waiting", workflow, 5)
    bench.do(lambda session: advance(session, DAY))
    bench.call("execute_until_waiting", workflow, record)
    bench.do(lambda session: send_signal(session, record, "aproved", "Ada"))
    with pytest.raises(WorkflowRunningError) as caught:
        bench.call("execute", workflow, record)
    message = str(caught.value)
    assert "is suspended and waits for signal 'approved' or until 2" in message
    assert "send it (sent and not taken: 'aproved'), let the time pass with sqla_durable.testing.advance" in message
    assert ("with a handle" in message) is not message.endswith("or give it to a worker.")
    assert ("with a handle" in message) is not bench.joined


def test_what_is_cancelled_while_it_waits_is_not_executed(bench: Bench) -> None:
    workflow = bench.choose(approval, approval_async)
    record = bench.call("run_until_waiting", workflow, 5)
    bench.do(lambda session: manage.cancel(session, record))
    assert record.status is WorkflowStatus.CANCELLED


@durable.workflow
def nothing(fail: bool) -> int:
    if fail:
        raise LookupError("an error of its own")
    return 7


@durable.workflow(name="nothing_async")
async def nothing_async(fail: bool) -> int:
    if fail:
        raise LookupError("an error of its own")
    return 7


def test_workflow_that_does_not_wait_has_ended(bench: Bench) -> None:
    workflow = bench.choose(nothing, nothing_async)
    record = bench.call("run_until_waiting", workflow, False)
    assert (record.status, record.output) == (WorkflowStatus.SUCCEEDED, 7)
    with pytest.raises(LookupError, match="an error of its own"):
        bench.call("run_until_waiting", workflow, True)


# Whatever else a workflow waits for


@durable.workflow
def child(number: int) -> int:
    return number + 1


@durable.workflow(name="child_async")
async def child_async(number: int) -> int:
    return number + 1


@durable.workflow
def asking() -> list[Any]:
    callback = create_callback(int)
    request: UpdateRequest[int] = wait_update("add", int)
    request.reply(request.payload + 1)
    return [request.payload, callback.result(), start_child(child, 3).result()]


@durable.workflow(name="asking_async")
async def asking_async() -> list[Any]:
    callback = await aio.create_callback(int)
    request = await aio.wait_update("add", int)
    await request.reply(request.payload + 1)
    return [request.payload, await callback.result(), await (await aio.start_child(child_async, 3))]


def test_updates_callbacks_and_children_are_waited_for(bench: Bench) -> None:
    workflow = bench.choose(asking, asking_async)
    record = bench.call("run_until_waiting", workflow)
    with pytest.raises(WorkflowRunningError, match="waits for update 'add': send it, or give it"):
        bench.call("execute", workflow, record)
    bench.do(lambda session: send_update(session, record, "add", 1))
    bench.call("execute_until_waiting", workflow, record)
    assert record.status is WorkflowStatus.SUSPENDED
    with pytest.raises(WorkflowRunningError, match="waits for the outcome of a callback: send it, or give it"):
        bench.call("execute", workflow, record)
    token = bench.do(lambda session: step_of(session, record, "create_callback").output["token"])
    bench.do(lambda session: complete_callback(session, token, 2))
    bench.call("execute_until_waiting", workflow, record)
    with pytest.raises(WorkflowRunningError, match="waits for its children: execute the children, or give it"):
        bench.call("execute", workflow, record)
    (started,) = bench.do(lambda session: list(session.query(Workflow).filter_by(parent_id=record.id)))
    assert bench.call("execute", bench.choose(child, child_async), started) == 4
    assert bench.call("execute", workflow, record) == [1, 2, 4]


tries: list[int] = []


@durable.step(wait=tenacity.wait_fixed(3600), stop=tenacity.stop_after_attempt(2))
def flaky(session: Session) -> int:
    tries.append(1)
    if len(tries) == 1:
        raise ValueError("not yet")
    return len(tries)


@durable.workflow
def trying() -> int:
    return flaky()


@durable.workflow(name="trying_async")
async def trying_async() -> int:
    return await aio.to_thread(flaky)


def test_longer_waits_between_tries_are_not_waited_for(bench: Bench) -> None:
    tries.clear()
    workflow = bench.choose(trying, trying_async)
    record = bench.call("run_until_waiting", workflow)
    step = bench.do(lambda session: step_of(session, record, "flaky"))
    assert (record.status, step.status, tries) == (WorkflowStatus.SUSPENDED, StepStatus.RETRYING, [1])
    bench.do(lambda session: advance(session, timedelta(hours=1)))
    assert bench.call("execute", workflow, record) == 2


@durable.workflow
def branching() -> list[str]:
    return list(parallel(lambda: wait_signal("a", str), lambda: wait_signal("b", str)))


@durable.workflow(name="branching_async")
async def branching_async() -> list[str]:
    return list(await asyncio.gather(aio.wait_signal("a", str), aio.wait_signal("b", str)))


def test_branches_wait_together(bench: Bench) -> None:
    workflow = bench.choose(branching, branching_async)
    record = bench.call("run_until_waiting", workflow)
    assert sorted(each["signal"] for each in record.awaits) == ["a", "b"]
    for name in ("a", "b"):
        bench.do(partial(send_signal, workflows=record, name=name, payload=name.upper()))
        bench.call("execute_until_waiting", workflow, record)
    assert bench.call("execute", workflow, record) == ["A", "B"]


@durable.workflow
async def limited() -> str:
    try:
        async with asyncio.timeout(3600):
            return await aio.wait_signal("go", str)
    except TimeoutError:
        return "too late"


@pytest.mark.parametrize("bench", ["async-joined", "async-committing"], indirect=True)
def test_timer_of_asyncio_fires_when_the_clock_was_advanced(bench: Bench) -> None:
    record = bench.call("run_until_waiting", limited)
    bench.do(lambda session: advance(session, timedelta(hours=1)))
    assert bench.call("execute", limited, record) == "too late"


def test_deadline_ends_what_waits(bench: Bench) -> None:
    workflow = bench.choose(approval, approval_async).options(timeout=timedelta(hours=1))
    record = bench.call("run_until_waiting", workflow, 5)
    bench.do(lambda session: advance(session, 2 * DAY))
    with pytest.raises(WorkflowTimeoutError):
        bench.call("execute_until_waiting", workflow, record)


def test_joined_executor_says_how_to_test_what_waits(session_factory: sessionmaker[Session]) -> None:
    with session_factory() as session, pytest.raises(UsageError, match=r"run_until_waiting\(\)"):
        Executor.joined(session).run(_waiting)


@durable.workflow
def _waiting() -> None:
    wait_signal("never")


async def test_record_is_read_on_a_session_that_begins_nothing_by_itself(engine: Engine) -> None:
    with sessionmaker(engine, autobegin=False)() as session:
        record = await asyncio.to_thread(Executor(session).run_until_waiting, approval, 5)
        assert record.status is WorkflowStatus.SUSPENDED
    async_engine = create_async_engine(engine.url, poolclass=NullPool)
    async with AsyncSession(async_engine, autobegin=False) as async_session:
        record = await aio.AsyncExecutor(async_session).run_until_waiting(approval_async, 5)
        assert (record.status, record.awaits) == (WorkflowStatus.SUSPENDED, None)


@durable.step(
    retry=tenacity.retry_if_exception_type(), wait=tenacity.wait_fixed(3_600), stop=tenacity.stop_after_attempt(3)
)
def fail_for_long(session: Session) -> None:
    raise ValueError("no")


async def fail_when_the_other_waits() -> None:
    await asyncio.sleep(0.1)
    await aio.to_thread(fail_for_long)


async def wait_for_nothing() -> None:
    await aio.wait_signal("nothing")


@durable.workflow
async def suspended_by_a_step_in_a_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(wait_for_nothing())
        group.create_task(fail_when_the_other_waits())


@durable.workflow
async def suspended_by_a_gathered_step() -> None:
    await asyncio.gather(wait_for_nothing(), fail_when_the_other_waits())


@pytest.mark.parametrize("workflow", [suspended_by_a_step_in_a_group, suspended_by_a_gathered_step])
async def test_a_step_that_suspends_the_workflow_is_not_cancelled_by_what_waits_beside_it(
    async_engine: AsyncEngine, workflow: aio.AsyncWorkflowFunction[[], None]
) -> None:
    async with AsyncSession(async_engine, expire_on_commit=False) as session:
        async with asyncio.timeout(30):
            record = await aio.AsyncExecutor(session).run_until_waiting(workflow)
        assert record.status is WorkflowStatus.SUSPENDED
        assert record.wake_at is not None
