"""Operations that wait: for a time, for a signal. They wait as a row, and a worker's place is free meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeAlias
from uuid import UUID

from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.failure import record
from sqla_durable.errors import EventNotSetError, WaitTimeoutError, WorkflowNotFoundError
from sqla_durable.models.status import StepStatus
from sqla_durable.operations.attempt import Position
from sqla_durable.operations.checkpoint import checkpoint_of
from sqla_durable.operations.outcome import outcome_of
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.suspending import Wait, Waker
from sqla_durable.store import Awaited, Checkpoint, Connectable, Recorded, hints, signals, steps

_MOMENT = 1.0
"""What takes no longer than this, in seconds, is waited for in memory."""

_SHORTEST_HOLD, _HOLD_PER_OPERATION, _LONGEST_HOLD = 0.05, 0.005, 5.0
"""For how long what others do is awaited in memory first, in seconds: for longer where a replay costs more."""

_LOOKS = (0.05, 0.25, 1.25)
"""After how many seconds in memory a wait looks by itself: what SQL sends, or another worker ends, does not wake it."""

_SHORTEST_LOOK, _LONGEST_LOOK, _SHARE = 0.05, 30.0, 0.25  # seconds, and a share of those waited so far

Taking: TypeAlias = Callable[[Runtime, Checkpoint], Coroutine[Any, Any, str | None]]
"""Takes what is waited for and records it as this outcome; gives that as JSON text, or None if it is not there."""


@dataclass(frozen=True, slots=True)
class Source:
    """What an operation waits for besides a time.

    Attributes:
        look: what the workflow's row is to say of it, seen before it is taken in vain; where that is nothing, nobody
            tells when it comes, and it is looked for again and again.
        take: takes it if it is there, records it as the outcome, and gives its JSON text; `at_once` does so by a
            statement.
        late: the error for when it does not come in time.
        workflows: those whose ends it may wait for.
    """

    look: Callable[[Connectable], tuple[Awaited, ...]] | None
    take: Taking
    late: str
    awaits: tuple[Awaited, ...] = ()
    workflows: Sequence[UUID] = ()

    def names(self, workflow_id: UUID) -> set[str | UUID]:
        """Return the names under which what wakes the operation is announced."""
        return {hint_of(workflow_id, each) for each in self.awaits} | set(self.workflows)

    @classmethod
    def of_signal(cls, name: str, timeout: timedelta | None) -> Source:
        """Wait for a signal."""
        take = partial(_take_signal, name=name)
        return cls(None, at_once(take), f"no signal {name!r} came within {timeout}.", (Awaited(signal=name),))


class GracePeriod:
    """The moment for which an operation waits in memory, before its workflow is suspended.

    A workflow that is suspended is replayed when it goes on, which costs more the longer its history is. It keeps its
    slot for that moment, unless another workflow may need the slot.

    Attributes:
        waker: wakes the operation before its next look.
    """

    def __init__(self, runtime: Runtime, waker: Waker) -> None:
        self._recorder = runtime.recorder
        self.waker = waker
        self._began = time.monotonic()
        replayed = _SHORTEST_HOLD + _HOLD_PER_OPERATION * runtime.attempt.visits.count
        self._until = self._began + min(replayed, _LONGEST_HOLD)

    @property
    def is_over(self) -> bool:
        """Whether the workflow is to be suspended now."""
        return time.monotonic() >= self._until or self._recorder.slot_is_wanted

    def wait(self, awaits: tuple[Awaited, ...], until: float = float("inf")) -> Wait:
        """Return how to wait in memory until the next look, and not beyond a time."""
        now = time.monotonic()
        half = (self._began + self._until) / 2  # a look later than that would come shortly before the last one
        next_look = next((at for each in _LOOKS if now < (at := self._began + each) <= half), self._until)
        end = min(next_look, until)
        return Wait(end, end, awaits, waker=self.waker)


def hint_of(workflow_id: UUID, awaited: Awaited) -> str:
    """Return the hint that says that something awaited was sent."""
    return hints.sent_to(workflow_id, awaited.signal or "")


def at_once(statement: Callable[[Connectable, Checkpoint], str | None]) -> Taking:
    """Take by one statement, in a transaction of its own."""

    async def take(runtime: Runtime, checkpoint: Checkpoint) -> str | None:
        return await runtime.recorder.execute(lambda connectable: statement(connectable, checkpoint))

    return take


def _take_signal(connectable: Connectable, checkpoint: Checkpoint, name: str) -> str | None:
    return signals.take(connectable, checkpoint, name=name)


async def sleep(runtime: Runtime, position: Position, *, delay: timedelta | None, until: datetime | None) -> None:
    """Wait for a time on the database's clock: `delay` after the first visit, or `until`."""
    try:
        if runtime.attempt.recorded(position) is None:
            await runtime.recorder.settle()
            waiting = _Waiting(runtime, position, delay, until)
            await waiting.through()
            await runtime.recorder.record(waiting.checkpoint(StepStatus.SUCCEEDED, output="null"))
    finally:
        runtime.attempt.operation_ended(position)


async def receive(
    runtime: Runtime, position: Position, source: Source, result: Codec, *, within: timedelta | None
) -> Any:
    """Wait for something, take it, and give its value.

    Raises:
        WaitTimeoutError: it did not come in time.
        DecodingError: it does not fit the type that it is wanted as.
    """
    recorded = await received(runtime, position, source, within=within)
    return outcome_of(recorded, result, runtime.attempt.errors)


async def received(runtime: Runtime, position: Position, source: Source, *, within: timedelta | None) -> Recorded:
    """Wait for something, take it, and give it as it is recorded."""
    try:
        recorded = runtime.attempt.recorded(position)
        if recorded is None:
            await runtime.recorder.settle()
            recorded = await _Waiting(runtime, position, within, None).receive(source)
        return recorded
    finally:
        runtime.attempt.operation_ended(position)


class _Waiting:
    """One operation that waits, from its first visit or from where an earlier attempt has left it."""

    def __init__(self, runtime: Runtime, position: Position, delay: timedelta | None, until: datetime | None) -> None:
        self._runtime = runtime
        self._position = position
        self._delay = delay
        self._until = until
        self._began = time.monotonic()
        self._age = 0.0

    async def through(self) -> None:
        """Return when the time has come."""
        wait = await self._begin(short=True)
        if wait.seconds > 0:
            await self._runtime.wait(self._position, wait)
            await self._runtime.recorder.settle()

    async def receive(self, source: Source) -> Recorded:
        """Take what is waited for, now or when it comes, or record that it came too late."""
        attempt = self._runtime.attempt
        with attempt.listening(self._runtime.recorder.waker(), source.names(attempt.workflow_id)) as waker:
            return await self._received(source, GracePeriod(self._runtime, waker))

    async def _received(self, source: Source, grace: GracePeriod) -> Recorded:
        taking = self.checkpoint(StepStatus.SUCCEEDED)
        awaits, wait = source.awaits, None
        while True:
            grace.waker.clear()  # before the look: what comes during it wakes again
            try:
                if source.look is not None and (not awaits or grace.is_over):
                    awaits = await self._runtime.recorder.execute(source.look)
                output = await source.take(self._runtime, taking)
            except (WorkflowNotFoundError, EventNotSetError) as gone:
                return await self._fail(gone)
            if output is not None:
                return replace(taking, output=output).recorded
            held = bool(awaits) and not grace.is_over
            if wait is None and not (held and self._delay is None):
                wait = await self._begin(short=not awaits)
            if wait is not None and wait.seconds <= 0:
                return await self._late(source.late)
            await self._runtime.wait(self._position, self._next(wait, awaits, grace if held else None, grace.waker))
            await self._runtime.recorder.settle()

    def _next(self, wait: Wait | None, awaits: tuple[Awaited, ...], grace: GracePeriod | None, waker: Waker) -> Wait:
        if grace is not None:
            return grace.wait(awaits, float("inf") if wait is None else wait.until)
        assert wait is not None  # noqa: S101 (what is not held has begun)
        return replace(wait, awaits=awaits, waker=waker) if awaits else self._until_next_look(wait)

    async def _late(self, message: str) -> Recorded:
        return await self._fail(WaitTimeoutError(message))

    async def _fail(self, reason: Exception) -> Recorded:
        failed = self.checkpoint(StepStatus.FAILED, error=record(reason))
        await self._runtime.recorder.record(failed)
        return failed.recorded

    def _until_next_look(self, wait: Wait) -> Wait:
        """Look again after a share of the time that it has waited for: soon at first, and then less and less often."""
        pause = min(max(_SHORTEST_LOOK, _SHARE * (self._age + time.monotonic() - self._began)), _LONGEST_LOOK)
        return Wait(min(wait.until, time.monotonic() + pause), self._began + _MOMENT, polls=True)

    async def _begin(self, *, short: bool) -> Wait:
        """Give for how long to wait; the row that says it outlives this attempt."""
        tried = self._runtime.attempt.tried(self._position)
        if tried is None:
            begin = partial(steps.begin_wait, checkpoint=self.checkpoint(StepStatus.WAITING), until=self._until)
            due_in = await self._runtime.recorder.execute(begin)
        else:
            due_in, self._age = tried.due_in, tried.age
        return Wait(self._began + due_in, self._began + _MOMENT if short else float("-inf"))

    def checkpoint(self, status: StepStatus, *, output: str | None = None, error: str | None = None) -> Checkpoint:
        """Give the operation's record; of one that waits, how long."""
        is_waiting = status is StepStatus.WAITING
        delay = self._delay.total_seconds() if is_waiting and self._delay is not None else None
        elapsed = 0.0 if is_waiting else time.monotonic() - self._began
        attempt = self._runtime.attempt
        return checkpoint_of(attempt, self._position, status, output=output, error=error, elapsed=elapsed, delay=delay)
