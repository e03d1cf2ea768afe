"""Fires schedules: reads what is due, decides, and starts the workflows; and brings declared schedules into the table.

Any number of workers do so at the same time. Of two that decide the same tick one writes it, and the other finds that
the row has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqla_durable import manage
from sqla_durable.definitions.database_errors import first_line, sqlstate
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.registry import Registry
from sqla_durable.definitions.schedules import Decision, ScheduleDeclaration, decide
from sqla_durable.errors import ArgumentError
from sqla_durable.execution.worker.database import Databases, persistently
from sqla_durable.execution.worker.heartbeat import send_hints
from sqla_durable.execution.worker.hints import Wakeup
from sqla_durable.store import hints, schedules
from sqla_durable.store.schedules import DueSchedule

log = Log("sqla_durable.worker")

_LIMIT = 100  # schedules that are read at once
_POSTPONED = 60.0  # seconds until a schedule that cannot be understood is looked at again
_LOCK_NOT_AVAILABLE = "55P03"


class Schedules:
    """Fires the schedules of the database, those of other applications too."""

    def __init__(self, databases: Databases, registry: Registry, queues: Collection[str], claims: Wakeup) -> None:
        self._database = databases.shared
        self._transactions = databases.transacting
        self._registry = registry
        self._queues = queues
        self._claims = claims

    async def declare(self) -> None:
        """Bring the schedules that the code declares into the table, and pause those that it no longer does."""
        declared = self._registry.schedules()
        changed = await persistently(self._transactions, partial(self._declare, declared=declared), what="schedules")
        for line in changed:
            log.info("%s", line)

    def _declare(self, connection: Connection, *, declared: Iterable[ScheduleDeclaration]) -> list[str]:
        names, known = [each.name for each in declared], [each.name for each in self._registry]
        put = [each for each in declared if self._put(connection, each)]
        gone = schedules.pause_undeclared(connection, names=names, workflows=known)
        return [
            *(f"schedule {each.name!r} of workflow {each.workflow!r} is as the code declares it now" for each in put),
            *(f"schedule {each!r} is paused: {schedules.UNDECLARED}" for each in gone),
        ]

    def _put(self, connection: Connection, each: ScheduleDeclaration) -> bool:
        return schedules.put(connection, each.bind(), each.options, name=each.name, declared=True)

    async def fire(self) -> None:
        """Do what is due, and wake those who claim what was started."""
        written, seen = True, _LIMIT
        while written and seen == _LIMIT:  # otherwise others lock them, or were faster
            rows = await persistently(self._database, partial(schedules.due, limit=_LIMIT), what="schedules")
            started = [await self._fire_one(row) for row in rows]
            written, seen = any(each is not None for each in started), len(rows)
            await self._wake({row["queue"] for row, count in zip(rows, started, strict=True) if count})

    async def _wake(self, queues: set[str]) -> None:
        if queues.intersection(self._queues):
            self._claims.set()
        if others := queues.difference(self._queues):
            payloads = [hints.to_queue(each) for each in sorted(others)]
            await persistently(self._database, partial(send_hints, payloads=payloads), what="hint")

    async def _fire_one(self, row: Any) -> int | None:
        try:
            found = schedules.due_schedule(row)
            return await self._advance(found, decide(found.state))
        except ArgumentError as error:
            reason = str(error)
        except (DBAPIError, OverflowError) as error:  # such as one that a trigger of the application raises
            reason = first_line(error)
        log.error("schedule %r: %s; it is tried again in %.0f s", row["name"], reason, _POSTPONED)
        postpone = partial(schedules.postpone, name=row["name"], row_version=row["row_version"], seconds=_POSTPONED)
        return 0 if await persistently(self._database, postpone, what="schedules") else None

    async def _advance(self, found: DueSchedule, decision: Decision) -> int | None:
        advance: Callable[[Connection], int | None] = partial(schedules.advance, found=found, decision=decision)
        if not decision.cancels:
            return await persistently(self._database, advance, what="schedules")
        try:
            return await persistently(self._transactions, partial(_cancel_first, found, advance), what="schedules")
        except _Outdated:
            return None


class _Outdated(Exception):
    """The schedule has changed, or others lock what is to be cancelled; nothing is written."""


def _cancel_first(found: DueSchedule, advance: Callable[[Connection], int | None], connection: Connection) -> int:
    """Cancel what is unfinished and start the next, in one transaction, which waits for nobody."""
    schedules.limit_lock_waits(connection)
    with Session(connection) as session:
        try:
            manage.cancel(session, schedules.unfinished_of(session, found.state.name))
            started = advance(connection)
        except DBAPIError as error:
            if sqlstate(error) != _LOCK_NOT_AVAILABLE:
                raise
            raise _Outdated from error
        if started is None:
            raise _Outdated
        session.commit()
    return started
