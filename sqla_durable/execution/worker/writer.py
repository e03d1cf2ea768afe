"""Group commit: what all workflows of a worker record goes through one writer, in one statement after another.

It never waits to fill a batch: while one commit is on its way, the next batch gathers. Rows that another transaction
holds are passed over and tried again in a later batch, so that only their own workflows wait for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias
from uuid import UUID

from sqlalchemy import Connection

from sqla_durable.definitions.database_errors import first_line, is_untranslatable
from sqla_durable.definitions.log import Log
from sqla_durable.errors import EncodingError
from sqla_durable.execution.worker.database import Database, persistently
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store import Checkpoint, Completion, Fence, Park, attempts, steps
from sqla_durable.unwinding import AttemptLost

log = Log("sqla_durable.worker")

Ticket: TypeAlias = "asyncio.Future[None] | concurrent.futures.Future[None]"
Row: TypeAlias = Checkpoint | Completion | Park

_BATCH = 500
_BATCH_SIZE = 4 * 1024 * 1024  # characters: what the server cannot take in within the time limit is never written
_SHORTEST_RETRY, _LONGEST_RETRY = 0.02, 1.0
_SHOWN = 5  # workflows in a line of the log


@dataclass(slots=True)
class Write:
    """Something to be recorded, who waits for it, and what the same attempt submitted just before."""

    row: Row
    ticket: Ticket
    after: Ticket | None = None

    @property
    def fence(self) -> Fence:
        """The attempt that writes."""
        return self.row.fence

    def settle(self, error: BaseException | None = None) -> None:
        """Tell who waits; a ticket that was cancelled has nobody left."""
        if self.ticket.done():
            return
        if error is None:
            self.ticket.set_result(None)
        else:
            self.ticket.set_exception(error)
            self.ticket.exception()  # seen: an attempt that ends by another write's error does not ask for this one


@dataclass(slots=True)
class Settled:
    """What became of a batch."""

    written: list[Write] = field(default_factory=list[Write])
    lost: list[Write] = field(default_factory=list[Write])
    locked: list[Write] = field(default_factory=list[Write])


class Writer:
    """Commits what is submitted, in the order of submission for each workflow.

    Runs on the event loop; `submit` may be called there, `submit_from_thread` anywhere.

    Attributes:
        on_asked: called when what was committed is to be looked at: something was parked that waits for a signal, or
            something ended for which a parent may wait.
        on_ended: called with the id of each workflow whose outcome was committed.
    """

    def __init__(self, database: Database) -> None:
        self.on_asked: Callable[[], None] = lambda: None
        self.on_ended: Callable[[UUID], None] = lambda _: None
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Write] = []
        self._delayed: list[Write] = []
        self._retry = _SHORTEST_RETRY
        self._arrived = asyncio.Event()
        self._closed = False

    def submit(self, row: Row, *, after: Ticket | None = None) -> asyncio.Future[None]:
        """Record a row; the future ends when it is committed, with `AttemptLost`, or with `EncodingError`.

        Args:
            after: what the same attempt submitted just before; where that was refused, so is this row.
        """
        ticket: asyncio.Future[None] = self._loop.create_future()
        self._add(Write(row, ticket, after))
        return ticket

    def submit_from_thread(self, row: Row, *, after: Ticket | None = None) -> concurrent.futures.Future[None]:
        """The same from another thread."""
        write = Write(row, ticket := concurrent.futures.Future[None](), after)
        try:
            self._loop.call_soon_threadsafe(self._add, write)
        except RuntimeError:  # the loop is closed: the worker has left this thread behind
            write.settle(AttemptLost(write.fence.workflow_id))
        return ticket

    async def run(self) -> None:
        """Commit batch after batch until cancelled; then refuse what waits and what is still to come."""
        try:
            while True:
                await self._arrived.wait()
                batch = self._next_batch()
                try:
                    await self._commit(batch)
                except BaseException:  # whoever waits in a thread would wait for ever
                    self._refuse(batch)
                    raise
        finally:
            self._closed = True
            self._refuse((*self._waiting, *self._delayed))

    def _refuse(self, writes: Iterable[Write]) -> None:
        for write in writes:
            write.settle(AttemptLost(write.fence.workflow_id))

    def _add(self, write: Write) -> None:
        if self._closed:
            write.settle(AttemptLost(write.fence.workflow_id))
            return
        self._waiting.append(write)
        self._arrived.set()

    def _next_batch(self) -> list[Write]:
        """Take what waits, but for workflows that wait for their own rows: nothing overtakes within a workflow."""
        count = _fitting(self._waiting)
        batch = self._waiting[:count]
        del self._waiting[:count]
        if not self._waiting:
            self._arrived.clear()
        waiting_for_row = {each.fence.workflow_id for each in self._delayed}
        self._delayed += [each for each in batch if each.fence.workflow_id in waiting_for_row]
        return [each for each in batch if each.fence.workflow_id not in waiting_for_row and not _refused_before(each)]

    def _delay(self, writes: list[Write]) -> None:
        if not self._delayed:
            self._loop.call_later(self._retry, self._try_delayed)
            if self._retry < _LONGEST_RETRY <= 2 * self._retry:
                held = ", ".join(sorted({str(each.fence.workflow_id) for each in writes})[:_SHOWN])
                log.warning("what %s record waits for transactions that hold their rows, such as an open cancel", held)
            self._retry = min(2 * self._retry, _LONGEST_RETRY)
        self._delayed += writes

    def _try_delayed(self) -> None:
        self._waiting[:0] = self._delayed
        self._delayed = []
        self._arrived.set()

    async def _commit(self, batch: list[Write]) -> None:
        if not batch:
            return
        try:
            settled = await persistently(self._database, lambda connection: _write(connection, batch), what="writer")
        except Exception as error:
            await self._split(batch, error)
            return
        for write in settled.written:
            write.settle()
            if isinstance(write.row, Completion):
                self.on_ended(write.fence.workflow_id)
        if any(_asks(each.row) for each in settled.written):
            self.on_asked()
        for write in settled.lost:
            write.settle(AttemptLost(write.fence.workflow_id))
        if settled.locked:
            self._delay(settled.locked)
        elif not self._delayed:
            self._retry = _SHORTEST_RETRY

    async def _split(self, batch: list[Write], error: Exception) -> None:
        """Find the workflow whose row the database refuses; it fails alone."""
        groups = list(_by_workflow(batch).values())
        if len(groups) > 1:
            half = len(groups) // 2
            await self._commit([write for group in groups[:half] for write in group])
            await self._commit([write for group in groups[half:] for write in group])
            return
        shown = [each if isinstance(each.row, Park) else replace(each, row=each.row.escaped) for each in batch]
        if is_untranslatable(error) and any(one.row != other.row for one, other in zip(shown, batch, strict=True)):
            await self._commit(shown)
            return
        log.error("the database refuses what workflow %s records: %s", batch[0].fence.workflow_id, error)
        for write in batch:
            refused = EncodingError(f"the database refuses what the workflow records: {first_line(error)}")
            refused.__cause__ = error
            write.settle(refused)


def _asks(row: Row) -> bool:
    return (isinstance(row, Park) and bool(row.awaits)) or (
        isinstance(row, Completion) and (row.is_child or row.has_deferred)
    )


def _fitting(waiting: Sequence[Write]) -> int:
    """Give how many writes make a batch: one at least, and no more than its size allows."""
    size = count = 0
    for count, each in enumerate(waiting[:_BATCH], 1):
        size += _size_of(each.row)
        if size > _BATCH_SIZE:
            return max(1, count - 1)
    return count


def _size_of(row: Row) -> int:
    return 0 if isinstance(row, Park) else len(row.output or "") + len(row.error or "")


def _refused_before(write: Write) -> bool:
    """Refuse what follows on something that was refused: a workflow must not succeed with a hole in its history."""
    before = write.after
    if before is None or not before.done() or before.cancelled():
        return False
    error = before.exception()
    if error is not None:
        write.settle(error)
    return error is not None


def _write(connection: Connection, batch: Sequence[Write]) -> Settled:
    """Write checkpoints, and what ends the attempts whose checkpoints are all there."""
    checkpoints = [each.row for each in batch if isinstance(each.row, Checkpoint)]
    ends = [each.row for each in batch if not isinstance(each.row, Checkpoint)]
    unwritten = attempts.write_batch(connection, checkpoints, ends)
    left = [_is_left(each.row, unwritten) for each in batch]
    settled = Settled(written=[each for each, is_left in zip(batch, left, strict=True) if not is_left])
    if any(left):
        _explain(connection, [each for each, is_left in zip(batch, left, strict=True) if is_left], settled)
    return settled


def _is_left(row: Row, unwritten: attempts.Unwritten) -> bool:
    if isinstance(row, Checkpoint):
        return (row.fence, row.key) in unwritten.checkpoints
    return row.fence in unwritten.ends


def _explain(connection: Connection, left: list[Write], settled: Settled) -> None:
    """Tell what an earlier try has written from rows that somebody holds, and from those that the attempt has lost."""
    recorded = steps.recorded_among(connection, [each.row for each in left if isinstance(each.row, Checkpoint)])
    reached = attempts.finished_by(connection, [each.fence for each in left if isinstance(each.row, Completion)])
    owned = attempts.still_owned(connection, [each.fence for each in left])
    for each in left:
        if _is_there(each.row, recorded, reached):
            settled.written.append(each)
        elif each.fence in owned:
            settled.locked.append(each)
        else:
            settled.lost.append(each)


def _is_there(row: Row, recorded: set[tuple[Fence, str]], reached: dict[Fence, WorkflowStatus]) -> bool:
    match row:
        case Checkpoint():
            return (row.fence, row.key) in recorded
        case Completion():
            return reached.get(row.fence) is row.status
        case Park():
            return False


def _by_workflow(writes: Iterable[Write]) -> dict[UUID, list[Write]]:
    groups: defaultdict[UUID, list[Write]] = defaultdict(list)
    for write in writes:
        groups[write.fence.workflow_id].append(write)
    return groups
