"""Time and chance in a workflow's code: what a replay finds as it was."""

from __future__ import annotations

import random as chance
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Generic, TypeVar, cast

from sqla_durable.api.operate import operate
from sqla_durable.definitions.checks import require_duration, require_moment
from sqla_durable.definitions.codec import Codec
from sqla_durable.operations import waiting
from sqla_durable.runtime.context import active

T = TypeVar("T")


def sleep(duration: timedelta, *, key: str | None = None) -> Awaitable[None]:
    """Let the workflow wait, for seconds or for years; in `async def` code, await it.

    ```python
    await sleep(timedelta(days=14))
    ```

    It begins when the workflow first comes here and ends on the database's clock, whatever happens to workers. Longer
    than a moment it is a row and nothing else. A duration of zero or less is over at once.

    Args:
        duration: how long.
        key: an explicit identity in the history, instead of `sleep` and its occurrence.

    Raises:
        ArgumentError: the duration is no timedelta, or longer than a hundred years.
        UsageError: this is not a workflow's own code.
    """
    require_duration(duration, "duration")
    return cast("Awaitable[None]", operate("sleep", partial(waiting.sleep, delay=duration, until=None), key=key))


def sleep_until(moment: datetime, *, key: str | None = None) -> Awaitable[None]:
    """Let the workflow wait until a time; one in the past is over at once. See `sleep`.

    Raises:
        ArgumentError: the time has no time zone, or is not before the year 9999.
        UsageError: this is not a workflow's own code.
    """
    require_moment(moment, "moment")
    return cast("Awaitable[None]", operate("sleep", partial(waiting.sleep, delay=None, until=moment), key=key))


class Fact(Generic[T]):
    """Something that is asked once, recorded, and the same on every replay. Outside a workflow it is asked each time.

    Called in an `async def` workflow it gives an awaitable: `aio` is the same for type checkers.
    """

    def __init__(self, name: str, kind: type[T], ask: Callable[[], T], *, record_database_time: bool = False) -> None:
        self._name = name
        self._ask = ask
        self._codec = Codec.of(kind, what=name)
        self._of_database = record_database_time

    def __call__(self) -> T:
        """Give it."""
        context = active()
        if context is None or context.step is not None:
            return self._ask()
        asking = waiting.record_database_time if self._of_database else partial(waiting.record_value, produce=self._ask)
        return cast("T", operate(self._name, partial(asking, codec=self._codec)))

    def aio(self) -> Coroutine[Any, Any, T]:
        """Give it, in an `async def` workflow."""
        return cast("Coroutine[Any, Any, T]", self())


now: Fact[datetime] = Fact("now", datetime, lambda: datetime.now(UTC), record_database_time=True)
"""The time on the database's clock."""

uuid4: Fact[uuid.UUID] = Fact("uuid4", uuid.UUID, uuid.uuid4)
"""A random UUID."""

random: Fact[float] = Fact("random", float, chance.random)
"""A random number, at least 0 and below 1."""
