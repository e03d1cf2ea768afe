"""`Interceptor`: what an application does around its workflows and steps, such as tracing, metrics and tenants.

How interceptors are entered is told here, once for sync and once for async code; where, in `operations` and `runtime`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy.orm import Session

from sqla_durable.errors import DefinitionError, UsageError

Around: TypeAlias = AbstractContextManager[Any] | AbstractAsyncContextManager[Any] | None
"""What is entered before a call and left after it; None for nothing."""


@dataclass(frozen=True, slots=True)
class Execution:
    """Where the code is.

    Attributes:
        workflow_id: the id of the workflow's record.
        workflow: the workflow's name.
        attempt: the workflow's attempt, from 1; it counts up when a worker died, and when it is resumed.
        step: the key of the step that is being executed; None between steps.
        step_attempt: the try of that step, from 1, those of earlier attempts included; None between steps.
        idempotency_key: for the system that the step calls: the same on every execution of this step, and of no
            other; None between steps.
        details: what the step has last reported by `heartbeat`, in this try or in one before; None if nothing.
        headers: what interceptors gave to the workflow when it was started; see `Interceptor.start`.
    """

    workflow_id: UUID
    workflow: str
    attempt: int
    step: str | None = None
    step_attempt: int | None = None
    idempotency_key: str | None = None
    details: Any = field(default=None, hash=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)


@dataclass(frozen=True, slots=True)
class StepExecution(Execution):
    """Where the code of a step is: an `Execution` whose step, try and idempotency key are there; see `current_step`."""

    step: str = ""
    step_attempt: int = 1
    idempotency_key: str = ""


class Interceptor:
    """Does something around workflows and steps; derive from it, and override what is wanted.

    ```python
    class Timing(Interceptor):
        @contextmanager
        def step(self, execution: Execution) -> Generator[None]:
            began = time.monotonic()
            try:
                yield
            finally:
                print(execution.step, time.monotonic() - began)

    durable = Durable(interceptors=[Timing()])
    ```

    One object serves all workflows at the same time, in all threads and tasks: it keeps no state of one call in itself.
    What `workflow` and `step` give is entered before and left after, by `with` in sync and in async code alike, in the
    thread or task that calls the user's function: it sees the context variables that are set here. An async context
    manager is for async code only.

    An error that leaves the user's function passes through, the innermost interceptor first. An interceptor may replace
    it by raising another, and cannot swallow it.
    """

    def start(self, workflow: str, headers: dict[str, str]) -> None:
        """Give a workflow that is about to be started what it is to carry along, by writing it into `headers`.

        Called in the caller's process when `start`, `bind` or an executor's `run` has checked the arguments, before
        anything is sent to the database. An error raised here is the caller's, and nothing is started. Where the
        record is known already by its key, it keeps its own headers. A workflow that was started by SQL has those of
        its INSERT.

        Args:
            workflow: the workflow's name.
            headers: filled by the interceptors in their order; stored in the record, and in `Execution.headers`.
        """

    def workflow(self, execution: Execution) -> Around:
        """Give what is to be around the workflow's function, in every attempt at it and after every time it waited.

        An error raised here is the workflow's, as if its function had raised it. Where the function is unwound because
        the workflow waits, is cancelled or is handed back, what passes through is no `Exception` but a
        `unwinding.ControlFlow` or an `asyncio.CancelledError`.

        Args:
            execution: which workflow, in which attempt.
        """

    def step(self, execution: Execution) -> Around:
        """Give what is to be around one try of a step; one whose outcome is recorded is not executed.

        An error raised here is the step's, as if its function had raised it: it is recorded and tried again as the
        step's policy says, and rolls a transactional step back. What is around a transactional step is around its
        function and its flush; checkpoint and COMMIT follow.

        Args:
            execution: which step, in which try. `execution.step` is its key.
        """

    def transaction(self, execution: Execution, session: Session) -> None:
        """Do something with the session of a transactional step, after its BEGIN and before its function.

        In async code too it is given the blocking `Session`, inside the `AsyncSession`, as by `AsyncSession.run_sync`.
        Everything that `step` gives is entered then. The transaction is the engine's: it is not to be ended here.

        Args:
            execution: which step, in which try.
            session: the step's session.
        """


class Interceptors:
    """Those of one `Durable`, the outermost first, by what they do.

    Attributes:
        starts, workflows, steps, transactions: those that override the method of that name.
    """

    def __init__(self, given: Iterable[Interceptor] = ()) -> None:
        self.starts: tuple[Interceptor, ...] = ()
        self.workflows: tuple[Interceptor, ...] = ()
        self.steps: tuple[Interceptor, ...] = ()
        self.transactions: tuple[Interceptor, ...] = ()
        self.add(given)

    def add(self, given: Iterable[Interceptor]) -> None:
        """Add some inside those that are there.

        Raises:
            DefinitionError: one is not an `Interceptor`.
        """
        added = tuple(given)
        for each in added:
            if not isinstance(each, Interceptor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise DefinitionError(
                    f"{each!r} is not an interceptor: give an object of a class that derives from Interceptor."
                )
        self.starts += tuple(each for each in added if _overrides(each, "start"))
        self.workflows += tuple(each for each in added if _overrides(each, "workflow"))
        self.steps += tuple(each for each in added if _overrides(each, "step"))
        self.transactions += tuple(each for each in added if _overrides(each, "transaction"))

    def headers(self, workflow: str) -> dict[str, str] | None:
        """Give what a new workflow carries along; None for nothing."""
        headers: dict[str, str] = {}
        for each in self.starts:
            each.start(workflow, headers)
        return headers or None


@contextmanager
def entered(around: Iterable[Around]) -> Generator[None]:
    """Enter in order, leave in reverse; an error that one of them swallows goes on all the same.

    Raises:
        UsageError: one is an async context manager.
        UsageError: one is no context manager.
    """
    raised: BaseException | None = None
    with ExitStack() as stack:
        for each in around:
            _enter(stack, each)
        try:
            yield
        except BaseException as error:
            raised = error
            raise
    if raised is not None:
        raise raised


@asynccontextmanager
async def entered_async(around: Iterable[Around]) -> AsyncGenerator[None]:
    """Do the same in async code, for context managers of both kinds.

    Raises:
        UsageError: one is no context manager.
    """
    raised: BaseException | None = None
    async with AsyncExitStack() as stack:
        for each in around:
            if isinstance(each, AbstractAsyncContextManager) and not isinstance(each, AbstractContextManager):
                await stack.enter_async_context(each)
            else:
                _enter(stack, each)
        try:
            yield
        except BaseException as error:
            raised = error
            raise
    if raised is not None:
        raise raised


def _enter(stack: ExitStack | AsyncExitStack, around: Around) -> None:
    match around:
        case None:
            pass
        case AbstractContextManager():
            stack.enter_context(around)
        case AbstractAsyncContextManager():
            raise UsageError(
                f"an interceptor gave the async context manager {around!r} in sync code, which cannot await it: steps "
                "that take a Session, and def workflows with their steps, need a sync one (@contextmanager)."
            )
        case _:
            raise UsageError(
                f"an interceptor gave {around!r}, which is no context manager: decorate its method with "
                "@contextlib.contextmanager."
            )


def _overrides(interceptor: Interceptor, method: str) -> bool:
    return getattr(type(interceptor), method) is not getattr(Interceptor, method)
