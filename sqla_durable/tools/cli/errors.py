"""The errors of the command line, whose messages are all that its user sees."""

from __future__ import annotations

from sqla_durable.errors import DurableError


class CommandError(DurableError):
    """The command line cannot be followed as it was given: a wrong name, a wrong URL."""
