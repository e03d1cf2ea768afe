"""Deletes the blobs that nothing needs any more: a loop of its own, because a store of objects may be slow.

Any number of workers do so at the same time: each passes over what others lock, and to delete an object twice does no
harm. An object goes before its row, so that a worker that dies in between leaves something that leads to it.
"""

from __future__ import annotations

import asyncio
from uuid import UUID

from sqla_durable.definitions.blobs import ObjectStore
from sqla_durable.definitions.database_errors import first_line
from sqla_durable.definitions.log import Log
from sqla_durable.execution.worker.database import Database
from sqla_durable.execution.worker.settings import SWEEP_EVERY
from sqla_durable.store import blobs

log = Log("sqla_durable.worker")

_LIMIT = 100  # blobs of a batch


class Blobs:
    """Deletes what is over, in bounded batches.

    Args:
        database: where its statements are executed.
        store: that of the worker's `Durable`: objects elsewhere are left to the workers that have them.
    """

    def __init__(self, database: Database, store: ObjectStore | None) -> None:
        self._database = database
        self._store = store

    async def run(self) -> None:
        """Sweep once a minute until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_EVERY)
            try:
                while await self.sweep() == _LIMIT:
                    pass
            except Exception as error:  # whatever it is, the worker goes on with its workflows
                log.error("blobs: %s; trying again in %.0f s", first_line(error), SWEEP_EVERY)

    async def sweep(self) -> int:
        """Delete a batch of those that are over, and return how many; what a store refuses to delete stays."""
        url = None if self._store is None else self._store.url
        found = await self._database.execute(lambda connection: blobs.condemn(connection, url, limit=_LIMIT))
        over = [each for each, at in found.items() if at is None or await self._has_deleted(each)]
        while over and not await self._database.execute(lambda connection: blobs.delete(connection, over)):
            pass
        if over:
            log.debug("blobs: %d deleted", len(over))
        return len(over)

    async def _has_deleted(self, blob_id: UUID) -> bool:
        """Delete an object; return whether it is gone."""
        try:
            await asyncio.to_thread(_require(self._store).delete, blob_id)
        except Exception as error:  # of a store, which may be anything
            log.error("blobs: the object of blob %s cannot be deleted: %s", blob_id, first_line(error))
            return False
        return True


def _require(store: ObjectStore | None) -> ObjectStore:
    assert store is not None  # noqa: S101 (only objects of the store are found)
    return store
