"""Carries out the policies of retention: a loop of its own, so that no claim, timer or reclaim waits for a deletion.

Any number of workers do so at the same time: a batch locks the row of its policy, and the others pass it over. A worker
that dies in a batch has deleted nothing of it.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from sqla_durable.definitions.database_errors import first_line, is_outage
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.registry import Registry
from sqla_durable.execution.worker.database import Databases, persistently
from sqla_durable.manage.retention import Batch, prune, skip_one
from sqla_durable.store import retention

log = Log("sqla_durable.worker")

_FIRST_LIMIT, _LARGEST_LIMIT = 50, 500  # workflows of a batch, without their children
_FAST, _SLOW = 0.1, 0.2  # seconds that a batch may take before the next one is no larger, or smaller
_PAUSE = 60.0  # seconds after a batch that failed


class Retention:
    """Deletes what the policies of the database say, those of other applications too."""

    def __init__(self, databases: Databases, registry: Registry) -> None:
        self._database = databases.shared
        self._transactions = databases.transacting
        self._registry = registry
        self._is_due = asyncio.Event()
        self._limit = _FIRST_LIMIT
        self._taken: list[str] = []

    async def declare(self) -> None:
        """Bring the policies that the code declares into the table, and drop those that it no longer does."""
        for line in await persistently(self._database, self._declare, what="retention"):
            log.info("%s", line)

    def _declare(self, connection: Connection) -> list[str]:
        declared = self._registry.retention()
        put = [each.name for each in declared if retention.put(connection, each.name, each.options, declared=True)]
        gone, left = retention.drop_undeclared(
            connection, declared=[each.name for each in declared], workflows=[each.name for each in self._registry]
        )
        return [
            *(f"retention {each!r} is as the code declares it now" for each in put),
            *(f"retention {each!r} is dropped: the code no longer declares it" for each in gone),
            *(
                f"retention {each!r} was declared by other code than this, and goes on; if no application declares it "
                "any more, drop it with manage.drop_retention"
                for each in left
            ),
        ]

    def wake(self) -> None:
        """Begin a batch, because a policy is due."""
        self._is_due.set()

    async def run(self) -> None:
        """Execute batches until cancelled."""
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            try:
                await self.execute()
            except Exception as error:  # whatever it is, the worker goes on with its workflows
                log.error("retention: %s; trying again in %.0f s", first_line(error), _PAUSE)
                await asyncio.sleep(_PAUSE)

    async def execute(self) -> Batch | None:
        """Execute a batch for a policy that is due, in one transaction; None if there is none, or it fails.

        After it has failed, the next one is of one workflow; if that fails too, the walk passes it over.
        """
        self._taken.clear()
        began = time.monotonic()
        try:
            batch = await self._transactions.execute(self._prune)
        except (DBAPIError, OSError) as error:
            if is_outage(error) or not self._taken:
                raise
            for policy in self._taken:
                await self._yield_to_failure(policy, error)
            return None
        if batch is not None:
            self._adapt(batch, time.monotonic() - began)
        return batch

    def _prune(self, connection: Connection) -> Batch | None:
        policy = retention.take_due(connection)
        if policy is None:
            return None
        self._taken.append(policy.name)
        batch = prune(connection, policy, limit=self._limit)
        if batch.deleted or batch.refused:
            log.debug("retention %r: %d deleted, %d refused", policy.name, batch.deleted, batch.refused)
        return batch

    async def _yield_to_failure(self, policy: str, error: Exception) -> None:
        reason = first_line(error)
        if self._limit == 1:
            passed = await self._transactions.execute(partial(skip_one, name=policy))
            if passed is not None:  # else another worker is at it, or nothing is left
                log.error(
                    "retention %r: passing over workflow %s, which cannot be deleted now: %s", policy, passed, reason
                )
        else:
            log.info("retention %r: %s; the next batch is of one workflow", policy, reason)
        self._limit = 1

    def _adapt(self, batch: Batch, seconds: float) -> None:
        """Choose the size of the next batch, so that its transaction is short."""
        if seconds > _SLOW:
            self._limit = max(1, self._limit // 2)
        elif seconds < _FAST and not batch.is_last:
            self._limit = min(_LARGEST_LIMIT, 2 * self._limit)
