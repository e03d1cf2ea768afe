"""An attempt that executes nothing: every outcome comes from its history, and where that ends, so does the attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from typing_extensions import override

from sqla_durable.api.polling import refuse_event_loop
from sqla_durable.definitions.registry import StepDefinition, WorkflowDefinition
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position
from sqla_durable.operations.history import PATCH
from sqla_durable.operations.runtime import Recorder, run_blocking
from sqla_durable.operations.suspending import Suspension, Wait, Waker
from sqla_durable.operations.transaction import StepTransaction
from sqla_durable.operations.workflow import completion_of
from sqla_durable.runtime.runtimes import AsyncRuntime, BlockingRuntime
from sqla_durable.runtime.tasks import hosting
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
    attempt.warns_of_refusal = False  # at the end of a history nobody has done anything wrong
    recorder = HistoryRecorder(attempt, is_async=definition.is_async)
    try:
        if definition.is_async:
            refuse_event_loop("a replay", "call it in a plain def, or in a thread")
            with asyncio.Runner() as runner:
                completion = runner.run(_completion_on_loop(AsyncRuntime(attempt, recorder), definition))
        else:
            completion = run_blocking(completion_of(BlockingRuntime(attempt, recorder), definition))
    except HistoryEnd:
        completion = None
    undecodable = tuple(f"{key!r}: {error}" for key, error in attempt.undecodable.items())
    return Replayed(attempt, completion, undecodable)


async def _completion_on_loop(runtime: AsyncRuntime, definition: WorkflowDefinition) -> Completion:
    with hosting():
        return await completion_of(runtime, definition)


class HistoryRecorder(Recorder):
    """Records nothing: whatever would have an effect ends the attempt."""

    suspends = False

    def __init__(self, attempt: Attempt, *, is_async: bool) -> None:
        super().__init__(attempt)
        self._is_async = is_async

    def _end(self) -> NoReturn:
        """End the attempt here."""
        self.attempt.stop(HistoryEnd)
        self.attempt.raise_if_stopped()
        raise HistoryEnd

    @override
    async def settle(self) -> None:
        """End the attempt; of an `async def` workflow, when all of its branches have come to their ends."""
        if self._is_async:
            seen, quiet = -1, 0
            while quiet < _QUIET:
                visited = self.attempt.history_check.count
                seen, quiet = visited, quiet + 1 if visited == seen else 0
                await asyncio.sleep(0)
        self._end()

    @override
    async def record(self, checkpoint: Checkpoint) -> None:
        pass

    @override
    def note(self, checkpoint: Checkpoint) -> None:
        pass

    @override
    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        self._end()

    @override
    async def begin(self, step: StepDefinition) -> StepTransaction:
        self._end()

    @override
    async def finish(self, completion: Completion) -> None:
        pass

    @override
    async def suspend(self, suspension: Suspension, *, remember: Callable[[Connectable], None] | None = None) -> None:
        self._end()

    @override
    async def pause(self, seconds: float) -> None:
        self._end()

    @override
    async def wait_in_memory(self, position: Position, wait: Wait) -> None:
        self._end()

    @override
    def waker(self) -> Waker:
        return Waker()

    @override
    async def pause_replay(self, seconds: float) -> None:
        await asyncio.sleep(0.01)

    @override
    async def due_timers(self) -> dict[str, float]:
        return {}  # no clock is asked: the timers that fired are recorded
