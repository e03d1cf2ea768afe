"""What the user's code has raised, and what that is: its own failure, or the end of the attempt.

Decided here for steps, workflows, branches, sagas and validators, in sync and async code alike; the page on guarantees
has the table.
"""

from __future__ import annotations

import concurrent.futures
import threading

from sqla_durable.errors import UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.undisturbed import CancelledError, is_cancelled_here
from sqla_durable.unwinding import AttemptLost, ControlFlow, Interrupted


def is_own_failure(attempt: Attempt, error: BaseException) -> bool:
    """Return whether an error is the failure of the code that raised it, and is to be recorded as its outcome.

    If not, the attempt ends without an outcome. To be asked in the thread or task of the code, before anything is
    awaited: code that was closed by a `GeneratorExit` may await nothing more.
    """
    match error:
        case BaseExceptionGroup():
            return all(is_own_failure(attempt, each) for each in error.exceptions)
        case ControlFlow():  # the engine stops the attempt first, except for these two
            return not (attempt.stopped or isinstance(error, (AttemptLost, Interrupted)))
        case CancelledError():
            return not is_cancelled_here()
        case KeyboardInterrupt():  # Ctrl-C interrupts the main thread only
            return threading.current_thread() is not threading.main_thread()
        case _:
            return isinstance(error, (Exception, SystemExit))


def is_own_failure_of_workflow(attempt: Attempt, error: BaseException) -> bool:
    """Return the same of code of the workflow: a cancel that it has asked for itself, and lets out, is its own."""
    if isinstance(error, CancelledError):
        return not attempt.stopped
    return is_own_failure(attempt, error)


def failure_of_step(error: BaseException, key: str) -> BaseException:
    """Return the error to record for a step's own failure; where it is none that code can catch, one that is.

    It is what the step's retry policy is asked about.
    """
    if isinstance(error, CancelledError):
        cancelled = concurrent.futures.CancelledError(f"step {key!r} ended with a CancelledError of its own.")
        cancelled.__cause__ = error
        return cancelled
    return _stated(error, f"step {key!r}")


def failure_of_workflow(error: BaseException, name: str) -> BaseException:
    """Return the error to record for a workflow's own failure."""
    if isinstance(error, CancelledError):
        cancelled = UsageError(f"workflow {name!r} ended with a CancelledError of its own.")
        cancelled.__cause__ = error
        return cancelled
    return _stated(error, f"workflow {name!r}")


def _stated(error: BaseException, what: str) -> BaseException:
    if not isinstance(error, ControlFlow):
        return error
    stated = UsageError(
        f"{what} raised {type(error).__name__} by itself, which only the engine does, to end an attempt."
    )
    stated.__cause__ = error
    return stated
