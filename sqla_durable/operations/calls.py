"""One call of an operation: what identifies it, how a step is called, and what the step reports meanwhile."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from sqla_durable.definitions.checks import unescape_key
from sqla_durable.definitions.limits import Watch
from sqla_durable.definitions.registry import StepDefinition
from sqla_durable.definitions.retry import Tries


class Position(NamedTuple):
    """The identity of one operation.

    Attributes:
        key: its key in the workflow, with what the user chose escaped; see `escape_key`.
        name: its name, escaped likewise.
        number: its place in the order of calls.
    """

    key: str
    name: str
    number: int

    @property
    def shown(self) -> str:
        """The key as it is shown to users."""
        return unescape_key(self.key)


class Progress:
    """What a step reports while it is executed, in all tries of one attempt.

    Attributes:
        details: the details that it reported last, as JSON text, perhaps in an earlier attempt.
        watch: the time limits of the current try, if it has any.
    """

    def __init__(self, details: str | None) -> None:
        self.details = details
        self.watch: Watch | None = None
        self._sent_at = float("-inf")
        self._unsent = False

    @property
    def unsent(self) -> bool:
        """Whether there is a report that was not sent."""
        return self._unsent

    def report(self, details: str | None, *, interval: float) -> bool:
        """Note details; return whether to send them now, because the last were sent `interval` seconds ago or more.

        Raises:
            StepTimeoutError: the try sent no heartbeat for too long, or its time is over.
        """
        if self.watch is not None:
            self.watch.note_heartbeat()
        self.details = self.details if details is None else details
        self._unsent = True
        return time.monotonic() - self._sent_at >= interval

    @contextmanager
    def sending(self) -> Generator[None]:
        """Mark the newest details as sent while the block sends them; if it fails, they are unsent again."""
        self._sent_at = time.monotonic()
        self._unsent = False
        try:
            with nullcontext() if self.watch is None else self.watch.writing():
                yield
        except BaseException:
            self._unsent = True
            raise


class StepCall(NamedTuple):
    """One call of a step in a workflow; `tries` counts its executions, those of earlier attempts included."""

    definition: StepDefinition
    position: Position
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tries: Tries
