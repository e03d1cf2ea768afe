"""What is executed on an engine or a connection."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, event


class Executed(NamedTuple):
    """A statement that was about to be executed, as the driver gets it."""

    statement: str
    parameters: Any


@contextmanager
def executed_on(target: Engine | Connection) -> Generator[list[Executed]]:
    """Note the statements that are executed there meanwhile."""
    executed: list[Executed] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        executed.append(Executed(statement, parameters))

    event.listen(target, "before_cursor_execute", note)
    try:
        yield executed
    finally:
        event.remove(target, "before_cursor_execute", note)
