"""Callbacks: made once, with a token that others answer by; the workflow waits for the answer as a row."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from sqla_durable.definitions.codec import DEFAULT_LIMIT, Codec
from sqla_durable.definitions.failure import Failure
from sqla_durable.definitions.redaction import problems_of
from sqla_durable.errors import (
    CallbackFailedError,
    CallbackNotFoundError,
    CallbackSilentError,
    DecodingError,
    UsageError,
    WaitTimeoutError,
)
from sqla_durable.models.status import StepStatus
from sqla_durable.operations.attempt import Position
from sqla_durable.operations.checkpoint import checkpoint_of
from sqla_durable.operations.outcome import outcome_of
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.suspending import Wait
from sqla_durable.operations.wait import GracePeriod
from sqla_durable.store import Awaited, Recorded, callbacks, hints, inbox
from sqla_durable.unwinding import AttemptLost

_SECRET = 24  # bytes
_SHORTEST_LOOK, _LONGEST_LOOK, _SHARE = 1.0, 30.0, 0.25  # seconds, and a share of those that have passed
_LONGEST_WAIT = 365 * 86_400.0  # seconds: a time that is out of the server's range is none


@dataclass(frozen=True, slots=True)
class Made:
    """A callback as its step's record has it.

    The record has the hash of the token, by which it is found, and not the token: that is made again of a secret that
    only workers have. Without such a secret the record has the token too, or a replay would not have it.

    Attributes:
        workflow_id: the id of the workflow that made it.
        digest: SHA-256 of the token, in hexadecimal digits.
        nonce: what is random in a token that is made of a secret.
        token: the token itself, where there was no secret.
        signal: the name under which its outcome is in that workflow's inbox.
        timeout: in seconds, from when it was made.
        heartbeat: in seconds, how long it may be silent.
    """

    workflow_id: UUID
    digest: str
    nonce: str
    token: str | None
    signal: str
    timeout: float | None
    heartbeat: float | None

    @classmethod
    def new(
        cls, workflow_id: UUID, known: tuple[bytes, ...] = (), *, within: timedelta | None, heartbeat: timedelta | None
    ) -> Made:
        """Make one."""
        nonce = secrets.token_hex(_SECRET)
        made = _tokens(workflow_id, nonce, known)
        token = made[0] if made else f"{workflow_id.hex}.{secrets.token_hex(_SECRET)}"
        return cls(
            workflow_id=workflow_id,
            digest=digest_of(token),
            nonce=nonce,
            token=None if made else token,
            # Refused as a name by `signal`: nobody sends it by chance.
            signal=f"{inbox.CALLBACK}{secrets.token_hex(8)}",
            timeout=None if within is None else within.total_seconds(),
            heartbeat=None if heartbeat is None else heartbeat.total_seconds(),
        )

    @classmethod
    def of(cls, recorded: Recorded) -> Made:
        """Read a record, of which an operator may have made another one."""
        try:
            return _ADAPTER.validate_json(recorded.output or "null")
        except ValidationError as error:
            raise DecodingError(
                f"the stored callback {recorded.key!r} is none: {problems_of(error)}. Fork from before it, or give its "
                "answer instead of it, as the outcome of the step that waits."
            ) from error

    def to_json(self) -> str:
        """Return the JSON text to store."""
        return _ADAPTER.dump_json(self).decode()

    def reveal(self, known: tuple[bytes, ...] = ()) -> str:
        """Return the token, by which others answer.

        Args:
            known: the secrets of this worker, one of which may have made it.

        Raises:
            UsageError: none of them has.
        """
        given = [self.token] if self.token is not None else _tokens(self.workflow_id, self.nonce, known)
        found = next((each for each in given if hmac.compare_digest(digest_of(each), self.digest)), None)
        if found is None:
            raise UsageError(
                f"the token of a callback of workflow {self.workflow_id} was made with a secret that this worker does "
                "not have: give Durable(secret=[...]) the old one beside the new one, for as long as workflows wait."
            )
        return found


_ADAPTER = TypeAdapter(Made)


def digest_of(token: str) -> str:
    """Return what a callback's record holds of its token, and what it is found by."""
    return hashlib.sha256(token.encode()).hexdigest()


def _tokens(workflow_id: UUID, nonce: str, known: tuple[bytes, ...]) -> list[str]:
    made = [hmac.digest(each, f"callback/{workflow_id.hex}/{nonce}".encode(), "sha256") for each in known]
    return [f"{workflow_id.hex}.{each[:_SECRET].hex()}" for each in made]


async def create(
    runtime: Runtime, position: Position, *, within: timedelta | None, heartbeat: timedelta | None
) -> Made:
    """Make a callback, or find the one that was made before; committed when this returns.

    Raises:
        DecodingError: what is recorded is none.
    """
    attempt = runtime.attempt
    try:
        recorded = attempt.recorded(position)
        if recorded is not None:
            return Made.of(recorded)
        await runtime.recorder.settle()
        made = Made.new(attempt.workflow_id, attempt.secrets, within=within, heartbeat=heartbeat)
        await runtime.recorder.record(checkpoint_of(attempt, position, output=made.to_json()))
        await runtime.recorder.settle()  # nobody is to have a token that a crash makes another one of
        return made
    finally:
        attempt.operation_ended(position)


async def result(runtime: Runtime, position: Position, *, key: str, made: Made, kind: Codec) -> Any:
    """Wait for the outcome of a callback, whose step has this key; give its value.

    Raises:
        CallbackFailedError: it has failed.
        WaitTimeoutError, CallbackSilentError: its time was over.
        CallbackNotFoundError: nobody can answer it any more.
        DecodingError: the value does not fit.
    """
    try:
        recorded = runtime.attempt.recorded(position)
        if recorded is None:
            await runtime.recorder.settle()
            recorded = await _Waiting(runtime, position, key, made).outcome()
        return outcome_of(recorded, kind, runtime.attempt.errors)
    finally:
        runtime.attempt.operation_ended(position)


class _Waiting:
    """One wait for a callback's outcome. Nothing of it is recorded: its times are those of the callback."""

    def __init__(self, runtime: Runtime, position: Position, key: str, made: Made) -> None:
        self._runtime = runtime
        self._position = position
        self._key = key
        self._made = made
        self._owner = made.workflow_id
        self._is_forked = made.workflow_id != runtime.attempt.workflow_id
        self._began = time.monotonic()

    async def outcome(self) -> Recorded:
        """Record the outcome when it is there."""
        hint = hints.sent_to(self._owner, self._made.signal)
        with self._runtime.attempt.listening(self._runtime.recorder.waker(), [hint]) as waker:
            return await self._outcome(GracePeriod(self._runtime, waker))

    async def _outcome(self, grace: GracePeriod) -> Recorded:
        look = partial(callbacks.look, workflow_id=self._owner, key=self._key, signal=self._made.signal)
        while True:
            grace.waker.clear()  # before the look: what comes during it wakes again
            found = await self._runtime.recorder.execute(look)
            if found is None or found.signal is None:
                return await self._gone()
            if found.answer is not None:
                return await self._record(found.answer)
            if self._is_forked and (found.due_in <= 0 or found.workflow_status.finished):
                return await (self._fail(self._expired(found.due_to)) if found.due_in <= 0 else self._gone())
            if found.due_in > 0 or not await self._expire():
                wait = replace(self._wait(found.due_in), waker=grace.waker)
                is_held = found.due_in > 0 and not (self._is_forked or grace.is_over)
                await self._runtime.wait(self._position, grace.wait(wait.awaits, wait.until) if is_held else wait)
                await self._runtime.recorder.settle()

    async def _expire(self) -> bool:
        checkpoint = checkpoint_of(self._runtime.attempt, self._position)
        return await self._runtime.recorder.execute(partial(callbacks.expire, checkpoint=checkpoint, key=self._key))

    def _wait(self, due_in: float) -> Wait:
        """Wait for the outcome, or until it is too late; where somebody answers just then, for what becomes of that.

        Nobody tells a fork that its original's callback was answered: it looks again and again.
        """
        awaits = () if self._is_forked else (Awaited(signal=self._made.signal),)
        now = time.monotonic()
        if due_in <= 0:
            return Wait(now + _between(_SHARE * -due_in), float("-inf"), awaits)
        seconds = due_in if due_in == float("inf") else min(due_in, _LONGEST_WAIT)
        if self._is_forked:
            seconds = min(seconds, _LONGEST_LOOK)
        return Wait(now + seconds, float("-inf"), awaits, polls=self._is_forked)

    async def _record(self, answer: callbacks.Answer) -> Recorded:
        if answer.value is not None:
            return await self._end(StepStatus.SUCCEEDED, output=answer.value)
        if answer.expired is not None:
            return await self._fail(self._expired(answer.expired))
        if answer.error is not None:
            details = None if answer.details is None else json.loads(answer.details)
            return await self._fail(CallbackFailedError(answer.error, details))
        return await self._fail(
            DecodingError(
                f"the outcome of callback {self._key!r} has neither a value nor an error: it was so inserted."
            )
        )

    def _expired(self, due_to: str) -> Exception:
        if due_to == "heartbeat":
            within = timedelta(seconds=self._made.heartbeat or 0)
            return CallbackSilentError(f"callback {self._key!r} was silent for longer than {within}.")
        within = timedelta(seconds=self._made.timeout or 0)
        return WaitTimeoutError(f"callback {self._key!r} was not answered within {within}.")

    async def _gone(self) -> Recorded:
        if not self._is_forked:  # rewound or deleted
            raise AttemptLost(self._owner)
        return await self._fail(
            CallbackNotFoundError(
                f"callback {self._key!r} is that of workflow {self._owner}, of which this one is a fork, and which is "
                "finished or has it no longer: nobody can answer it. Fork from before create_callback()."
            )
        )

    async def _fail(self, error: Exception) -> Recorded:
        # Kept whole, however long what the other system told.
        return await self._end(StepStatus.FAILED, error=Failure.of(error, limit=2 * DEFAULT_LIMIT).to_json())

    async def _end(self, status: StepStatus, *, output: str | None = None, error: str | None = None) -> Recorded:
        attempt, elapsed = self._runtime.attempt, time.monotonic() - self._began
        checkpoint = checkpoint_of(attempt, self._position, status, output=output, error=error, elapsed=elapsed)
        await self._runtime.recorder.record(checkpoint)
        return checkpoint.recorded


def _between(seconds: float) -> float:
    return min(max(_SHORTEST_LOOK, seconds), _LONGEST_LOOK)
