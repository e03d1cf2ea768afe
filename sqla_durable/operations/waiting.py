"""Operations that wait, for a time, a signal, an event or an update, and facts that are read once and recorded.

A workflow waits in memory for a moment and is suspended then, which frees its slot in the worker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeAlias
from uuid import UUID

from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.failure import record
from sqla_durable.errors import EventNotSetError, NotFoundError, WaitTimeoutError
from sqla_durable.models.base import StepStatus
from sqla_durable.operations.calls import Position
from sqla_durable.operations.outcome import checkpoint_of, outcome_of, raise_recorded
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.suspending import MOMENT, Wait, Waker
from sqla_durable.store import Awaited, Checkpoint, Connectable, Recorded, hints, signals, steps, timers, updates

_SHORTEST_GRACE, _GRACE_PER_OPERATION, _LONGEST_GRACE = 0.05, 0.005, 5.0
"""How many seconds to wait in memory before suspending: longer where the replay would cost more."""

_POLLS_AT = (0.05, 0.25, 1.25)
"""Seconds in memory after which a wait polls: a signal sent by SQL, or a child that ends elsewhere, wakes nothing."""

_SHORTEST_PAUSE, _LONGEST_PAUSE, _SHARE = 0.05, 30.0, 0.25
"""Seconds between two polls, which are a share of the seconds waited so far."""

Taking: TypeAlias = Callable[[Runtime, Checkpoint], Coroutine[Any, Any, str | None]]
"""Consumes what is waited for and records it as the outcome; returns it as JSON text, or None if it is not there."""


@dataclass(frozen=True, slots=True)
class WaitSource:
    """What an operation waits for besides a time.

    Attributes:
        read_awaited: reads what the suspended workflow's row must name to be woken, before anything is consumed. If
            it returns nothing, no notice will arrive, and the wait polls. None: the row names `awaits`.
        take: consumes it if it is there, records it as the outcome, and returns its JSON text; see `in_one_statement`.
        timeout_message: the message of the error if it does not arrive in time.
        awaits: what the row is to name, where it is known beforehand.
        workflows: the workflows whose ends it may wait for.
        kind: as what the value was stored, for what opens it.
        key: likewise.
    """

    read_awaited: Callable[[Connectable], tuple[Awaited, ...]] | None
    take: Taking
    timeout_message: str
    awaits: tuple[Awaited, ...] = ()
    workflows: Sequence[UUID] = ()
    kind: str = "signal"
    key: str = ""

    def names(self, workflow_id: UUID) -> set[str | UUID]:
        """Return the names under which the arrival is announced in this process."""
        return {hint_of(workflow_id, each) for each in self.awaits} | set(self.workflows)

    @classmethod
    def of_signal(cls, name: str, timeout: timedelta | None) -> WaitSource:
        """Return the source of a signal."""
        take = partial(_take_signal, name=name)
        late = f"no signal {name!r} arrived within {timeout}."
        return cls(None, in_one_statement(take), late, (Awaited(signal=name),), key=name)


class GracePeriod:
    """The time for which an operation waits in memory before its workflow is suspended.

    A suspended workflow is replayed when it continues, which costs more the longer its history is. It keeps its slot
    for that time, unless another workflow may be waiting for the slot.

    Attributes:
        waker: wakes the operation before its next poll.
    """

    def __init__(self, runtime: Runtime, waker: Waker) -> None:
        self._recorder = runtime.recorder
        self.waker = waker
        self._began = time.monotonic()
        replayed = _SHORTEST_GRACE + _GRACE_PER_OPERATION * runtime.attempt.history_check.count
        self._until = self._began + min(replayed, _LONGEST_GRACE)

    @property
    def is_over(self) -> bool:
        """Whether to suspend the workflow now."""
        return time.monotonic() >= self._until or self._recorder.slot_is_wanted

    def wait(self, awaits: tuple[Awaited, ...], until: float = float("inf")) -> Wait:
        """Return how to wait in memory: until the next poll, but not beyond `until`."""
        now = time.monotonic()
        half = (self._began + self._until) / 2  # a later poll would come shortly before the last one
        next_poll = next((at for each in _POLLS_AT if now < (at := self._began + each) <= half), self._until)
        end = min(next_poll, until)
        return Wait(end, end, awaits, waker=self.waker)


def hint_of(workflow_id: UUID, awaited: Awaited) -> str:
    """Return the hint that announces something awaited."""
    return hints.sent_to(workflow_id, awaited.signal or "")


def in_one_statement(statement: Callable[[Connectable, Checkpoint], str | None]) -> Taking:
    """Return what consumes by one statement, in a transaction of its own."""

    async def take(runtime: Runtime, checkpoint: Checkpoint) -> str | None:
        return await runtime.recorder.execute(lambda connectable: statement(connectable, checkpoint))

    return take


def _take_signal(connectable: Connectable, checkpoint: Checkpoint, name: str) -> str | None:
    return signals.take(connectable, checkpoint, name=name)


async def sleep(runtime: Runtime, position: Position, *, delay: timedelta | None, until: datetime | None) -> None:
    """Wait for a time on the database's clock: `delay` after the first call, or `until`."""
    try:
        if runtime.attempt.recorded(position) is None:
            await runtime.recorder.settle()
            waiting = _RecordedWait(runtime, position, delay, until)
            await waiting.wait_until_due()
            await runtime.recorder.record(waiting.checkpoint(StepStatus.SUCCEEDED, output="null"))
    finally:
        runtime.attempt.end_call(position)


async def receive(
    runtime: Runtime, position: Position, source: WaitSource, result: Codec, *, within: timedelta | None
) -> Any:
    """Wait for something, consume it, and return its value.

    Raises:
        WaitTimeoutError: it did not arrive in time.
        DecodingError: it does not fit the type that the caller wants.
    """
    recorded = await receive_recorded(runtime, position, source, within=within)
    return outcome_of(runtime.attempt, recorded, result, source.kind, source.key)


async def receive_recorded(
    runtime: Runtime, position: Position, source: WaitSource, *, within: timedelta | None
) -> Recorded:
    """Wait for something, consume it, and return the record of it."""
    try:
        recorded = runtime.attempt.recorded(position)
        if recorded is None:
            await runtime.recorder.settle()
            recorded = await _RecordedWait(runtime, position, within, None).receive(source)
        return recorded
    finally:
        runtime.attempt.end_call(position)


class _RecordedWait:
    """One waiting operation, from its first call on, over several attempts."""

    def __init__(self, runtime: Runtime, position: Position, delay: timedelta | None, until: datetime | None) -> None:
        self._runtime = runtime
        self._position = position
        self._delay = delay
        self._until = until
        self._began = time.monotonic()
        self._age = 0.0

    async def wait_until_due(self) -> None:
        """Return when the wait is over."""
        wait = await self._begin(short=True)
        if wait.seconds > 0:
            await self._runtime.wait(self._position, wait)
            await self._runtime.recorder.settle()

    async def receive(self, source: WaitSource) -> Recorded:
        """Consume what is waited for, now or when it arrives, or record the timeout."""
        attempt = self._runtime.attempt
        with attempt.listening(self._runtime.recorder.waker(), source.names(attempt.workflow_id)) as waker:
            return await self._received(source, GracePeriod(self._runtime, waker))

    async def _received(self, source: WaitSource, grace: GracePeriod) -> Recorded:
        taking = self.checkpoint(StepStatus.SUCCEEDED)
        awaits, wait = source.awaits, None
        while True:
            grace.waker.clear()  # before the query: what arrives during it wakes again
            try:
                if source.read_awaited is not None and (not awaits or grace.is_over):
                    awaits = await self._runtime.recorder.execute(source.read_awaited)
                output = await source.take(self._runtime, taking)
            except (NotFoundError, EventNotSetError) as gone:
                return await self._fail(gone)
            if output is not None:
                return taking._replace(output=output).recorded
            in_memory = bool(awaits) and not grace.is_over
            if wait is None and not (in_memory and self._delay is None):
                wait = await self._begin(short=not awaits)
            if wait is not None and wait.seconds <= 0:
                return await self._late(source.timeout_message)
            await self._runtime.wait(
                self._position, self._next(wait, awaits, grace if in_memory else None, grace.waker)
            )
            await self._runtime.recorder.settle()

    def _next(self, wait: Wait | None, awaits: tuple[Awaited, ...], grace: GracePeriod | None, waker: Waker) -> Wait:
        if grace is not None:
            return grace.wait(awaits, float("inf") if wait is None else wait.until)
        assert wait is not None  # noqa: S101 (without a grace period the wait has begun)
        return replace(wait, awaits=awaits, waker=waker) if awaits else self._until_next_poll(wait)

    async def _late(self, message: str) -> Recorded:
        return await self._fail(WaitTimeoutError(message))

    async def _fail(self, reason: Exception) -> Recorded:
        failed = self.checkpoint(StepStatus.FAILED, error=record(reason))
        await self._runtime.recorder.record(failed)
        return failed.recorded

    def _until_next_poll(self, wait: Wait) -> Wait:
        """Return how to wait until the next poll: after a share of the time waited so far, so less and less often."""
        pause = min(max(_SHORTEST_PAUSE, _SHARE * (self._age + time.monotonic() - self._began)), _LONGEST_PAUSE)
        return Wait(min(wait.until, time.monotonic() + pause), self._began + MOMENT, polls=True)

    async def _begin(self, *, short: bool) -> Wait:
        """Return how long to wait, as recorded by the operation's row, which is written at the first call."""
        tried = self._runtime.attempt.unfinished_record(self._position)
        if tried is None:
            begin = partial(steps.begin_wait, checkpoint=self.checkpoint(StepStatus.WAITING), until=self._until)
            due_in = await self._runtime.recorder.execute(begin)
        else:
            due_in, self._age = tried.due_in, tried.age
        return Wait(self._began + due_in, self._began + MOMENT if short else float("-inf"))

    def checkpoint(self, status: StepStatus, *, output: str | None = None, error: str | None = None) -> Checkpoint:
        """Return the operation's checkpoint; that of a waiting one has the delay."""
        is_waiting = status is StepStatus.WAITING
        delay = self._delay.total_seconds() if is_waiting and self._delay is not None else None
        elapsed = 0.0 if is_waiting else time.monotonic() - self._began
        attempt = self._runtime.attempt
        return checkpoint_of(attempt, self._position, status, output=output, error=error, elapsed=elapsed, delay=delay)


Validate: TypeAlias = Callable[[str], Coroutine[Any, Any, str | None]]
"""Returns the reason for which a payload, as JSON text, is refused; None if it is accepted."""


@dataclass(frozen=True, slots=True)
class TakenUpdate:
    """An update that a workflow has accepted; the payload is JSON text."""

    id: int
    payload: str


async def receive_update(
    runtime: Runtime, position: Position, *, name: str, validate: Validate, within: timedelta | None
) -> TakenUpdate:
    """Wait for an update that is not refused, and accept it. A refused one is answered and not recorded here.

    Raises:
        WaitTimeoutError: none arrived in time.
    """
    late = f"no update {name!r} that is not refused arrived within {within}."
    take = partial(_take, name=name, validate=validate)
    source = WaitSource(None, take, late, (Awaited(signal=updates.signal_of(name)),))
    recorded = await receive_recorded(runtime, position, source, within=within)
    if recorded.status is StepStatus.FAILED:
        raise_recorded(recorded, runtime.attempt.options.errors)
    output = json.loads(recorded.output or "{}")
    return TakenUpdate(output["id"], json.dumps(output["payload"]))


async def _take(runtime: Runtime, checkpoint: Checkpoint, *, name: str, validate: Validate) -> str | None:
    fence = checkpoint.fence
    find = partial(updates.oldest, workflow_id=fence.workflow_id, name=name)
    while (found := await runtime.recorder.execute(find)) is not None:
        reason = await validate(found.payload)
        if reason is not None:
            await runtime.recorder.execute(partial(updates.refuse, fence=fence, update_id=found.id, reason=reason))
            await runtime.recorder.settle()
            continue
        taken = await runtime.recorder.execute(partial(updates.take, checkpoint=checkpoint, update_id=found.id))
        if taken is not None:  # otherwise another branch has taken it meanwhile
            return taken
    return None


async def record_value(runtime: Runtime, position: Position, *, produce: Callable[[], Any], codec: Codec) -> Any:
    """Record a value that this process produces, durable before the next effect, and return it."""
    try:
        recorded = runtime.attempt.recorded(position) or await _record(runtime, position, codec.encode(produce()))
        return outcome_of(runtime.attempt, recorded, codec)
    finally:
        runtime.attempt.end_call(position)


async def record_database_time(runtime: Runtime, position: Position, *, codec: Codec) -> Any:
    """Record the time of the database's clock, and return it."""
    try:
        recorded = runtime.attempt.recorded(position)
        if recorded is None:
            moment = await runtime.recorder.execute(timers.now)
            recorded = await _record(runtime, position, json.dumps(moment.isoformat()))
        return outcome_of(runtime.attempt, recorded, codec)
    finally:
        runtime.attempt.end_call(position)


async def _record(runtime: Runtime, position: Position, output: str) -> Recorded:
    checkpoint = checkpoint_of(runtime.attempt, position, output=runtime.attempt.seal(output, "step", position.key))
    await runtime.recorder.record(checkpoint)
    return checkpoint.recorded
