"""Group commit: what all workflows of a worker record goes through one writer, in one statement after another.

`Writer` commits checkpoints and outcomes; rows that another transaction locks are skipped and tried again in a later
batch, so that only their own workflows wait for it. `StreamWriter` commits what plain steps append to streams; what a
batch does not write, because of a lock for example, is appended alone, so that only its own step waits.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from typing_extensions import override

from sqla_durable.definitions.database_errors import first_line, is_untranslatable
from sqla_durable.definitions.log import Log
from sqla_durable.errors import EncodingError
from sqla_durable.execution.worker.database import Database, persistently
from sqla_durable.execution.worker.hints import Wakeups
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.operations.suspending import Wakers
from sqla_durable.runtime.waiting import Ticket
from sqla_durable.store import Checkpoint, Completion, Fence, Suspend, attempts, steps, streams
from sqla_durable.store.streams import Append, Appended
from sqla_durable.unwinding import AttemptLost

log = Log("sqla_durable.worker")

Row: TypeAlias = Checkpoint | Completion | Suspend

_BATCH = 500
_BATCH_SIZE = 4 * 1024 * 1024  # characters: what the server cannot take in within the time limit is never written
_SHORTEST_RETRY, _LONGEST_RETRY = 0.02, 1.0
_SHOWN = 5  # workflows in a line of the log


class Refusable(Protocol):
    """Something to be committed, for which somebody waits."""

    def refuse(self) -> None:
        """Raise `AttemptLost` where it is waited for, unless its outcome is known already."""


W = TypeVar("W", bound=Refusable)


class GroupCommit(ABC, Generic[W]):
    """Commits what is added, batch after batch, on the event loop.

    It never waits to fill a batch: while one commit is on its way, the next batch gathers.
    """

    def __init__(self) -> None:
        self.waiting: list[W] = []
        self._added = asyncio.Event()
        self._closed = False

    def add(self, write: W) -> None:
        """Let something be committed with the next batch."""
        if self._closed:
            write.refuse()
            return
        self.waiting.append(write)
        self._added.set()

    async def run(self) -> None:
        """Commit batch after batch until cancelled; then refuse what waits and what is still to come."""
        batch: list[W] = []
        try:
            while True:
                await self._added.wait()
                batch = self.take_batch()
                if not self.waiting:
                    self._added.clear()
                await self.commit(batch)
        finally:  # whoever waits in a thread would wait for ever
            self._closed = True
            for each in (*batch, *self.waiting):
                each.refuse()

    def add_again(self, writes: list[W]) -> None:
        """Let what could not be committed be committed before everything else that waits."""
        self.waiting[:0] = writes
        self._added.set()

    @abstractmethod
    def take_batch(self) -> list[W]:
        """Remove the next batch from what is waiting, and return it."""

    @abstractmethod
    async def commit(self, batch: list[W]) -> None:
        """Commit a batch, and let everybody know who waits for something in it."""


class Write(Ticket):
    """Something to be recorded.

    Attributes:
        row: what it is.
        after: what the same attempt submitted just before, if anything; None once this is settled.
    """

    __slots__ = ("after", "row")

    def __init__(self, row: Row, after: Ticket | None = None) -> None:
        super().__init__()
        self.row = row
        self.after = after

    @property
    def fence(self) -> Fence:
        """The attempt that writes."""
        return self.row.fence

    @override
    def settle(self, error: BaseException | None = None) -> None:
        self.after = None  # or all that an attempt has written would stay in memory
        super().settle(error)

    def refuse(self) -> None:
        """Raise `AttemptLost` where it is waited for."""
        self.settle(AttemptLost(self.fence.workflow_id))

    def escape(self) -> bool:
        """Escape what not every database can store; return whether that changes anything."""
        if isinstance(self.row, Suspend):
            return False
        before, self.row = self.row, self.row.escaped
        return before != self.row


@dataclass(slots=True)
class Settled:
    """What became of a batch."""

    written: list[Write] = field(default_factory=list[Write])
    lost: list[Write] = field(default_factory=list[Write])
    locked: list[Write] = field(default_factory=list[Write])


class Writer(GroupCommit[Write]):
    """Commits checkpoints and outcomes, in the order of submission for each workflow.

    Args:
        database: where the statements are executed.
        wakeups: wakes the maintenance for what was suspended to wait, and for what ended and has a parent.
        wakers: wake what waits in memory for a workflow that ends.
    """

    def __init__(self, database: Database, wakeups: Wakeups, wakers: Wakers) -> None:
        super().__init__()
        self._database = database
        self._wakeups = wakeups
        self._wakers = wakers
        self._loop = asyncio.get_running_loop()
        self._delayed: list[Write] = []
        self._retry = _SHORTEST_RETRY

    async def run(self) -> None:
        """Commit batch after batch until cancelled; then refuse what waits and what is still to come."""
        try:
            await super().run()
        finally:
            for each in self._delayed:
                each.refuse()

    def take_batch(self) -> list[Write]:
        """Take what waits, except for workflows that wait for their own rows: nothing overtakes within a workflow."""
        count = _fitting(self.waiting)
        batch = self.waiting[:count]
        del self.waiting[:count]
        if self._delayed:
            delayed = {each.fence.workflow_id for each in self._delayed}
            self._delayed += [each for each in batch if each.fence.workflow_id in delayed]
            batch = [each for each in batch if each.fence.workflow_id not in delayed]
        return [each for each in batch if each.after is None or not _refused_before(each)]

    def _delay(self, writes: list[Write]) -> None:
        if not self._delayed:
            self._loop.call_later(self._retry, self._try_delayed)
            if self._retry < _LONGEST_RETRY <= 2 * self._retry:
                shown = ", ".join(sorted({str(each.fence.workflow_id) for each in writes})[:_SHOWN])
                log.warning("what %s record waits for transactions that hold their rows, such as an open cancel", shown)
            self._retry = min(2 * self._retry, _LONGEST_RETRY)
        self._delayed += writes

    def _try_delayed(self) -> None:
        delayed, self._delayed = self._delayed, []
        self.add_again(delayed)

    async def commit(self, batch: list[Write]) -> None:
        """Commit a batch; rows that are locked are tried again later, and what the database refuses fails alone."""
        if not batch:
            return
        try:
            settled = await persistently(self._database, partial(_write, batch=batch), what="writer")
        except Exception as error:
            await self._split(batch, error)
            return
        for write in settled.written:
            write.settle()
            if not isinstance(write.row, Checkpoint):
                self._note_end(write.row)
        for write in settled.lost:
            write.refuse()
        if settled.locked:
            self._delay(settled.locked)
        elif not self._delayed:
            self._retry = _SHORTEST_RETRY

    def _note_end(self, end: Completion | Suspend) -> None:
        if isinstance(end, Completion):
            self._wakers.wake(end.fence.workflow_id)
            may_have_work = end.is_child or end.has_deferred
        else:
            may_have_work = bool(end.awaits)
        if may_have_work:
            self._wakeups.maintenance.set()

    async def _split(self, batch: list[Write], error: Exception) -> None:
        """Find the workflow whose row the database refuses; it fails alone."""
        groups = list(_by_workflow(batch).values())
        if len(groups) > 1:
            half = len(groups) // 2
            await self.commit([write for group in groups[:half] for write in group])
            await self.commit([write for group in groups[half:] for write in group])
            return
        if is_untranslatable(error) and sum(each.escape() for each in batch):  # each of them, where `any` would stop
            await self.commit(batch)
            return
        log.error("the database refuses what workflow %s records: %s", batch[0].fence.workflow_id, error)
        for write in batch:
            refused = EncodingError(f"the database refuses what the workflow records: {first_line(error)}")
            refused.__cause__ = error
            write.settle(refused)


def _fitting(waiting: Sequence[Write]) -> int:
    """Return how many writes make a batch: one at least, and no more than its size allows."""
    size = count = 0
    for count, each in enumerate(waiting[:_BATCH], 1):
        size += _size_of(each.row)
        if size > _BATCH_SIZE:
            return max(1, count - 1)
    return count


def _size_of(row: Row) -> int:
    return 0 if isinstance(row, Suspend) else len(row.output or "") + len(row.error or "")


def _refused_before(write: Write) -> bool:
    """Refuse what follows on something that was refused: a workflow must not succeed with a hole in its history."""
    error = None if write.after is None else write.after.error
    if error is not None:
        write.settle(error)
    return error is not None


def _write(connection: Connection, batch: Sequence[Write]) -> Settled:
    """Write checkpoints, and what ends the attempts whose checkpoints are all there."""
    if len(batch) == 1 and isinstance(only := batch[0].row, Checkpoint):  # of a workflow that executes alone
        is_written, settled = steps.record_unlocked(connection, only), Settled()
        if is_written:
            settled.written.append(batch[0])
        else:
            _explain(connection, batch, settled)
        return settled
    checkpoints = [each.row for each in batch if isinstance(each.row, Checkpoint)]
    ends = [each.row for each in batch if not isinstance(each.row, Checkpoint)]
    unwritten = attempts.write_batch(connection, checkpoints, ends)
    if not unwritten:
        return Settled(written=list(batch))
    failed = [_is_unwritten(each.row, unwritten) for each in batch]
    settled = Settled(written=[each for each, has_failed in zip(batch, failed, strict=True) if not has_failed])
    _explain(connection, [each for each, has_failed in zip(batch, failed, strict=True) if has_failed], settled)
    return settled


def _is_unwritten(row: Row, unwritten: attempts.Unwritten) -> bool:
    if isinstance(row, Checkpoint):
        return (row.fence, row.key) in unwritten.checkpoints
    return row.fence in unwritten.ends


def _explain(connection: Connection, failed: Sequence[Write], settled: Settled) -> None:
    """Find out why rows were not written: an earlier try has done so, they are locked, or the attempt has lost them."""
    recorded = steps.recorded_among(connection, [each.row for each in failed if isinstance(each.row, Checkpoint)])
    reached = attempts.finished_by(connection, [each.fence for each in failed if isinstance(each.row, Completion)])
    owned = attempts.still_owned(connection, [each.fence for each in failed])
    for each in failed:
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
        case Suspend():
            return False


def _by_workflow(writes: Iterable[Write]) -> dict[UUID, list[Write]]:
    groups: defaultdict[UUID, list[Write]] = defaultdict(list)
    for write in writes:
        groups[write.fence.workflow_id].append(write)
    return groups


@dataclass(slots=True)
class _StreamWrite:
    """Something to be appended; None as the outcome if it is to be tried alone."""

    append: Append
    outcome: asyncio.Future[Appended | None]

    def settle(self, appended: Appended | None) -> None:
        if not self.outcome.done():
            self.outcome.set_result(appended)

    def refuse(self) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(AttemptLost(self.append.origin.fence.workflow_id))
            self.outcome.exception()  # seen: perhaps nobody waits any more


class StreamWriter(GroupCommit[_StreamWrite]):
    """Appends to streams, of each workflow one append in a batch."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._database = database
        self._loop = asyncio.get_running_loop()

    async def append(self, append: Append) -> Appended:
        """Append, and return when that is committed.

        Raises:
            AttemptLost: the attempt no longer owns the workflow, or the worker ends.
            DBAPIError: the database refuses the values.
        """
        write = _StreamWrite(append, self._loop.create_future())
        self.add(write)
        appended = await write.outcome
        if appended is not None:
            return appended
        alone = partial(streams.append, origin=append.origin, name=append.name, values=append.values)
        return await persistently(self._database, alone, what="stream")

    def take_batch(self) -> list[_StreamWrite]:
        """Take what waits, of each workflow the first."""
        taken: dict[UUID, _StreamWrite] = {}
        rest: list[_StreamWrite] = []
        size = 0
        for each in self.waiting:
            workflow_id = each.append.origin.fence.workflow_id
            size += sum(len(value or "") for value in each.append.values)
            if workflow_id in taken or (taken and (size > _BATCH_SIZE or len(taken) >= _BATCH)):
                rest.append(each)
            else:
                taken[workflow_id] = each
        self.waiting = rest
        return list(taken.values())

    async def commit(self, batch: list[_StreamWrite]) -> None:
        """Append a batch; if the database refuses it, each is tried alone."""
        appends = [each.append for each in batch]
        appended: Sequence[Appended | None]
        try:
            appended = await persistently(self._database, partial(streams.append_many, appends=appends), what="streams")
        except DBAPIError:  # one of them is refused: which one, each finds out alone
            appended = [None] * len(batch)
        for each, outcome in zip(batch, appended, strict=True):
            each.settle(outcome)
