"""An attempt that executes nothing: every outcome comes from its history, and where that ends, so does the attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from typing_extensions import override

from sqla_durable.api.polling import refuse_event_loop
from sqla_durable.definitions.registry import StepDefinition, WorkflowDefinition
from sqla_durable.errors import DecodingError
from sqla_durable.models.status import StepStatus
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position, Wait
from sqla_durable.operations.history import PATCH
from sqla_durable.operations.runtime import StepCall, run_blocking
from sqla_durable.operations.transaction import StepTransaction
from sqla_durable.operations.workflow import completion_of
from sqla_durable.runtime.context import Fork
from sqla_durable.runtime.shells import AsyncRuntime, BaseRuntime, BlockingRuntime
from sqla_durable.store import Checkpoint, Claimed, Completion, Connectable
from sqla_durable.unwinding import ControlFlow

T = TypeVar("T")

_QUIET = 20  # rounds of the event loop in which no branch visits anything: none of them replays any more


class HistoryEnd(ControlFlow):
    """The workflow's code has come to something that is not recorded."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a replay.

    Attributes:
        attempt: what it visited.
        completion: the outcome of today's code; None if it has come to something that is not recorded.
        undecodable: what is wrong with recorded outcomes that today's annotations do not fit.
    """

    attempt: Attempt
    completion: Completion | None
    undecodable: tuple[str, ...]

    @property
    def at(self) -> str | None:
        """The key of what the replay came to first that has no recorded outcome."""
        history = self.attempt.history_check.history
        visited = (key for key in self.attempt.history_check.keys if not key.startswith(PATCH))
        return next((key for key in visited if key not in history or not history[key].status.finished), None)


def replay(definition: WorkflowDefinition, claimed: Claimed) -> Replayed:
    """Execute the workflow's own code on a history, and none of its steps; needs no database.

    Raises:
        UsageError: an event loop is running in this thread, and the workflow is `async def`.
    """
    attempt = Attempt(claimed)
    if not definition.is_async:
        runtime = BlockingReplay(attempt)
        body = runtime.body
        return _replayed(
            runtime, lambda: run_blocking(completion_of(runtime, definition, lambda given: body(definition, given)))
        )
    refuse_event_loop("a replay", "call it in a plain def, or in a thread")
    on_loop = AsyncReplay(attempt)
    with asyncio.Runner() as runner:
        return _replayed(
            on_loop,
            lambda: runner.run(completion_of(on_loop, definition, lambda given: on_loop.body(definition, given))),
        )


def _replayed(runtime: _Replay, execute: Callable[[], Completion]) -> Replayed:
    try:
        completion = execute()
    except HistoryEnd:
        return Replayed(runtime.attempt, None, tuple(runtime.undecodable))
    return Replayed(runtime.attempt, completion, tuple(runtime.undecodable))


class _Replay(BaseRuntime):
    """What both shells share: whatever would have an effect ends the attempt."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt)
        self.attempt.warns_of_refusal = False  # at the end of a history nobody has done anything wrong
        self.undecodable: list[str] = []

    def end(self) -> NoReturn:
        """End the attempt here."""
        self.attempt.stop(HistoryEnd)
        self.attempt.raise_if_stopped()
        raise HistoryEnd

    def refused(self, call: StepCall, error: DecodingError) -> None:
        """Note a recorded outcome that cannot be read; a step that itself failed with such an error is none."""
        recorded = self.attempt.recorded(call.position)
        if recorded is not None and recorded.status is StepStatus.SUCCEEDED:
            self.undecodable.append(f"{call.position.key!r}: {error}")

    @override
    async def pause(self, seconds: float) -> None:
        self.end()

    @override
    async def wait(self, position: Position, wait: Wait) -> None:
        self.end()

    @override
    async def settle(self) -> None:
        self.end()

    @override
    async def record(self, checkpoint: Checkpoint) -> None:
        pass

    @override
    def note(self, checkpoint: Checkpoint) -> None:
        pass

    @override
    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        self.end()

    @override
    async def begin(self, step: StepDefinition) -> StepTransaction:
        self.end()

    @override
    async def finish(self, completion: Completion) -> None:
        pass


class BlockingReplay(_Replay, BlockingRuntime):
    """The replay of a `def` workflow."""

    @override
    def fork(self) -> Fork:
        return Fork(self.context(), join=lambda: None)

    @override
    def perform(self, call: StepCall) -> Any:
        try:
            return super().perform(call)
        except DecodingError as error:
            self.refused(call, error)
            raise


class AsyncReplay(_Replay, AsyncRuntime):
    """The replay of an `async def` workflow: it ends when all of its branches have come to their ends."""

    @override
    async def settle(self) -> None:
        seen, quiet = -1, 0
        while quiet < _QUIET:
            visited = self.attempt.history_check.count
            seen, quiet = visited, quiet + 1 if visited == seen else 0
            await asyncio.sleep(0)
        self.end()

    @override
    async def recall(self) -> None:
        pass  # no clock is asked: the timers that fired are recorded

    @override
    async def moment(self) -> None:
        await asyncio.sleep(0.01)

    @override
    async def perform(self, call: StepCall) -> Any:
        try:
            return await super().perform(call)
        except DecodingError as error:
            self.refused(call, error)
            raise

    @override
    async def perform_blocking(self, call: StepCall) -> Any:
        await self.settle()
