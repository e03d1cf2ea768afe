"""The loggers of this package: text from rows and exceptions becomes one line of bounded length, without values.

Otherwise a name with a newline could forge a line of the log, one with an escape sequence could change what a terminal
shows, and one of three megabytes could fill the disk.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqla_durable.definitions.redaction import message_of, traceback_of

LONGEST = 2_000
"""The most characters of a text in a line of the log."""

worker_name: ContextVar[str] = ContextVar("sqla_durable_worker", default="-")
"""The name of the worker that executes this code."""

NOWHERE: Mapping[str, object] = {"workflow_id": None, "workflow": None, "attempt": None, "step": None}
"""The attributes of a log record that belongs to no workflow."""

_locate: Callable[[], Mapping[str, object]] = lambda: NOWHERE  # noqa: E731
_PLAIN = (bool, int, float, UUID, timedelta, datetime, type(None))


class Log(logging.LoggerAdapter[logging.Logger]):
    """A logger that escapes and shortens its arguments; the only kind that this package uses.

    Its records have the name of the worker, for `%(worker)s` in a format, and say in which `workflow_id`, `workflow`,
    `attempt` and `step` they were logged; None outside of one.
    """

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), {})

    def log(self, level: int, msg: object, *args: object, exc_info: Any = None, **options: Any) -> None:
        """Log a message of this package with arguments from elsewhere."""
        if not self.logger.isEnabledFor(level):
            return
        shown = [_shown(each) for each in args]
        error = _error_in(exc_info)
        if error is not None:
            lines = "\n".join(one_line(each) for each in traceback_of(error).splitlines())
            msg, shown = f"{msg}\n%s", [*shown, lines]
        self.logger.log(level, msg, *shown, stacklevel=2, extra=attributes(), **options)


def locate_by(locate: Callable[[], Mapping[str, object]]) -> None:
    """Set what returns the attributes of a record that is logged now: only `runtime.context`, above, knows them."""
    global _locate
    _locate = locate


def attributes() -> dict[str, object]:
    """Return the attributes that a log record has which is logged now: of the workflow, and the worker's name."""
    return {**_locate(), "worker": one_line(worker_name.get())}


def one_line(text: str, *, limit: int = LONGEST) -> str:
    """Return a text as one line: unprintable characters escaped, and shortened if it is too long."""
    kept = text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
    if kept.isprintable():
        return kept
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in kept)


def joined(text: str) -> str:
    """Return the lines of a text of this package joined to one line."""
    return "; ".join(each.strip() for each in text.splitlines())


def _shown(value: object) -> object:
    if isinstance(value, _PLAIN):
        return value
    return one_line(message_of(value) if isinstance(value, BaseException) else str(value))


def _error_in(exc_info: Any) -> BaseException | None:
    match exc_info:
        case BaseException():
            return exc_info
        case None | False:
            return None
        case (_, error, _):
            return error if isinstance(error, BaseException) else None
        case _:
            return sys.exception()
