"""Operations that wait: for a time, for a signal. They wait as a row, and a worker's place is free meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeAlias

from sqla_durable.codec import Codec
from sqla_durable.errors import EventNotSetError, WaitTimeoutError, WorkflowNotFoundError
from sqla_durable.failure import Failure
from sqla_durable.operations.attempt import Position, Wait
from sqla_durable.operations.checkpoint import checkpoint_of
from sqla_durable.operations.outcome import outcome_of
from sqla_durable.operations.runtime import Runtime
from sqla_durable.status import StepStatus
from sqla_durable.store import Awaited, Checkpoint, Connectable, Recorded, signals, waits

_MOMENT = 1.0
"""What takes no longer than this, in seconds, is waited for in memory."""

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
    """

    look: Callable[[Connectable], tuple[Awaited, ...]] | None
    take: Taking
    late: str
    awaits: tuple[Awaited, ...] = ()

    @classmethod
    def of_signal(cls, name: str, timeout: timedelta | None) -> Source:
        """Wait for a signal."""
        take = partial(_take_signal, name=name)
        return cls(None, at_once(take), f"no signal {name!r} came within {timeout}.", (Awaited(signal=name),))


def at_once(statement: Callable[[Connectable, Checkpoint], str | None]) -> Taking:
    """Take by one statement, in a transaction of its own."""

    async def take(runtime: Runtime, checkpoint: Checkpoint) -> str | None:
        return await runtime.execute(lambda connectable: statement(connectable, checkpoint))

    return take


def _take_signal(connectable: Connectable, checkpoint: Checkpoint, name: str) -> str | None:
    return signals.take(connectable, checkpoint, name=name)


async def sleep(runtime: Runtime, position: Position, *, delay: timedelta | None, until: datetime | None) -> None:
    """Wait for a time on the database's clock: `delay` after the first visit, or `until`."""
    try:
        if runtime.attempt.recorded(position) is None:
            await runtime.settle()
            waiting = _Waiting(runtime, position, delay, until)
            await waiting.through()
            await runtime.record(waiting.checkpoint(StepStatus.SUCCEEDED, output="null"))
    finally:
        runtime.attempt.left(position)


async def receive(
    runtime: Runtime, position: Position, source: Source, result: Codec, *, within: timedelta | None
) -> Any:
    """Wait for something, take it, and give its value.

    Raises:
        WaitTimeoutError: it did not come in time.
        DecodingError: it does not fit the type that it is wanted as.
    """
    return outcome_of(await received(runtime, position, source, within=within), result)


async def received(runtime: Runtime, position: Position, source: Source, *, within: timedelta | None) -> Recorded:
    """Wait for something, take it, and give it as it is recorded."""
    try:
        recorded = runtime.attempt.recorded(position)
        if recorded is None:
            await runtime.settle()
            recorded = await _Waiting(runtime, position, within, None).receive(source)
        return recorded
    finally:
        runtime.attempt.left(position)


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
            await self._runtime.settle()

    async def receive(self, source: Source) -> Recorded:
        """Take what is waited for, now or when it comes, or record that it came too late."""
        taking = self.checkpoint(StepStatus.SUCCEEDED)
        wait: Wait | None = None
        while True:
            try:
                awaits = source.awaits if source.look is None else await self._runtime.execute(source.look)
                output = await source.take(self._runtime, taking)
            except (WorkflowNotFoundError, EventNotSetError) as gone:
                return await self._fail(gone)
            if output is not None:
                return replace(taking, output=output).recorded
            wait = wait or await self._begin(short=not awaits)
            if wait.seconds <= 0:
                return await self._late(source.late)
            await self._runtime.wait(
                self._position, replace(wait, awaits=awaits) if awaits else self._until_next_look(wait)
            )
            await self._runtime.settle()

    async def _late(self, message: str) -> Recorded:
        return await self._fail(WaitTimeoutError(message))

    async def _fail(self, reason: Exception) -> Recorded:
        error = Failure.of(reason).to_json()
        failed = self.checkpoint(StepStatus.FAILED, error=error)
        await self._runtime.record(failed)
        return failed.recorded

    def _until_next_look(self, wait: Wait) -> Wait:
        """Look again after a share of the time that it has waited for: soon at first, and then less and less often."""
        pause = min(max(_SHORTEST_LOOK, _SHARE * (self._age + time.monotonic() - self._began)), _LONGEST_LOOK)
        return Wait(min(wait.until, time.monotonic() + pause), self._began + _MOMENT, looks=True)

    async def _begin(self, *, short: bool) -> Wait:
        """Give for how long to wait; the row that says it outlives this attempt."""
        tried = self._runtime.attempt.tried(self._position)
        if tried is None:
            begin = partial(waits.begin, checkpoint=self.checkpoint(StepStatus.WAITING), until=self._until)
            due_in = await self._runtime.execute(begin)
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
