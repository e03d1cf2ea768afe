"""Sagas: when a workflow fails or is cancelled, what it did is undone, step by step in reverse."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, Self, cast

from sqla_durable.api.calls import in_async_code, in_sync_code, require_workflow, visit
from sqla_durable.api.steps import SyncStep, call_step_async
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.redaction import brief
from sqla_durable.errors import CompensationFailedError, UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.outcome import is_own_failure
from sqla_durable.operations.workflow import begin_saga, must_compensate
from sqla_durable.runtime.context import Context, active
from sqla_durable.runtime.loop_timers import carried_through
from sqla_durable.runtime.tasks import is_engines_own

P = ParamSpec("P")

log = Log("sqla_durable.saga")


class _BaseSaga:
    def __init__(self) -> None:
        self._compensations: list[tuple[str, Callable[[], Any]]] = []
        self._entered = False

    def _add(self, name: str, undo: Callable[[], Any]) -> None:
        if not self._entered:
            raise UsageError("a saga is used as a block: `with Saga() as saga:`, or `async with` in async def code.")
        self._compensations.append((name, undo))

    def _refuse(self, failed: list[str], error: BaseException | None) -> None:
        if failed:
            raise CompensationFailedError(
                f"{len(failed)} of {len(self._compensations)} compensations failed: {'; '.join(failed)}. The others "
                f"were carried out.{_after(error)}"
            ) from error


class Saga(_BaseSaga):
    """Undoes in reverse what was done in its block, if that ends with an error or the workflow is ended from outside.

    ```python
    with Saga() as saga:
        reserve(order_id)
        saga.add(restock, order_id)
        charge(order_id)
        saga.add(refund, order_id)
        ship(order_id)
    ```

    Each compensation is a step, recorded and retried by its own policy, and executed once where it succeeds: a worker
    that dies in the middle is followed by one that goes on. After the last one the error is raised further. With a saga
    a workflow that is cancelled, or whose deadline has come, does not end at once: it is enqueued, stops at the first
    operation that it has not recorded, and is `cancelled` or `failed` when its compensations are done, which take as
    long as they need. Add a compensation after the step that it undoes, with what that one returned; add it
    before the step only if it is safe when the step never ran.

    A workflow that is stopped for its crashes compensates nothing. A saga is entered in the workflow's own function and
    not in one of its branches, which may be inside it; it begins to undo when they have ended.
    """

    def add(self, step: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
        """Let a step be called with these arguments when the saga is undone.

        Raises:
            UsageError: the saga's block has not begun; or the step was called here, where it is to be called later.
        """
        self._add(name_of_compensation(step), partial(step, *args, **kwargs))

    def __enter__(self) -> Self:
        in_sync_code("Saga")
        context = _context()
        visit(context, "saga", begin_saga)
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        attempt = require_workflow("Saga", active()).attempt
        if must_compensate(attempt, error):
            with attempt.compensating():
                failed = [
                    each for name, undo in reversed(self._compensations) if (each := _failure(attempt, name, undo))
                ]
            self._refuse(failed, error)


class AsyncSaga(_BaseSaga):
    """Undoes in reverse what was done in its block; `sqla_durable.asyncio` exports it as `Saga`.

    ```python
    async with Saga() as saga:
        await reserve(order_id)
        saga.add(restock, order_id)
        await charge(order_id)
        saga.add(refund, order_id)
        await ship(order_id)
    ```

    A compensation may be a `def` step, which is executed in a thread. See `sqla_durable.Saga`.
    """

    def add(self, step: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
        """Let a step be called with these arguments when the saga is undone. See `sqla_durable.Saga.add`."""
        undo: Any = step
        name = name_of_compensation(undo)
        if isinstance(undo, SyncStep):  # called by itself it would be refused in async def code
            undo = partial(call_step_async, undo.definition, undo.step_key, args, kwargs)
            self._add(name, undo)
        else:
            self._add(name, partial(undo, *args, **kwargs))

    async def __aenter__(self) -> Self:
        in_async_code("Saga")
        await visit(_context(), "saga", begin_saga)
        self._entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        context = require_workflow("Saga", active())
        if must_compensate(context.attempt, error):
            with context.attempt.compensating():
                failed: list[str] = []
                for name, undo in reversed(self._compensations):
                    failed += [each] if (each := await _failure_async(context, name, undo)) else []
            self._refuse(failed, error)


def name_of_compensation(step: object) -> str:
    """Return the name of a step that is to be called later.

    Raises:
        UsageError: it was called here.
    """
    if not callable(step):
        raise UsageError(
            f"a saga calls the step itself, when it undoes, and got {step!r}: give the step and its arguments, "
            "saga.add(refund, order_id)."
        )
    return str(getattr(step, "name", getattr(step, "__name__", repr(step))))


def _context() -> Context:
    """Return the context of the workflow's own code, outside of branches: these go on while another one is undone.

    Raises:
        UsageError: this is a branch.
    """
    context = require_workflow("Saga", active())
    branches = context.attempt.branches
    if branches.here() is not branches.root:
        raise UsageError(
            f"a saga was entered in a branch of workflow {context.attempt.name!r}, beside others that would go on "
            "while it is undone: enter it in the workflow's function, around the branches, or in a child."
        )
    return context


def _failure(attempt: Attempt, name: str, undo: Callable[[], Any]) -> str | None:
    try:
        undo()
    except BaseException as error:
        if not is_own_failure(attempt, error):
            raise
        return _logged(name, error)
    return None


async def _failure_async(context: Context, name: str, undo: Callable[[], Any]) -> str | None:
    try:
        outcome = undo()
        if inspect.isawaitable(outcome):
            await (carried_through(context, outcome) if is_engines_own(outcome) else cast("Any", outcome))
    except BaseException as error:
        if not is_own_failure(context.attempt, error):
            raise
        return _logged(name, error)
    return None


def _after(error: BaseException | None) -> str:
    return "" if error is None else f" They followed on {brief(error)}."


def _logged(name: str, error: BaseException) -> str:
    log.warning("the compensation %s failed: %s", name, brief(error))
    return f"{name}: {brief(error)}"
