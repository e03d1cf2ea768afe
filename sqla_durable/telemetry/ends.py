"""How an attempt or a try ended: which of its ends are errors, and what of an error is written to its span."""

from __future__ import annotations

from opentelemetry.trace import Span, StatusCode

from sqla_durable.definitions.error_classes import name_of_class
from sqla_durable.definitions.failure import is_recorded_error
from sqla_durable.definitions.log import one_line
from sqla_durable.definitions.redaction import message_of, traceback_of
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.outcome import is_own_failure, is_own_failure_of_workflow
from sqla_durable.operations.workflow import control_flow_in
from sqla_durable.telemetry.instruments import ERROR
from sqla_durable.unwinding import (
    AttemptLost,
    Cancelling,
    ContinuedAsNew,
    ControlFlow,
    Interrupted,
    Released,
    Suspended,
)

_OUTCOMES: tuple[tuple[type[ControlFlow], str], ...] = (  # the first that fits
    (ContinuedAsNew, "continued_as_new"),
    (Suspended, "suspended"),
    (Released, "released"),
    (Cancelling, "cancelled"),
    (AttemptLost, "lost"),
    (Interrupted, "interrupted"),
    (ControlFlow, "stopped"),
)


def outcome_of(attempt: Attempt, error: BaseException | None) -> str:
    """Return in a word how an attempt ended; one that is to end has no outcome, whatever its code raises or returns."""
    found = attempt.ending or (None if error is None else control_flow_in(error))
    if found is not None:
        return _word_for(found)
    if error is None:
        return "succeeded"
    return "failed" if is_own_failure_of_workflow(attempt, error) else "crashed"


def unwinding_of(attempt: Attempt, error: BaseException) -> str | None:
    """Return in a word what ends a step's code, where that is no error: a suspension, a release, a cancel."""
    if is_own_failure(attempt, error):
        return None
    found = control_flow_in(error) or attempt.ending
    return "stopped" if found is None else _word_for(found)


def _word_for(ending: ControlFlow) -> str:
    return next(word for kind, word in _OUTCOMES if isinstance(ending, kind))


def error_type_of(error: BaseException) -> str:
    """Return the name of an error's class, as recorded failures have it."""
    return name_of_class(type(error)).replace(":", ".")


def add_error(span: Span, error: BaseException, *, details: bool) -> None:
    """Mark a span as failed, and describe the error on the span where it occurred: here, unless it was recorded.

    What a step or a child has recorded comes back with that traceback as its cause: its own span describes it.
    """
    kind, message = error_type_of(error), message_of(error, details=details)
    span.set_attribute(ERROR, kind)
    span.set_status(StatusCode.ERROR, one_line(message))
    if not is_recorded_error(error):
        trace = traceback_of(error, details=details)
        span.add_event(
            "exception",
            {"exception.type": kind, "exception.message": message, "exception.stacktrace": trace},
        )
