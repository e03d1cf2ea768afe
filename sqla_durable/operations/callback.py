"""Callbacks: created once, with a token by which another system answers; the workflow is suspended meanwhile."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from typing import Any
from uuid import UUID

from sqla_durable.definitions.checks import unescape_key
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.failure import Failure
from sqla_durable.definitions.json_values import DEFAULT_LIMIT
from sqla_durable.definitions.libraries import pydantic
from sqla_durable.definitions.redaction import problems_of
from sqla_durable.errors import (
    CallbackFailedError,
    CallbackSilentError,
    DecodingError,
    NotFoundError,
    UsageError,
    WaitTimeoutError,
)
from sqla_durable.models.base import StepStatus
from sqla_durable.operations.calls import Position
from sqla_durable.operations.outcome import checkpoint_of, outcome_of
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.suspending import Wait
from sqla_durable.operations.waiting import GracePeriod
from sqla_durable.store import Awaited, Recorded, callbacks, hints, inbox
from sqla_durable.unwinding import AttemptLost

_SECRET = 24  # bytes
_SHORTEST_PAUSE, _LONGEST_PAUSE, _SHARE = 1.0, 30.0, 0.25  # seconds, and a share of the seconds waited so far
_LONGEST_WAIT = 365 * 86_400.0  # seconds: a longer wait is treated as this one, within the server's range


@dataclass(frozen=True, slots=True)
class CallbackRecord:
    """A callback, as the record of its step stores it.

    The record has the hash of the token, by which it is found, and not the token, which is derived from a secret that
    only workers have. Without such a secret the record has the token too, because a replay needs it.

    Attributes:
        workflow_id: the id of the workflow that created it.
        digest: SHA-256 of the token, in hexadecimal digits.
        nonce: the random part that a token is derived from.
        token: the token itself, where there was no secret.
        signal: the name under which its outcome is sent to that workflow's inbox.
        timeout: in seconds, from its creation.
        heartbeat: how many seconds may pass between two heartbeats.
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
    ) -> CallbackRecord:
        """Create a callback with a new token."""
        nonce = secrets.token_hex(_SECRET)
        derived = _tokens(workflow_id, nonce, known)
        token = derived[0] if derived else f"{workflow_id.hex}.{secrets.token_hex(_SECRET)}"
        return cls(
            workflow_id=workflow_id,
            digest=digest_of(token),
            nonce=nonce,
            token=None if derived else token,
            # `require_sendable` refuses such a name, so that no user's signal has it by chance.
            signal=f"{inbox.CALLBACK}{secrets.token_hex(8)}",
            timeout=None if within is None else within.total_seconds(),
            heartbeat=None if heartbeat is None else heartbeat.total_seconds(),
        )

    @classmethod
    def of(cls, recorded: Recorded) -> CallbackRecord:
        """Read the record of a callback, which an operator may have changed."""
        try:
            return _adapter().validate_json(recorded.output or "null")
        except pydantic.ValidationError as error:
            raise DecodingError(
                f"the record {unescape_key(recorded.key)!r} is not that of a callback: {problems_of(error)}. Fork from "
                "before it, or record the answer as the outcome of the step that waits for it."
            ) from error

    def to_json(self) -> str:
        """Return the JSON text to store."""
        return _adapter().dump_json(self).decode()

    def reveal_token(self, known: tuple[bytes, ...] = ()) -> str:
        """Return the token, by which another system answers.

        Args:
            known: the secrets of this worker, from one of which it was derived.

        Raises:
            UsageError: it was derived from none of them.
        """
        given = [self.token] if self.token is not None else _tokens(self.workflow_id, self.nonce, known)
        found = next((each for each in given if hmac.compare_digest(digest_of(each), self.digest)), None)
        if found is None:
            raise UsageError(
                f"the token of a callback of workflow {self.workflow_id} was derived from a secret that this worker "
                "does not have: pass the old secret to Durable(secret=[...]) after the new one while workflows wait."
            )
        return found


@cache
def _adapter() -> pydantic.TypeAdapter[CallbackRecord]:
    return pydantic.TypeAdapter(CallbackRecord)


def digest_of(token: str) -> str:
    """Return the hash of a token, which a callback's record stores and is found by."""
    return hashlib.sha256(token.encode()).hexdigest()


def _tokens(workflow_id: UUID, nonce: str, known: tuple[bytes, ...]) -> list[str]:
    digests = [hmac.digest(each, f"callback/{workflow_id.hex}/{nonce}".encode(), "sha256") for each in known]
    return [f"{workflow_id.hex}.{each[:_SECRET].hex()}" for each in digests]


async def create(
    runtime: Runtime, position: Position, *, within: timedelta | None, heartbeat: timedelta | None
) -> CallbackRecord:
    """Create a callback, or return the recorded one; it is committed when this returns.

    Raises:
        DecodingError: what is recorded is no callback.
    """
    attempt = runtime.attempt
    try:
        recorded = attempt.recorded(position)
        if recorded is not None:
            return CallbackRecord.of(recorded)
        await runtime.recorder.settle()
        callback = CallbackRecord.new(attempt.workflow_id, attempt.options.secrets, within=within, heartbeat=heartbeat)
        await runtime.recorder.record(checkpoint_of(attempt, position, output=callback.to_json()))
        await runtime.recorder.settle()  # a token is handed out only when a crash can no longer replace it
        return callback
    finally:
        attempt.end_call(position)


async def result(runtime: Runtime, position: Position, *, key: str, callback: CallbackRecord, kind: Codec) -> Any:
    """Wait for the outcome of a callback, whose step has this key, and return its value.

    Raises:
        CallbackFailedError: it has failed.
        WaitTimeoutError, CallbackSilentError: it was not answered in time.
        NotFoundError: it can no longer be answered.
        DecodingError: the value does not fit.
    """
    try:
        recorded = runtime.attempt.recorded(position)
        if recorded is None:
            await runtime.recorder.settle()
            recorded = await _CallbackWait(runtime, position, key, callback).outcome()
        return outcome_of(runtime.attempt, recorded, kind, "callback", key)
    finally:
        runtime.attempt.end_call(position)


class _CallbackWait:
    """One wait for a callback's outcome. The wait itself is not recorded: the callback's own row has its times."""

    def __init__(self, runtime: Runtime, position: Position, key: str, callback: CallbackRecord) -> None:
        self._runtime = runtime
        self._position = position
        self._key = key
        self._shown = unescape_key(key)
        self._callback = callback
        self._owner = callback.workflow_id
        self._is_forked = callback.workflow_id != runtime.attempt.workflow_id
        self._began = time.monotonic()

    async def outcome(self) -> Recorded:
        """Wait for the outcome, record it and return the record."""
        hint = hints.sent_to(self._owner, self._callback.signal)
        with self._runtime.attempt.listening(self._runtime.recorder.waker(), [hint]) as waker:
            return await self._outcome(GracePeriod(self._runtime, waker))

    async def _outcome(self, grace: GracePeriod) -> Recorded:
        read = partial(callbacks.read, workflow_id=self._owner, key=self._key, signal=self._callback.signal)
        while True:
            grace.waker.clear()  # before the query: what arrives during it wakes again
            found = await self._runtime.recorder.execute(read)
            if found is None or found.signal is None:
                return await self._gone()
            if found.answer is not None:
                return await self._record(found.answer)
            if self._is_forked and (found.due_in <= 0 or found.workflow_status.finished):
                return await (self._fail(self._expired(found.due_to)) if found.due_in <= 0 else self._gone())
            if found.due_in > 0 or not await self._expire():
                wait = replace(self._wait(found.due_in), waker=grace.waker)
                in_memory = found.due_in > 0 and not (self._is_forked or grace.is_over)
                await self._runtime.wait(self._position, grace.wait(wait.awaits, wait.until) if in_memory else wait)
                await self._runtime.recorder.settle()

    async def _expire(self) -> bool:
        checkpoint = checkpoint_of(self._runtime.attempt, self._position)
        return await self._runtime.recorder.execute(partial(callbacks.expire, checkpoint=checkpoint, key=self._key))

    def _wait(self, due_in: float) -> Wait:
        """Return how to wait: until the outcome or the deadline; past it, for the transaction that answers just now.

        A fork gets no notice that its original's callback was answered, so it polls.
        """
        awaits = () if self._is_forked else (Awaited(signal=self._callback.signal),)
        now = time.monotonic()
        if due_in <= 0:
            return Wait(now + _between(_SHARE * -due_in), float("-inf"), awaits)
        seconds = due_in if due_in == float("inf") else min(due_in, _LONGEST_WAIT)
        if self._is_forked:
            seconds = min(seconds, _LONGEST_PAUSE)
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
                f"the outcome of callback {self._shown!r} has neither a value nor an error: it was inserted by SQL."
            )
        )

    def _expired(self, due_to: str) -> Exception:
        if due_to == "heartbeat":
            within = timedelta(seconds=self._callback.heartbeat or 0)
            return CallbackSilentError(f"callback {self._shown!r} sent no heartbeat for longer than {within}.")
        within = timedelta(seconds=self._callback.timeout or 0)
        return WaitTimeoutError(f"callback {self._shown!r} was not answered within {within}.")

    async def _gone(self) -> Recorded:
        if not self._is_forked:  # the workflow was rewound or deleted
            raise AttemptLost(self._owner)
        return await self._fail(
            NotFoundError(
                f"callback {self._shown!r} belongs to workflow {self._owner}, of which this one is a fork, and which "
                "is finished or no longer has it: it cannot be answered. Fork from before create_callback()."
            )
        )

    async def _fail(self, error: Exception) -> Recorded:
        # Stored whole, however long the other system's message is.
        return await self._end(StepStatus.FAILED, error=Failure.of(error, limit=2 * DEFAULT_LIMIT).to_json())

    async def _end(self, status: StepStatus, *, output: str | None = None, error: str | None = None) -> Recorded:
        attempt, elapsed = self._runtime.attempt, time.monotonic() - self._began
        checkpoint = checkpoint_of(attempt, self._position, status, output=output, error=error, elapsed=elapsed)
        await self._runtime.recorder.record(checkpoint)
        return checkpoint.recorded


def _between(seconds: float) -> float:
    return min(max(_SHORTEST_PAUSE, seconds), _LONGEST_PAUSE)
