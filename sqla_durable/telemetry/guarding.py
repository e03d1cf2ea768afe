"""What keeps errors of telemetry away from workflows: they are logged, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan

from sqla_durable.definitions.log import Log

P = ParamSpec("P")

log = Log("sqla_durable.telemetry")
_warned = False


def guarded(function: Callable[P, None]) -> Callable[P, None]:
    """Let what a function raises be logged."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except Exception:
            _log_error()

    return call


def guarded_context(function: Callable[P, Context]) -> Callable[P, Context]:
    """Let what a function raises be logged, and the context be the current one, with a span that records nothing."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Context:
        try:
            return function(*args, **kwargs)
        except Exception:
            _log_error()
            return trace.set_span_in_context(NonRecordingSpan(trace.get_current_span().get_span_context()))

    return call


def _log_error() -> None:
    """Log the current error: the first of the process as a warning, since others follow with each span."""
    global _warned
    log.log(logging.DEBUG if _warned else logging.WARNING, "telemetry failed; no workflow is affected", exc_info=True)
    _warned = True
