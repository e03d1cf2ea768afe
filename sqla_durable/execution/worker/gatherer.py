"""Group commit of streams: what plain steps append at the same time goes into one statement.

It never waits to fill a batch: while one commit is on its way, the next batch gathers. What a batch does not write,
because somebody holds its workflow's row for example, is appended alone, so that only its own step waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy.exc import DBAPIError

from sqla_durable.execution.worker.database import Database, persistently
from sqla_durable.store import streams
from sqla_durable.store.streams import Append, Appended
from sqla_durable.unwinding import AttemptLost

_BATCH = 500
_BATCH_SIZE = 4 * 1024 * 1024  # characters


@dataclass(slots=True)
class _Waiting:
    append: Append
    outcome: asyncio.Future[Appended | None]

    def settle(self, appended: Appended | None) -> None:
        if not self.outcome.done():
            self.outcome.set_result(appended)

    def refuse(self) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(AttemptLost(self.append.origin.fence.workflow_id))
            self.outcome.exception()  # seen: perhaps nobody waits any more


class Gatherer:
    """Appends what is given, one batch after another; runs on the event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._closed = False

    async def append(self, append: Append) -> Appended:
        """Append, and return when that is committed.

        Raises:
            AttemptLost: the attempt no longer owns the workflow, or the worker ends.
            DBAPIError: the database refuses the values.
        """
        waiting = _Waiting(append, self._loop.create_future())
        if self._closed:
            waiting.refuse()
        else:
            self._waiting.append(waiting)
            self._arrived.set()
        appended = await waiting.outcome
        if appended is not None:
            return appended
        alone = partial(streams.append, origin=append.origin, name=append.name, values=append.values)
        return await persistently(self._database, alone, what="stream")

    async def run(self) -> None:
        """Commit batch after batch until cancelled; then refuse what waits and what is still to come."""
        batch: list[_Waiting] = []
        try:
            while True:
                await self._arrived.wait()
                batch = self._next_batch()
                for each, appended in zip(batch, await self._append(batch), strict=True):
                    each.settle(appended)
        finally:
            self._closed = True
            for each in (*batch, *self._waiting):
                each.refuse()

    def _next_batch(self) -> list[_Waiting]:
        """Take what waits, of each workflow the first."""
        taken: dict[object, _Waiting] = {}
        left: list[_Waiting] = []
        size = 0
        for each in self._waiting:
            workflow_id = each.append.origin.fence.workflow_id
            size += sum(len(value or "") for value in each.append.values)
            if workflow_id in taken or (taken and (size > _BATCH_SIZE or len(taken) >= _BATCH)):
                left.append(each)
            else:
                taken[workflow_id] = each
        self._waiting = left
        if not left:
            self._arrived.clear()
        return list(taken.values())

    async def _append(self, batch: Sequence[_Waiting]) -> Sequence[Appended | None]:
        appends = [each.append for each in batch]
        try:
            return await persistently(self._database, partial(streams.append_many, appends=appends), what="streams")
        except DBAPIError:  # one of them is refused: which one, each finds out alone
            return [None] * len(batch)
