"""The functions of workflow code for stories that are written once: each is called in the namespace of its caller.

`await either.sleep(...)` is a call of `sqla_durable.sleep` in the sync form, of `sqla_durable.asyncio.sleep` in the
async one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from types import ModuleType
from typing import Any, Generic, TypeVar

from sqlalchemy.orm import Session

import sqla_durable
import sqla_durable.asyncio as aio
from sqla_durable.definitions.inspection import SessionKind
from sqla_durable.runtime.context import active

T = TypeVar("T")

NO_CALLS = {"Saga", "as_completed"}  # used by themselves, not awaited


class Outcome(Generic[T]):
    """What a sync call has returned, to be awaited as that of an async one is."""

    def __init__(self, value: T) -> None:
        self.value = value

    def __await__(self) -> Generator[None, None, T]:
        yield from ()
        return self.value


def _namespace(session: object) -> ModuleType:
    context = active()
    if context is None or not context.is_async:
        return sqla_durable
    is_in_transaction = context.step is not None and context.step.definition.session is not SessionKind.NONE
    return sqla_durable if is_in_transaction and isinstance(session, Session) else aio


def __getattr__(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        outcome = getattr(_namespace(kwargs.get("session")), name)(*args, **kwargs)
        return outcome if inspect.isawaitable(outcome) or name in NO_CALLS else Outcome(outcome)

    return call
