"""Operations that wait: for a time, for a signal. They wait as a row, and a worker's place is free meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqla_durable.codec import Codec
from sqla_durable.errors import WaitTimeoutError
from sqla_durable.failure import Failure
from sqla_durable.operations.attempt import Position, Wait
from sqla_durable.operations.outcome import outcome_of
from sqla_durable.operations.runtime import Runtime
from sqla_durable.status import StepStatus
from sqla_durable.store import Awaited, Checkpoint, Connectable, Recorded, signals, waits

_MOMENT = 1.0
"""What takes no longer than this, in seconds, is waited for in memory."""


@dataclass(frozen=True, slots=True)
class Source:
    """What an operation waits for besides a time.

    Attributes:
        awaited: what the workflow's row says of it.
        take: takes it if it is there, records it as the outcome, and gives its JSON text.
        late: the error for when it does not come in time.
    """

    awaited: Awaited
    take: Callable[[Connectable, Checkpoint], str | None]
    late: str

    @classmethod
    def of_signal(cls, name: str, timeout: timedelta | None) -> Source:
        """Wait for a signal."""
        take = partial(_take_signal, name=name)
        return cls(Awaited(signal=name), take, f"no signal {name!r} came within {timeout}.")


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
    try:
        recorded = runtime.attempt.recorded(position)
        if recorded is None:
            await runtime.settle()
            recorded = await _Waiting(runtime, position, within, None).receive(source)
        return outcome_of(recorded, result)
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

    async def through(self) -> None:
        """Return when the time has come."""
        wait = await self._begin(None)
        if wait.seconds > 0:
            await self._runtime.wait(self._position, wait)
            await self._runtime.settle()

    async def receive(self, source: Source) -> Recorded:
        """Take what is waited for, now or when it comes, or record that it came too late."""
        taking = self.checkpoint(StepStatus.SUCCEEDED)

        def take(connectable: Connectable) -> str | None:
            return source.take(connectable, taking)

        wait: Wait | None = None
        while True:
            output = await self._runtime.execute(take)
            if output is not None:
                return _recorded(taking, output=output)
            if wait is None:
                wait = await self._begin(source.awaited)
            if wait.seconds <= 0:
                return await self._late(source.late)
            await self._runtime.wait(self._position, wait)
            await self._runtime.settle()

    async def _late(self, message: str) -> Recorded:
        error = Failure.of(WaitTimeoutError(message)).to_json()
        failed = self.checkpoint(StepStatus.FAILED, error=error)
        await self._runtime.record(failed)
        return _recorded(failed, error=error)

    async def _begin(self, awaited: Awaited | None) -> Wait:
        """Give for how long to wait; the row that says it outlives this attempt."""
        tried = self._runtime.attempt.tried(self._position)
        if tried is None:
            begin = partial(waits.begin, checkpoint=self.checkpoint(StepStatus.WAITING), until=self._until)
            due_in = await self._runtime.execute(begin)
        else:
            due_in = tried.due_in
        in_memory = _MOMENT if awaited is None else float("-inf")
        return Wait(self._began + due_in, self._began + in_memory, awaited)

    def checkpoint(self, status: StepStatus, *, output: str | None = None, error: str | None = None) -> Checkpoint:
        """Give the operation's record; of one that waits, how long."""
        attempt = self._runtime.attempt
        waiting = status is StepStatus.WAITING and self._delay is not None
        return Checkpoint(
            fence=attempt.fence,
            key=self._position.key,
            name=self._position.name,
            position=self._position.number,
            status=status,
            output=output,
            error=error,
            attempt=attempt.number,
            attempts=1,
            elapsed=0.0 if status is StepStatus.WAITING else time.monotonic() - self._began,
            delay=self._delay.total_seconds() if waiting and self._delay is not None else None,
        )


def _recorded(checkpoint: Checkpoint, *, output: str | None = None, error: str | None = None) -> Recorded:
    return Recorded(checkpoint.key, checkpoint.name, checkpoint.position, checkpoint.status, output, error)
