"""`Interceptor`, code that is executed around workflows and steps, such as tracing, and `Execution`, which it receives.

This module says how interceptors are entered in sync and in async code; `operations` and `runtime` say where.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from uuid import UUID
from weakref import WeakSet

from sqlalchemy.orm import Session

from sqla_durable.definitions.schedules import Tick, tick_in
from sqla_durable.errors import DefinitionError, UsageError

Around: TypeAlias = AbstractContextManager[Any] | AbstractAsyncContextManager[Any] | None
"""A context manager that is entered before a call and exited after it; None for nothing."""


@dataclass(frozen=True, slots=True)
class Start:
    """A workflow that is about to be started.

    Attributes:
        workflow_id: the id that its record will have, unless another record has its key already.
        workflow: the workflow's name.
        queue: the queue that it will wait in.
        key: the key of the start; None if it has none.
    """

    workflow_id: UUID
    workflow: str
    queue: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Execution:
    """Identifies the workflow, the attempt and the step that are being executed.

    Attributes:
        workflow_id: the id of the workflow's record.
        workflow: the workflow's name.
        attempt: the workflow's attempt, from 1; increased when its worker died, and when it is resumed.
        step: the key of the step that is being executed; None between steps.
        try_number: the try of that step, from 1, including those of earlier attempts; None between steps.
        idempotency_key: for the system that the step calls: the same on every execution of this step, and
            different for every other step; None between steps.
        details: what the step reported last by `heartbeat`, in this or an earlier try; None if nothing.
        headers: what interceptors added to the workflow when it was started; see `Interceptor.start`.
    """

    workflow_id: UUID
    workflow: str
    attempt: int
    step: str | None = None
    try_number: int | None = None
    idempotency_key: str | None = None
    details: Any = field(default=None, hash=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)

    @property
    def tick(self) -> Tick | None:
        """The tick of the schedule that has started the workflow; None if no schedule has."""
        return tick_in(self.headers)


@dataclass(frozen=True, slots=True)
class StepExecution(Execution):
    """Identifies the step that is being executed: an `Execution` whose step fields are set; see `current_step`."""

    step: str = ""
    try_number: int = 1
    idempotency_key: str = ""


class Interceptor:
    """Code that is executed around workflows and steps: derive from it, and override the methods that you need.

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

    One object serves all workflows at the same time, in all threads and tasks, so it must not store the state of a
    call. The context managers that `workflow` and `step` return are entered before the call and exited after it, in
    sync and in async code, in the thread or task that calls the user's function, which sees the context variables that
    they set. An async context manager works in async code only.

    An error that the user's function raises passes through them, the innermost first. An interceptor may replace it by
    raising another, and cannot suppress it.
    """

    def start(self, workflow: str, headers: dict[str, str]) -> None:
        """Add headers to a workflow that is about to be started.

        Called in the caller's process when `start`, `bind` or an executor's `run` has checked the arguments, before
        anything is sent to the database; for a child when it is started, and not on a replay. An error raised here is
        raised to the caller, and nothing is started. A record that has the key already keeps its own headers. A
        workflow that was started by SQL has those of its INSERT.

        Args:
            workflow: the workflow's name.
            headers: filled by the interceptors in their order; stored in the record, and in `Execution.headers`.
        """

    def prepare(self, start: Start, headers: dict[str, str]) -> None:
        """Do the same, and know the id and the queue of what is started: override this or `start`, which this calls.

        Args:
            start: what is about to be started.
            headers: as in `start`.
        """
        self.start(start.workflow, headers)

    def workflow(self, execution: Execution) -> Around:
        """Return a context manager around the workflow's function, for every attempt and after every suspension.

        An error raised here is the workflow's, as if its function had raised it. Where the function is unwound because
        the workflow is suspended, cancelled or released, what passes through is not an `Exception` but an
        `unwinding.ControlFlow` or an `asyncio.CancelledError`.

        Args:
            execution: which workflow, in which attempt.
        """

    def step(self, execution: Execution) -> Around:
        """Return a context manager around one try of a step; a step whose outcome is recorded is not executed.

        An error raised here is the step's, as if its function had raised it: it is recorded, the step is tried again as
        its policy says, and a transactional step is rolled back. Around a transactional step it encloses the function
        and the flush; checkpoint and COMMIT follow.

        Args:
            execution: which step, in which try. `execution.step` is its key.
        """

    def transaction(self, execution: Execution, session: Session) -> None:
        """Use the session of a transactional step, after its BEGIN and before its function.

        Async code passes the blocking `Session` too, as `AsyncSession.run_sync` does.
        The context managers of `step` have been entered. The engine ends the transaction; do not end it here.

        Args:
            execution: which step, in which try.
            session: the step's session.
        """

    def finished(self, execution: Execution, status: str) -> None:
        """Note that an attempt has recorded the outcome of its workflow.

        Called after the commit; with a joined executor before that of the caller. An error raised here is logged. What
        ends a workflow without an attempt is not seen here: a cancel of one that waits, a deadline, or too many
        crashes.

        Args:
            execution: which workflow, in which attempt.
            status: "succeeded", "failed" or "cancelled".
        """

    def signal(self, name: str, workflow_ids: Sequence[UUID]) -> Around:
        """Return a sync context manager around the sending of a signal, in the sender's process and transaction.

        A sender may know no `Durable`: the interceptors of all that this process has made are called, each once. An
        error raised here is the sender's: before the `yield` nothing is sent, after it roll back.

        Args:
            name: the signal's name.
            workflow_ids: the receivers.
        """


class Interceptors:
    """The interceptors of one `Durable`, the outermost first, grouped by the methods that they override.

    Attributes:
        starts, workflows, steps, transactions, ends, signals: those that override `start` or `prepare`, `workflow`,
            `step`, `transaction`, `finished`, and `signal`.
    """

    def __init__(self, given: Iterable[Interceptor] = ()) -> None:
        self.starts: tuple[Interceptor, ...] = ()
        self.workflows: tuple[Interceptor, ...] = ()
        self.steps: tuple[Interceptor, ...] = ()
        self.transactions: tuple[Interceptor, ...] = ()
        self.ends: tuple[Interceptor, ...] = ()
        self.signals: tuple[Interceptor, ...] = ()
        self.add(given)

    def add(self, given: Iterable[Interceptor]) -> None:
        """Add interceptors inside the present ones.

        Raises:
            DefinitionError: one is not an `Interceptor`.
        """
        added = tuple(given)
        for each in added:
            if not isinstance(each, Interceptor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise DefinitionError(
                    f"{each!r} is not an interceptor: pass an object of a class that derives from Interceptor."
                )
        self.starts += tuple(each for each in added if _overrides(each, "start") or _overrides(each, "prepare"))
        self.workflows += tuple(each for each in added if _overrides(each, "workflow"))
        self.steps += tuple(each for each in added if _overrides(each, "step"))
        self.transactions += tuple(each for each in added if _overrides(each, "transaction"))
        self.ends += tuple(each for each in added if _overrides(each, "finished"))
        self.signals += tuple(each for each in added if _overrides(each, "signal"))
        if self.signals:
            with _lock:
                _seeing_signals.add(self)

    def headers(self, start: Start) -> dict[str, str] | None:
        """Return the headers of a new workflow; None for none."""
        headers: dict[str, str] = {}
        for each in self.starts:
            each.prepare(start, headers)
        return headers or None


_seeing_signals: WeakSet[Interceptors] = WeakSet()
_lock = threading.Lock()


@contextmanager
def sending(name: str, workflow_ids: Sequence[UUID]) -> Generator[None]:
    """Enter what is around the sending of a signal: the interceptors of every `Durable` of this process, each once."""
    with _lock:
        found = {id(each): each for durable in _seeing_signals for each in durable.signals}
    with Entered(each.signal(name, workflow_ids) for each in found.values()):
        yield


class Entered:
    """What surrounds a call in sync code: entered in order, exited in reverse, each sees what those inside it raise.

    What the block raises is raised even if a context manager suppresses it. A class and not a stack of generators,
    which would cost more than most of what is entered. Blocking code enters it by `async with` too.

    Args:
        around: asked for the next one when those before it are entered.
    """

    def __init__(self, around: Iterable[Around]) -> None:
        self._around: Iterable[Any] = around
        self._entered: list[Any] = []

    def __enter__(self) -> None:
        try:
            for each in self._around:
                if each is not None:
                    _require_sync(each)
                    each.__enter__()
                    self._entered.append(each)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        ending = error
        for each in reversed(self._entered):
            try:
                each.__exit__(*_thrown(ending))
            except BaseException as replaced:
                ending = replaced
        _raise_if_other(ending, error)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.__exit__(kind, error, traceback)


class AsyncEntered:
    """The same in async code, for sync and async context managers."""

    def __init__(self, around: Iterable[Around]) -> None:
        self._around: Iterable[Any] = around
        self._entered: list[Any] = []

    async def __aenter__(self) -> None:
        try:
            for each in self._around:
                if each is None:
                    continue
                if _is_async(each):
                    await each.__aenter__()
                else:
                    _require_sync(each)
                    each.__enter__()
                self._entered.append(each)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        ending = error
        for each in reversed(self._entered):
            try:
                if _is_async(each):
                    await each.__aexit__(*_thrown(ending))
                else:
                    each.__exit__(*_thrown(ending))
            except BaseException as replaced:
                ending = replaced
        _raise_if_other(ending, error)


def _thrown(error: BaseException | None) -> tuple[Any, Any, Any]:
    return (None, None, None) if error is None else (type(error), error, error.__traceback__)


def _raise_if_other(ending: BaseException | None, error: BaseException | None) -> None:
    """Raise what has replaced the block's error, in the context that it was raised in."""
    if ending is None or ending is error:
        return
    context = ending.__context__
    try:
        raise ending
    finally:
        ending.__context__ = context


def _is_async(around: Any) -> bool:
    """Return whether this is an async context manager only."""
    return not _has(around, "__exit__") and _has(around, "__aexit__")


def _has(around: object, *methods: str) -> bool:
    """Return whether the class of an object has these methods."""
    return all(hasattr(type(around), each) for each in methods)


def _require_sync(around: Any) -> None:
    if _has(around, "__enter__", "__exit__"):
        return
    if _is_async(around):
        raise UsageError(
            f"an interceptor returned the async context manager {around!r} in sync code, which cannot await it: "
            "steps that take a Session, and def workflows with their steps, need a sync one (@contextmanager)."
        )
    raise UsageError(
        f"an interceptor returned {around!r}, which is no context manager: decorate its method with "
        "@contextlib.contextmanager."
    )


def _overrides(interceptor: Interceptor, method: str) -> bool:
    return getattr(type(interceptor), method) is not getattr(Interceptor, method)
