"""Time limits of steps: of each try, and of all of them over crashes, waits and workers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable import Durable, Step, StepStatus, Workflow, WorkflowStatus, errors, manage
from sqla_durable.asyncio import to_thread
from tests.acceptance.application import AnyWorkflow, Application, Called, Form
from tests.acceptance.shells import AsyncJoinedShell, Shell
from tests.store import races
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells

SHORT, LONG = timedelta(seconds=0.25), timedelta(hours=1)
IN_ASYNC = ("async-executor", "async-joined", "async-worker", "asyncpg-worker")
in_async = pytest.mark.shells(IN_ASYNC)
on_async_workers = pytest.mark.shells(("async-worker", "asyncpg-worker"))


class Slow:
    """Takes too long as often as asked: for ever in async code, and longer than `SHORT` where nothing ends it."""

    def __init__(self, app: Application, often: int, kind: str = "plain", **options: Any) -> None:
        self.often, self.calls, self.cancelled = often, 0, 0
        make = {
            (Form.SYNC, "plain"): self._sync_plain,
            (Form.SYNC, "transactional"): self._sync_transactional,
            (Form.ASYNC, "plain"): self._async_plain,
            (Form.ASYNC, "transactional"): self._async_transactional,
        }[app.form, kind]
        self.step: Called[[], int] = Called(app.durable.step(make(), name="call", **options))

    def workflow(self, app: Application) -> AnyWorkflow[[], int]:
        async def pay() -> int:
            return await self.step()

        return app.workflow(pay)

    def _block(self) -> int:
        self.calls += 1
        if self.calls <= self.often:
            time.sleep(SHORT.total_seconds() + 0.01)
        return self.calls

    async def _wait(self) -> int:
        self.calls += 1
        if self.calls <= self.often:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return self.calls

    def _sync_plain(self) -> Callable[..., Any]:
        def call() -> int:
            return self._block()

        return call

    def _sync_transactional(self) -> Callable[..., Any]:
        def call(session: Session) -> int:
            session.add(Entry(account="slow", cents=1))
            session.flush()
            return self._block()

        return call

    def _async_plain(self) -> Callable[..., Any]:
        async def call() -> int:
            return await self._wait()

        return call

    def _async_transactional(self) -> Callable[..., Any]:
        async def call(session: AsyncSession) -> int:
            session.add(Entry(account="slow", cents=1))
            await session.flush()
            return await self._wait()

        return call


# behaviour: S3
@pytest.mark.parametrize("kind", ["plain", "transactional"])
def test_a_try_that_takes_too_long_fails_and_is_rolled_back(shell: Shell, app: Application, kind: str) -> None:
    slow = Slow(app, 9, kind, timeout=SHORT)
    workflow = slow.workflow(app)
    with pytest.raises(errors.StepTimeoutError, match=r"'call' was not done within 0:00:00\.25") as raised:
        shell.run(workflow)
    assert (raised.value.step, raised.value.seconds) == ("call", 0.25)
    assert isinstance(raised.value, TimeoutError)
    assert (slow.calls, slow.cancelled) == (1, 1 if app.form is Form.ASYNC else 0)
    (recorded,) = _steps(shell)
    assert (recorded.status, recorded.tries) == (StepStatus.FAILED, 1)
    assert _entries(shell) == 0
    workflow_id = _only(shell).id
    shell.crashed(workflow_id)
    with pytest.raises(errors.StepTimeoutError, match="'call' was not done within"):
        shell.finish(workflow, workflow_id)
    assert slow.calls == 1


# behaviour: S3 S1
@pytest.mark.parametrize("kind", ["plain", "transactional"])
def test_a_timeout_is_tried_again_like_any_other_error(shell: Shell, app: Application, kind: str) -> None:
    retry = tenacity.retry_if_exception_type(errors.StepTimeoutError)
    slow = Slow(app, 1, kind, timeout=SHORT, retry=retry, wait=tenacity.wait_none())
    assert shell.run(slow.workflow(app)) == 2
    (recorded,) = _steps(shell)
    assert (recorded.status, recorded.tries) == (StepStatus.SUCCEEDED, 2)
    assert _entries(shell) == (0 if kind == "plain" else 1)


@pytest.mark.parametrize("kind", ["plain", "transactional"])
def test_a_step_that_is_done_in_time_is_not_disturbed(shell: Shell, app: Application, kind: str) -> None:
    slow = Slow(app, 0, kind, timeout=LONG, total_timeout=2 * LONG)
    assert shell.run(slow.workflow(app)) == 1
    (recorded,) = _steps(shell)
    assert (recorded.status, recorded.tries) == (StepStatus.SUCCEEDED, 1)


@in_async
def test_a_query_that_takes_too_long_is_cut_off(shell: Shell, app: Application) -> None:
    calls: list[int] = []

    @app.durable.step(timeout=timedelta(seconds=0.3), wait=tenacity.wait_none(), stop=tenacity.stop_after_attempt(2))
    async def read(session: AsyncSession) -> int:
        calls.append(1)
        session.add(Entry(account="slow", cents=1))
        await session.flush()
        if len(calls) == 1:
            await session.execute(text("SELECT pg_sleep(60)"))
        return len(calls)

    async def pay() -> int:
        return await read()

    workflow = app.workflow(pay)
    began = time.monotonic()
    if isinstance(shell, AsyncJoinedShell):  # SQLAlchemy gives up a connection whose query was cancelled
        with pytest.raises(PendingRollbackError):
            shell.run(workflow)
    else:
        assert shell.run(workflow) == 2
    assert time.monotonic() - began < 30
    assert _entries(shell) == (0 if isinstance(shell, AsyncJoinedShell) else 1)


@in_async
def test_what_catches_its_cancellation_and_returns_is_too_late_all_the_same(shell: Shell, app: Application) -> None:
    @app.durable.step(timeout=SHORT)
    async def stubborn() -> int:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return 1

    async def pay() -> int:
        return await stubborn()

    with pytest.raises(errors.StepTimeoutError):
        shell.run(app.workflow(pay))


def test_a_timeout_of_the_steps_own_stays_what_it_is(shell: Shell, app: Application) -> None:
    def call() -> int:
        raise TimeoutError("its own")

    step = app.plain(call, timeout=LONG, total_timeout=LONG)

    async def pay() -> int:
        return await step()

    with pytest.raises(TimeoutError, match="its own") as raised:
        shell.run(app.workflow(pay))
    assert type(raised.value) is TimeoutError


@pytest.mark.shells(("async-executor", "async-worker"))
def test_a_sync_step_of_an_async_workflow_is_never_left_to_itself(shell: Shell, app: Application) -> None:
    now, most = [0], [0]

    @app.durable.step(timeout=SHORT, wait=tenacity.wait_none(), stop=tenacity.stop_after_attempt(3))
    def call() -> int:
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(SHORT.total_seconds() + 0.01)
        now[0] -= 1
        return 1

    async def pay() -> int:
        return await to_thread(call)

    with pytest.raises(errors.StepTimeoutError):
        shell.run(app.workflow(pay))
    assert (now, most) == ([0], [1])


# behaviour: S3
def test_the_total_ends_a_step_before_a_try_for_which_there_is_no_time(shell: Shell, app: Application) -> None:
    def call() -> int:
        raise ConnectionError("down")

    step = app.plain(call, total_timeout=LONG, wait=tenacity.wait_fixed(3601))

    async def pay() -> int:
        return await step()

    words = r"within 1:00:00, .*last try failed with ConnectionError: down"
    with pytest.raises(errors.StepTimeoutError, match=words) as raised:
        shell.run(app.workflow(pay))
    assert raised.value.seconds == 3600
    (recorded,) = _steps(shell)
    assert (recorded.status, recorded.tries) == (StepStatus.FAILED, 1)


def test_the_total_ends_a_step_whose_policy_asks_for_another_outcome(shell: Shell, app: Application) -> None:
    retry = tenacity.retry_if_result(lambda state: state == "pending")
    step = app.plain(lambda: "pending", name="poll", retry=retry, wait=tenacity.wait_fixed(99), total_timeout=SHORT)

    async def pay() -> str:
        return await step()

    with pytest.raises(errors.StepTimeoutError, match="'poll'"):
        shell.run(app.workflow(pay))


@pytest.mark.parametrize("kind", ["plain", "transactional"])
def test_the_total_cuts_a_try_off_whatever_its_policy_says(shell: Shell, app: Application, kind: str) -> None:
    slow = Slow(app, 9, kind, total_timeout=SHORT, timeout=LONG, wait=tenacity.wait_none())
    with pytest.raises(errors.StepTimeoutError, match="all its tries"):
        shell.run(slow.workflow(app))
    assert (slow.calls, _entries(shell)) == (1, 0)


# behaviour: S3 R6 R7
@pytest.mark.parametrize("status", [StepStatus.RUNNING, StepStatus.RETRYING])
def test_the_total_counts_from_the_first_try_whatever_crashed_since(
    shell: Shell, app: Application, status: StepStatus
) -> None:
    slow = Slow(app, 0, total_timeout=LONG, wait=tenacity.wait_none())
    workflow = slow.workflow(app)
    with pytest.raises(errors.StepTimeoutError, match="within 1:00:00"):
        shell.finish(workflow, _begun(shell, workflow, status, ago=2 * LONG))
    assert slow.calls == 0
    (recorded,) = _steps(shell)
    assert (recorded.status, recorded.tries) == (StepStatus.FAILED, 1)


# behaviour: R6 R7
@pytest.mark.parametrize(("status", "tries"), [(StepStatus.RUNNING, 1), (StepStatus.RETRYING, 2)])
def test_a_step_with_time_left_goes_on_after_a_crash(
    shell: Shell, app: Application, status: StepStatus, tries: int
) -> None:
    slow = Slow(app, 0, total_timeout=LONG, wait=tenacity.wait_none())
    workflow = slow.workflow(app)
    assert shell.finish(workflow, _begun(shell, workflow, status, ago=LONG / 2)) == 1
    (recorded,) = _steps(shell)
    assert (recorded.status, recorded.tries) == (StepStatus.SUCCEEDED, tries)
    assert recorded.finished_at - recorded.started_at >= LONG / 2


@pytest.mark.shells(("executor", "worker", "async-executor", "async-worker", "asyncpg-worker", "mixed-worker"))
@pytest.mark.parametrize("kind", ["plain", "transactional"])
def test_the_beginning_of_a_step_with_a_total_is_recorded_before_it_is_called(
    shell: Shell, app: Application, kind: str
) -> None:
    seen: list[tuple[StepStatus, int]] = []

    def read() -> int:
        seen.extend((each.status, each.tries) for each in _steps(shell))
        return 1

    def in_session(session: Session) -> int:
        return read()

    plain, transactional = app.plain, app.transactional
    step = plain(read, total_timeout=LONG) if kind == "plain" else transactional(in_session, total_timeout=LONG)

    async def pay() -> int:
        return await step()

    shell.run(app.workflow(pay))
    assert seen == [(StepStatus.RUNNING, 1)]


# behaviour: S3 S4
@on_async_workers
def test_a_cancel_ends_a_step_before_its_timeout_and_a_resume_does_not_give_it_more_time(
    shell: Shell, app: Application
) -> None:
    slow = Slow(app, 1, timeout=LONG, total_timeout=LONG, wait=tenacity.wait_none())
    workflow = slow.workflow(app)
    with shell.background(lease=timedelta(seconds=0.6)):
        with shell.sessionmaker.begin() as session:
            workflow_id = workflow.start(session).id
        races.wait_until(lambda: slow.calls == 1)
        with shell.sessionmaker.begin() as session:
            assert manage.cancel(session, workflow_id) == [workflow_id]
        races.wait_until(lambda: slow.cancelled == 1)
        (recorded,) = _steps(shell)
        assert recorded.status is StepStatus.RUNNING
        assert _only(shell).status is WorkflowStatus.CANCELLED
        with shell.sessionmaker.begin() as session:
            session.execute(update(Step).values(started_at=func.statement_timestamp() - 2 * LONG))
            assert manage.resume(session, workflow_id) == [workflow_id]
        with pytest.raises(errors.StepTimeoutError):
            shell.result(workflow, workflow_id)
    assert slow.calls == 1


@pytest.mark.parametrize("given", [timedelta(), timedelta(seconds=-1), 5])
@pytest.mark.parametrize("name", ["timeout", "total_timeout", "heartbeat_timeout"])
def test_a_limit_that_is_no_time_is_refused(name: str, given: Any) -> None:
    words = rf"^{name}( must be positive|=5 is not a timedelta).*timedelta\(seconds=30\)"
    with pytest.raises(errors.DefinitionError, match=words):
        Durable().step(lambda: None, name="call", **{name: given})


def test_outside_a_workflow_a_step_has_no_limits() -> None:
    def call() -> int:
        time.sleep(0.002)
        return 7

    assert Durable().step(call, timeout=timedelta(microseconds=1))() == 7


def _begun(shell: Shell, workflow: AnyWorkflow[..., Any], status: StepStatus, *, ago: timedelta) -> UUID:
    """Start a workflow of one step that an earlier attempt began."""
    with shell.sessionmaker.begin() as session:
        now = session.scalars(select(func.statement_timestamp())).one()
        record = workflow.start(session)
        session.flush()
        session.execute(update(Workflow).values(started_at=now, attempt=2))
        session.add(
            Step(
                workflow_id=record.id,
                key="call",
                name="call",
                position=1,
                status=status,
                attempt=1,
                tries=1,
                started_at=now - ago,
                finished_at=now,
                wake_at=now if status is StepStatus.RETRYING else None,
            )
        )
        return record.id


def _only(shell: Shell) -> Workflow:
    with shell.sessionmaker() as session:
        return session.scalars(select(Workflow)).one()


def _steps(shell: Shell) -> list[Step]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Step)))


def _entries(shell: Shell) -> int:
    with shell.sessionmaker() as session:
        return session.scalars(select(func.count()).select_from(Entry)).one()
