"""The outcome of an operation: how it is recorded, how a recorded one is returned or raised, and which errors count."""

from __future__ import annotations

import concurrent.futures
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

from sqla_durable.definitions.checks import unescape_key
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.error_classes import KnownErrors
from sqla_durable.definitions.failure import Failure
from sqla_durable.errors import PayloadKeyError, StepFailedError, UsageError
from sqla_durable.models.base import StepStatus
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.shielding import CancelledError, is_cancelled_here
from sqla_durable.store import Checkpoint, Recorded, steps
from sqla_durable.unwinding import AttemptLost, ControlFlow, Interrupted, Unwound

_TYPE = "asyncio.exceptions:CancelledError"
_MARK = "cancelled"


def checkpoint_of(
    attempt: Attempt,
    position: Position,
    status: StepStatus = StepStatus.SUCCEEDED,
    *,
    output: str | None = None,
    error: str | None = None,
    tries: int = 1,
    elapsed: float = 0.0,
    delay: float | None = None,
    value: tuple[Any] | None = None,
) -> Checkpoint:
    """Return the checkpoint of an operation; `output` and `error` are JSON text, times are in seconds."""
    return Checkpoint(
        fence=attempt.fence,
        key=position.key,
        name=position.name,
        position=position.number,
        status=status,
        output=output,
        error=error,
        attempt=attempt.number,
        tries=tries,
        elapsed=elapsed,
        delay=delay,
        value=value,
    )


def outcome_of(attempt: Attempt, recorded: Recorded, result: Codec, kind: str = "step", key: str = "") -> Any:
    """Return the recorded value, or raise the recorded error, the same on first execution and on replay.

    Args:
        attempt: the attempt that reads it.
        recorded: the outcome.
        result: decodes the value.
        kind: as what the value was stored, for what opens it.
        key: likewise; the key of the record by default.

    Raises:
        Exception: the recorded error.
        StepFailedError: likewise, where its own type cannot be rebuilt.
        DecodingError: the value does not fit the annotation that the code has now, or is not what was stored.
        PayloadKeyError: this process has no key for it.
    """
    if recorded.value is not None:
        return recorded.value[0]
    if recorded.status is StepStatus.SUCCEEDED:
        return result.decode(attempt.open(recorded.output or "null", kind, key or recorded.key))
    raise_recorded(recorded, attempt.options.errors)


def raise_recorded(recorded: Recorded, known: KnownErrors) -> NoReturn:
    """Raise the error of an operation that failed; see `outcome_of`."""
    failure = Failure.from_text(recorded.error)
    rebuilt = failure.rebuild(known.inside)
    if rebuilt is not None:
        raise rebuilt
    error = StepFailedError(
        f"step {unescape_key(recorded.key)!r} failed with {failure.type}: {failure.message}",
        error_type=failure.type,
        error_message=failure.message,
    )
    failure.complete(error)
    raise error


@dataclass(frozen=True, slots=True)
class CancelledCall:
    """The record of a call that the workflow's own code cancelled.

    Attributes:
        order: increases from one cancelled call of a workflow to the next.
        fired: the keys of the asyncio timers that fired meanwhile.
    """

    order: int
    fired: tuple[str, ...] = ()


async def record_cancelled_call(runtime: Runtime, position: Position, cancelled: CancelledCall) -> Recorded:
    """Record that a call was cancelled, unless the operation has an outcome; return the outcome that stands.

    The database decides, so that replays agree: an operation recorded as cancelled can record or commit nothing else.
    What the code recorded before, perhaps the reason for the cancel, is committed first.

    Raises:
        ControlFlow: the attempt ends here, and nothing was recorded.
    """
    await runtime.recorder.settle()
    words = f"the workflow's own code cancelled the call {position.shown!r}"
    error: dict[str, Any] = {
        "type": _TYPE,
        "message": words,
        "args": [],
        "state": {},
        "traceback": "",
        _MARK: asdict(cancelled),
    }
    checkpoint = checkpoint_of(runtime.attempt, position, StepStatus.FAILED, error=json.dumps(error))
    return await runtime.recorder.execute(partial(steps.settle, checkpoint=checkpoint))


def cancelled_call_in(recorded: Recorded) -> CancelledCall | None:
    """Return the record of a cancelled call; None if the outcome is another one."""
    if recorded.status is not StepStatus.FAILED or f'"{_MARK}"' not in (recorded.error or ""):
        return None
    found: Any = json.loads(recorded.error or "{}").get(_MARK)
    return CancelledCall(found["order"], tuple(found["fired"])) if found else None


def is_own_failure(attempt: Attempt, error: BaseException) -> bool:
    """Return whether an error is a failure of the user's code, to be recorded as its outcome.

    If not, the attempt ends without an outcome; the page on guarantees has the table. Call it in the thread or task of
    that code, before anything is awaited: after a `GeneratorExit` nothing may be awaited.
    """
    match error:
        case BaseExceptionGroup():
            return all(is_own_failure(attempt, each) for each in error.exceptions)
        case ControlFlow():  # the engine stops the attempt before it raises one, except for these two
            return not (attempt.is_stopped or isinstance(error, (AttemptLost, Interrupted)))
        case CancelledError():
            return not is_cancelled_here()
        case PayloadKeyError():  # another process may have the key
            return False
        case KeyboardInterrupt():  # Ctrl-C interrupts the main thread only
            return threading.current_thread() is not threading.main_thread()
        case _:
            return isinstance(error, (Exception, SystemExit))


def is_own_failure_of_workflow(attempt: Attempt, error: BaseException) -> bool:
    """Return the same for the workflow's own code, whose failure may also be a `CancelledError` of its own making."""
    if isinstance(error, CancelledError):
        return not attempt.is_stopped
    return is_own_failure(attempt, error)


def note_if_ending(attempt: Attempt, error: BaseException) -> None:
    """Note what an operation raises in the workflow's own code, if it ends the attempt, and stop that.

    What the code does because of it is not to be recorded: a task group cancels other calls, for example, and a replay,
    in which the same is not raised again, would wait for these cancels.
    """
    match error:
        case ControlFlow() | CancelledError():
            attempt.note_ending(error)
        case PayloadKeyError():
            attempt.stop(partial(Unwound, error))
        case Exception():
            pass
        case _ if not is_own_failure(attempt, error):
            attempt.stop(partial(Unwound, error))
        case _:
            pass


@contextmanager
def noting_ending(attempt: Attempt) -> Generator[None]:
    """Do the same for what is raised in the block."""
    try:
        yield
    except BaseException as error:
        note_if_ending(attempt, error)
        raise


def failure_of_step(error: BaseException, key: str) -> BaseException:
    """Return the error to record for a step's own failure, which is an `Exception` or a `SystemExit`.

    The step's retry policy decides about this error.
    """
    if isinstance(error, CancelledError):
        cancelled = concurrent.futures.CancelledError(f"step {key!r} ended with a CancelledError of its own.")
        cancelled.__cause__ = error
        return cancelled
    return _as_usage_error(error, f"step {key!r}")


def failure_of_workflow(error: BaseException, name: str) -> BaseException:
    """Return the error to record for a workflow's own failure."""
    if isinstance(error, CancelledError):
        cancelled = UsageError(f"workflow {name!r} ended with a CancelledError of its own.")
        cancelled.__cause__ = error
        return cancelled
    return _as_usage_error(error, f"workflow {name!r}")


def _as_usage_error(error: BaseException, what: str) -> BaseException:
    if not isinstance(error, ControlFlow):
        return error
    stated = UsageError(
        f"{what} raised {type(error).__name__} itself, which only the engine may raise, to end an attempt."
    )
    stated.__cause__ = error
    return stated
