"""Interceptors: around workflows, around the tries of their steps, in transactions, and at a start."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from contextvars import ContextVar
from typing import Any

import pytest
import tenacity
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from sqla_durable import (
    Durable,
    Execution,
    Interceptor,
    Step,
    StepStatus,
    Workflow,
    WorkflowStatus,
    current,
    errors,
)
from sqla_durable.asyncio import to_thread
from sqla_durable.definitions.interceptors import Entered
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells

on_one_async_way = pytest.mark.shells(("async-executor", "async-worker", "asyncpg-worker"))
on_one_sync_way = pytest.mark.shells(("executor", "worker"))

tenant: ContextVar[str | None] = ContextVar("tenant", default=None)


class Noting(Interceptor):
    """Notes what it sees, under its name."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def workflow(self, execution: Execution) -> AbstractContextManager[None]:
        return self._around(execution.workflow, execution)

    def step(self, execution: Execution) -> AbstractContextManager[None]:
        return self._around(f"{execution.step} {execution.try_number}", execution)

    def transaction(self, execution: Execution, session: Session) -> None:
        assert isinstance(session, Session)
        assert current() == execution
        self.notes.append(f"{self.name}: BEGIN of {execution.step}")

    @contextmanager
    def _around(self, what: str, execution: Execution) -> Generator[None]:
        assert current() == execution
        self.notes.append(f"{self.name}: {what}")
        try:
            yield
        except Exception as error:
            self.notes.append(f"{self.name}: {what} failed with {type(error).__name__}")
            raise
        self.notes.append(f"{self.name}: {what} done")


class Tenant(Interceptor):
    """Carries the caller's tenant to the steps, and sets it in their transactions."""

    def start(self, workflow: str, headers: dict[str, str]) -> None:
        if (name := tenant.get()) is not None:
            headers["tenant"] = name

    @contextmanager
    def workflow(self, execution: Execution) -> Generator[None]:
        token = tenant.set(execution.headers.get("tenant"))
        try:
            yield
        finally:
            tenant.reset(token)

    def transaction(self, execution: Execution, session: Session) -> None:
        session.execute(text("SELECT set_config('app.tenant', :tenant, true)"), {"tenant": tenant.get()})


def paying(app: Application, plain: Callable[[], int], write: Callable[[Session], int], **policy: Any) -> Any:
    """Make a workflow of a plain and a transactional step."""
    first, second = app.plain(plain, name="charge", **policy), app.transactional(write, name="book", **policy)

    async def pay() -> int:
        return await first() + await second()

    return app.workflow(pay)


def booked(session: Session) -> int:
    session.add(Entry(account="intercepted", cents=1))
    return 2


def test_the_first_is_around_the_others_and_around_each_try(shell: Shell, app: Application) -> None:
    notes: list[str] = []
    app.durable.intercept(Noting("outer", notes), Noting("inner", notes))
    assert shell.run(paying(app, lambda: 1, booked)) == 3
    assert notes == [
        *("outer: pay", "inner: pay"),
        *("outer: charge 1", "inner: charge 1", "inner: charge 1 done", "outer: charge 1 done"),
        *("outer: book 1", "inner: book 1", "outer: BEGIN of book", "inner: BEGIN of book"),
        *("inner: book 1 done", "outer: book 1 done"),
        *("inner: pay done", "outer: pay done"),
    ]


def test_a_replayed_step_is_not_intercepted_and_its_workflow_is(shell: Shell, app: Application) -> None:
    notes: list[str] = []
    app.durable.intercept(Noting("one", notes))
    workflow = paying(app, lambda: 1, booked)
    shell.run(workflow)
    workflow_id = _only(shell).id
    shell.crashed(workflow_id)
    notes.clear()
    assert shell.finish(workflow, workflow_id) == 3
    assert notes == ["one: pay", "one: pay done"]


def test_every_try_is_intercepted_and_its_error_passes_through(shell: Shell, app: Application) -> None:
    notes: list[str] = []
    app.durable.intercept(Noting("one", notes))
    calls: list[int] = []

    def flaky() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError
        return 1

    shell.run(paying(app, flaky, booked, wait=tenacity.wait_none()))
    assert notes[1:5] == [
        "one: charge 1",
        "one: charge 1 failed with ConnectionError",
        "one: charge 2",
        "one: charge 2 done",
    ]


def test_an_error_of_the_flush_is_seen(shell: Shell, app: Application) -> None:
    notes: list[str] = []
    app.durable.intercept(Noting("one", notes))

    def write(session: Session) -> int:
        session.add(Entry(cents=1))
        return 2

    with pytest.raises(IntegrityError):
        shell.run(paying(app, lambda: 1, write))
    assert notes[-2:] == ["one: book 1 failed with IntegrityError", "one: pay failed with IntegrityError"]


def test_what_the_caller_carried_reaches_the_steps_and_their_transactions(shell: Shell, app: Application) -> None:
    app.durable.intercept(Tenant())
    seen: list[object] = []

    def plain() -> int:
        seen.append(tenant.get())
        execution = current()
        seen.append(dict(execution.headers) if execution else None)
        return 1

    def write(session: Session) -> int:
        seen.append(session.scalar(text("SELECT current_setting('app.tenant', true)")))
        return booked(session)

    workflow = paying(app, plain, write)
    token = tenant.set("seven")
    try:
        shell.run(workflow)
    finally:
        tenant.reset(token)
    assert seen == ["seven", {"tenant": "seven"}, "seven"]
    assert _only(shell).headers == {"tenant": "seven"}
    assert tenant.get() is None


@pytest.mark.parametrize("way", ["start", "keyed", "many"])
def test_headers_are_stored_in_every_way_to_start(shell: Shell, app: Application, way: str) -> None:
    class Language(Interceptor):
        def start(self, workflow: str, headers: dict[str, str]) -> None:
            headers["language"] = "čeština"

    workflow = paying(app, lambda: 1, booked)
    with shell.client() as client:
        client.start_many([workflow.bind()])  # before there is an interceptor
        app.durable.intercept(Language())
        match way:
            case "start":
                client.start(workflow)
            case "keyed":
                client.start(workflow.options(key="k"))
            case _:
                client.start_many([workflow.bind()])
        client.commit()
    with shell.sessionmaker() as session:
        stored = session.scalars(select(Workflow.headers).order_by(Workflow.id)).all()
    assert stored == [None, {"language": "čeština"}]


@pytest.mark.parametrize(
    ("headers", "words"), [({"a": 1}, "1 is not a text"), ({"a": "x\0"}, "NUL"), ({"": "x"}, "blank")]
)
@on_one_sync_way
def test_headers_that_cannot_be_stored_are_refused(app: Application, headers: dict[str, Any], words: str) -> None:
    class Wrong(Interceptor):
        def start(self, workflow: str, headers: dict[str, str]) -> None:
            headers.update(given)

    given = headers
    app.durable.intercept(Wrong())
    with pytest.raises(errors.ArgumentError, match=rf"pay.*{words}.*Nothing was started"):
        paying(app, lambda: 1, booked).bind()


@pytest.mark.parametrize("step", ["charge", "book"])
def test_what_an_interceptor_raises_before_a_step_is_the_steps_failure(
    shell: Shell, app: Application, step: str
) -> None:
    class Refusing(Interceptor):
        @contextmanager
        def step(self, execution: Execution) -> Generator[None]:
            if execution.step == step:
                raise PermissionError(f"no {execution.step}")
            yield

    app.durable.intercept(Refusing())
    with pytest.raises(PermissionError, match=f"no {step}"):
        shell.run(paying(app, lambda: 1, booked))
    failed = _steps(shell)[-1]
    assert (failed.key, failed.status, failed.tries) == (step, StepStatus.FAILED, 1)
    assert _accounts(shell) == []


def test_what_an_interceptor_raises_after_a_step_rolls_it_back(shell: Shell, app: Application) -> None:
    class Checking(Interceptor):
        @contextmanager
        def step(self, execution: Execution) -> Generator[None]:
            yield
            if execution.step == "book":
                raise PermissionError("after")

    app.durable.intercept(Checking())
    with pytest.raises(PermissionError, match="after"):
        shell.run(paying(app, lambda: 1, booked))
    assert _accounts(shell) == []


def test_what_an_interceptor_raises_in_the_transaction_is_tried_again(shell: Shell, app: Application) -> None:
    class Failing(Interceptor):
        def transaction(self, execution: Execution, session: Session) -> None:
            if execution.try_number == 1:
                raise ConnectionError("once")

    app.durable.intercept(Failing())
    assert shell.run(paying(app, lambda: 1, booked, wait=tenacity.wait_none())) == 3
    assert [each.tries for each in _steps(shell)] == [1, 2]


def test_what_an_interceptor_raises_around_a_workflow_is_the_workflows_failure(shell: Shell, app: Application) -> None:
    class Refusing(Interceptor):
        def workflow(self, execution: Execution) -> None:
            raise PermissionError(execution.workflow)

    app.durable.intercept(Refusing())
    with pytest.raises(PermissionError, match="pay"):
        shell.run(paying(app, lambda: 1, booked))
    assert (_only(shell).status, _steps(shell)) == (WorkflowStatus.FAILED, [])


def test_an_interceptor_cannot_swallow_an_error(shell: Shell, app: Application) -> None:
    class Swallowing(Interceptor):
        @contextmanager
        def workflow(self, execution: Execution) -> Generator[None]:
            try:
                yield
            except BaseException:
                return

        step = workflow

    def broken() -> int:
        raise ConnectionError("down")

    app.durable.intercept(Swallowing())
    with pytest.raises(ConnectionError, match="down"):
        shell.run(paying(app, broken, booked))
    assert _only(shell).status is WorkflowStatus.FAILED


def test_an_interceptor_without_its_decorator_is_a_clear_error(shell: Shell, app: Application) -> None:
    class Forgetful(Interceptor):
        def step(self, execution: Execution) -> Any:
            yield

    app.durable.intercept(Forgetful())
    with pytest.raises(errors.UsageError, match="contextmanager"):
        shell.run(paying(app, lambda: 1, booked))


class Awaiting(Interceptor):
    """What async code can have too."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def workflow(self, execution: Execution) -> AbstractAsyncContextManager[None]:
        return self._around(execution)

    def step(self, execution: Execution) -> AbstractAsyncContextManager[None]:
        return self._around(execution)

    @asynccontextmanager
    async def _around(self, execution: Execution) -> AsyncGenerator[None]:
        self.notes.append(execution.step or execution.workflow)
        token = tenant.set("async")
        try:
            yield
        except BaseException:
            pass
        finally:
            tenant.reset(token)


@on_one_async_way
def test_async_context_managers_are_entered_in_async_code(shell: Shell, app: Application) -> None:
    notes: list[str] = []
    app.durable.intercept(Awaiting(notes))
    seen: list[str | None] = []

    def plain() -> int:
        seen.append(tenant.get())
        return 1

    def write(session: Session) -> int:
        raise ConnectionError("down")

    with pytest.raises(ConnectionError, match="down"):
        shell.run(paying(app, plain, write))
    assert (notes, seen) == (["pay", "charge", "book"], ["async"])


@on_one_sync_way
def test_async_context_managers_are_refused_in_sync_code(shell: Shell, app: Application) -> None:
    app.durable.intercept(Awaiting([]))
    with pytest.raises(errors.UsageError, match="contextmanager"):
        shell.run(paying(app, lambda: 1, booked))


@on_one_async_way
def test_sync_steps_of_an_async_workflow_are_intercepted_where_they_are_executed(
    shell: Shell, app: Application
) -> None:
    if not hasattr(shell, "async_sessionmaker"):
        return
    notes: list[str] = []
    app.durable.intercept(Noting("one", notes), Tenant())
    seen: list[str | None] = []

    @app.durable.step
    def in_thread() -> int:
        seen.append(tenant.get())
        return 1

    async def mixed() -> int:
        return await to_thread(in_thread)

    token = tenant.set("seven")
    try:
        assert shell.run(app.workflow(mixed)) == 1
    finally:
        tenant.reset(token)
    assert seen == ["seven"]
    assert notes == ["one: mixed", "one: in_thread 1", "one: in_thread 1 done", "one: mixed done"]


@pytest.mark.shells(["async-executor", "async-joined"])
def test_a_step_that_takes_a_session_is_intercepted_in_an_async_workflow(shell: Shell, app: Application) -> None:
    notes: list[str] = []
    app.durable.intercept(Noting("one", notes))
    book = app.durable.step(booked)

    async def mixed() -> int:
        return await to_thread(book)

    assert shell.run(app.workflow(mixed)) == 2
    assert notes[1:4] == ["one: booked 1", "one: BEGIN of booked", "one: booked 1 done"]


def test_recorded_outcomes_are_seen_and_an_error_there_is_logged(
    shell: Shell, app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    ends: list[tuple[str, str, int]] = []

    class Ends(Interceptor):
        def finished(self, execution: Execution, status: str) -> None:
            ends.append((execution.workflow, status, execution.attempt))
            raise LookupError("no counter")

    async def divide(number: int) -> int:
        return 1 // number

    app.durable.intercept(Ends())
    dividing = app.workflow(divide)
    assert shell.run(dividing, 1) == 1
    with pytest.raises(ZeroDivisionError):
        shell.run(dividing, 0)
    assert ends == [("divide", "succeeded", 1), ("divide", "failed", 1)]
    assert caplog.text.count("LookupError: no counter") == 2


def test_an_outer_interceptor_sees_what_an_inner_one_has_raised_instead() -> None:
    seen: list[str] = []

    @contextmanager
    def replacing(name: str) -> Generator[None]:
        try:
            yield
        except Exception as error:
            seen.append(str(error))
            raise KeyError(name) from error

    @contextmanager
    def swallowing() -> Generator[None]:
        with suppress(Exception):
            yield

    with pytest.raises(KeyError, match="outer") as caught, Entered([replacing("outer"), swallowing(), replacing("in")]):
        raise ValueError("own")
    assert seen == ["own", "'in'"]
    assert str(caught.value.__cause__) == str(caught.value.__context__) == "'in'"


def test_what_is_no_interceptor_is_refused() -> None:
    with pytest.raises(errors.DefinitionError, match="not an interceptor"):
        Durable(interceptors=["tracing"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


def test_only_what_is_overridden_is_called() -> None:
    class Nothing(Interceptor):
        pass

    durable = Durable(interceptors=[Nothing(), Tenant()])
    found = durable.workflow(lambda: None, name="nothing").definition.durable_options.interceptors
    assert [len(each) for each in (found.starts, found.workflows, found.steps, found.transactions)] == [1, 1, 0, 1]


def _only(shell: Shell) -> Workflow:
    with shell.sessionmaker() as session:
        return session.scalars(select(Workflow)).one()


def _steps(shell: Shell) -> list[Step]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Step).order_by(Step.position)))


def _accounts(shell: Shell) -> list[str]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Entry.account)))
