"""What a recorded outcome is to the workflow's code: a value, or an error that is raised."""

from __future__ import annotations

from typing import Any, NoReturn

from sqla_durable.definitions.classes import KnownErrors
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.failure import Failure
from sqla_durable.errors import StepFailedError
from sqla_durable.models.status import StepStatus
from sqla_durable.store import Recorded


def outcome_of(recorded: Recorded, result: Codec, known: KnownErrors) -> Any:
    """Give the value, or raise the error, the same on first execution and on replay.

    Args:
        recorded: the outcome.
        result: reads the value.
        known: the classes of errors that may be raised.

    Raises:
        Exception: the recorded error.
        StepFailedError: likewise, where its own type cannot be rebuilt.
        DecodingError: the value does not fit the type that the code has now.
    """
    if recorded.value is not None:
        return recorded.value[0]
    if recorded.status is StepStatus.SUCCEEDED:
        return result.decode(recorded.output or "null")
    raise_recorded(recorded, known)


def raise_recorded(recorded: Recorded, known: KnownErrors) -> NoReturn:
    """Raise the error of an operation that failed; see `outcome_of`."""
    failure = Failure.from_text(recorded.error)
    rebuilt = failure.rebuild(known.inside)
    if rebuilt is not None:
        raise rebuilt
    error = StepFailedError(
        f"step {recorded.key!r} failed with {failure.type}: {failure.message}",
        error_type=failure.type,
        error_message=failure.message,
    )
    failure.complete(error)
    raise error
