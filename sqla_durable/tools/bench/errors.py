"""The errors of the bench."""

from __future__ import annotations

from sqla_durable.errors import DurableError


class BenchError(DurableError):
    """The bench cannot measure: the schema is not its own, a worker ended, a workflow failed, nothing was finished."""
