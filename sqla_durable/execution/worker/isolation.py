"""Keeps the row of one workflow from stopping what a worker does for all others.

The worker's statements are about many workflows at once. Where one of them fails because of what is in a row, it is
executed for halves of them, until the workflow at fault is found: that one fails, with an error that says why. If even
that is refused, by a trigger for example, the workflow is set aside for a while.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar
from uuid import UUID

from sqlalchemy import Connection

from sqla_durable.definitions.database_errors import first_line, is_about_data
from sqla_durable.definitions.log import Log
from sqla_durable.execution.worker.database import Database, persistently
from sqla_durable.operations.transaction_retries import sqlstate_of
from sqla_durable.store import failures
from sqla_durable.store.statements import ALL, Subset

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

log = Log("sqla_durable.worker")

_SHORTEST_ASIDE, _LONGEST_ASIDE = 60.0, 3_600.0  # seconds


class Sweep(Protocol[T_co]):
    """A statement over the workflows that it finds."""

    def __call__(self, connectable: Connection, /, *, subset: Subset) -> T_co:
        """Execute it for a part of them."""
        ...


class Isolation:
    """Finds workflows that make a worker's statements fail."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._aside: dict[UUID, float] = {}
        self._pauses: dict[UUID, float] = {}

    @property
    def part(self) -> Subset:
        """What a statement is to be about: everything but what is set aside."""
        if not self._aside:
            return ALL
        now = time.monotonic()
        self._aside = {each: until for each, until in self._aside.items() if until > now}
        return Subset(excluded=tuple(self._aside)) if self._aside else ALL

    def is_aside(self, workflow_id: UUID) -> bool:
        """Return whether a workflow is set aside."""
        return self._aside.get(workflow_id, 0.0) > time.monotonic()

    async def sweep(self, statement: Sweep[T], found: Sweep[Sequence[UUID]], *, what: str) -> list[T]:
        """Execute a statement that finds its workflows by itself; return what it returned, for each part.

        Args:
            statement: executes it.
            found: returns the ids of what it would change.
            what: what it does to a workflow, for messages: `wake`.
        """
        part = self.part
        try:
            return [await self._execute(partial(statement, subset=part))]
        except Exception as error:
            if not is_about_data(error):
                raise
            log.warning("%s: %s; trying for one workflow after another", what, first_line(error))
        ids = await self._execute(partial(found, subset=part))
        return await self.each(ids, lambda some: self._execute(partial(statement, subset=Subset(some))), what=what)

    async def each(self, ids: Sequence[UUID], act: Callable[[Sequence[UUID]], Awaitable[T]], *, what: str) -> list[T]:
        """Do something to these workflows; if that fails because of one, to the others without it."""
        if not ids:
            return []
        try:
            return [await act(ids)]
        except Exception as error:
            if not is_about_data(error):
                raise
            if len(ids) == 1:
                await self.condemn(ids[0], error, what=what)
                return []
        half = len(ids) // 2
        first = await self.each(ids[:half], act, what=what)
        return [*first, *await self.each(ids[half:], act, what=what)]

    async def condemn(self, workflow_id: UUID, error: BaseException, *, what: str) -> None:
        """Fail a workflow that makes a statement fail; if that is refused, or somebody holds its row, set it aside."""
        try:
            faults = await self._execute(partial(failures.faults, workflow_id=workflow_id))
        except Exception as unknown:
            if not is_about_data(unknown):
                raise
            faults = []
        reason = _reason(error, faults, what=what)
        log.error("workflow %s: %s", workflow_id, reason)
        if not await self._fail(workflow_id, reason):
            self._set_aside(workflow_id)

    async def _fail(self, workflow_id: UUID, reason: str) -> bool:
        for fail in (failures.fail_refused, failures.fail_refused_alone):
            try:
                return await self._execute(partial(fail, workflow_id=workflow_id, reason=reason))
            except Exception as error:
                if not is_about_data(error):
                    raise
                log.error("workflow %s: the database refuses its failure, too: %s", workflow_id, first_line(error))
        return False

    async def _execute(self, statement: Callable[[Connection], T]) -> T:
        return await persistently(self._database, statement, what="maintenance")

    def _set_aside(self, workflow_id: UUID) -> None:
        pause = self._pauses[workflow_id] = min(2 * self._pauses.get(workflow_id, _SHORTEST_ASIDE / 2), _LONGEST_ASIDE)
        self._aside[workflow_id] = time.monotonic() + pause
        log.error("workflow %s: this worker sets it aside for %.0f s", workflow_id, pause)


def _reason(error: BaseException, faults: Sequence[str], *, what: str) -> str:
    """Describe what was refused: the columns that are out of bounds, and what the database or its driver says."""
    code = sqlstate_of(error)
    said = f"{first_line(error)} [{type(error).__name__ if code is None else code}]".replace("\0", "\\0")
    about = f"; out of bounds: {'; '.join(faults)}" if faults else ""
    return f"the database refuses to {what} it: {said}{about}"
