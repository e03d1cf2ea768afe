"""Facts: the clock, a random number, asked once and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sqla_durable.definitions.codec import Codec
from sqla_durable.operations.attempt import Position
from sqla_durable.operations.checkpoint import checkpoint_of
from sqla_durable.operations.outcome import outcome_of
from sqla_durable.operations.runtime import Runtime
from sqla_durable.store import Recorded, timers


async def of_process(runtime: Runtime, position: Position, *, ask: Callable[[], Any], codec: Codec) -> Any:
    """Ask this process; durable before the next effect."""
    try:
        recorded = runtime.attempt.recorded(position) or await _record(runtime, position, codec.encode(ask()))
        return outcome_of(recorded, codec, runtime.attempt.errors)
    finally:
        runtime.attempt.operation_ended(position)


async def of_database(runtime: Runtime, position: Position, *, codec: Codec) -> Any:
    """Ask for the database's clock."""
    try:
        recorded = runtime.attempt.recorded(position)
        if recorded is None:
            moment = await runtime.recorder.execute(timers.now)
            recorded = await _record(runtime, position, json.dumps(moment.isoformat()))
        return outcome_of(recorded, codec, runtime.attempt.errors)
    finally:
        runtime.attempt.operation_ended(position)


async def _record(runtime: Runtime, position: Position, output: str) -> Recorded:
    checkpoint = checkpoint_of(runtime.attempt, position, output=output)
    await runtime.recorder.record(checkpoint)
    return checkpoint.recorded
