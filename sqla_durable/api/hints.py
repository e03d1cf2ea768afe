"""Hints to workers: after the caller's transaction has committed, a NOTIFY says where there is work.

Workers find everything by polling; a hint only hastens it, and losing one loses nothing. It is sent in nobody's
transaction, on a connection of its own: the first at once, then at most one every `INTERVAL` seconds for each pool.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import weakref
from collections.abc import Coroutine
from dataclasses import field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from sqlalchemy import AssertionPool, Engine, SingletonThreadPool, StaticPool, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import Pool

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.log import Log
from sqla_durable.operations.shielding import GracefulTask
from sqla_durable.store import connection_of, hints
from sqla_durable.store.hints import EVERYWHERE, LATE, Hint, merged, sent_to, to_queue, to_worker
from sqla_durable.store.schema import autocommit

__all__ = ["EVERYWHERE", "INTERVAL", "announce", "merged", "sent_to", "to_queue", "to_worker"]

INTERVAL = 0.01
"""How many seconds at least are between two notifications of one process on one pool of connections."""

log = Log("sqla_durable.hints")

_LAST_MOMENT = 0.3  # seconds at the interpreter's exit
_LONG = 1.5  # seconds between a change and its commit, after which workers are to look back
_IDLE = 2.0  # seconds until a thread without hints ends
_KEY = "sqla_durable.hints"  # in Session.info
# Their one connection may be in the caller's transaction, or the caller may be refused while it is taken.
_SHARED = (StaticPool, SingletonThreadPool, AssertionPool)


def announce(session: Session, *payloads: str) -> None:
    """Send hints to workers once the session's transaction has committed; none if it rolls back.

    Executes nothing in the transaction or on its connection, waits for nothing and never fails. At most once: what
    cannot be sent is dropped. A savepoint that is rolled back takes no hint with it, and a session that has joined an
    open transaction of its connection sends when it believes that it commits: a hint too many, or too early, is
    harmless.

    Args:
        session: the caller's session, in the transaction that changed something.
        *payloads: `to_queue(...)` for one queue, `EVERYWHERE` for all of them and for timers; `to_worker(...)` for a
            worker from which something was taken that it is executing.
    """
    if not payloads:
        return
    announced: _Announced | None = session.info.get(_KEY)
    if announced is None or announced.transaction is not session.get_transaction():
        connection = connection_of(session)  # which begins the transaction, if nothing else has
        channel = hints.channel_on(connection)
        session.info[_KEY] = announced = _Announced(session.get_transaction(), connection.engine, channel)
    announced.payloads = merged(announced.payloads.union(payloads))


@dataclass(slots=True)
class _Announced:
    """The hints that a session sends after its outermost transaction; void after any other."""

    transaction: SessionTransaction | None
    engine: Engine
    channel: str
    payloads: set[str] = field(default_factory=set[str])
    began: float = field(default_factory=time.monotonic)


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    """Send what was announced. For all sessions: a listener for each of them costs ten times as much as `announce`."""
    if _KEY not in session.info or session.in_nested_transaction():
        return
    announced: _Announced = session.info.pop(_KEY)
    if announced.transaction is session.get_transaction():
        if time.monotonic() - announced.began > _LONG:
            announced.payloads.add(LATE)
        _send(announced)


def _send(announced: _Announced) -> None:
    try:
        way = _Way(announced.engine, announced.engine.pool)
        if not isinstance(way.pool, _SHARED):
            _sender_of(way).send(way, {(announced.channel, each) for each in announced.payloads})
    except Exception as error:  # such as a thread that cannot be started: the caller has committed
        _drop(error)


@dataclass(frozen=True, slots=True)
class _Way:
    """An engine, and the pool that it had when there was something to send: disposed of, it gets another one."""

    engine: Engine
    pool: Pool

    @property
    def is_closed(self) -> bool:
        """Whether the engine was disposed of: connections that return to this pool are closed by nobody."""
        return self.engine.pool is not self.pool

    def close(self) -> None:
        """Empty the pool of an engine that was disposed of."""
        if self.is_closed:
            self.pool.dispose()


class _Sender(Protocol):
    """Sends the hints of one pool of connections."""

    def is_at_home(self) -> bool:
        """Return whether this sender can work in this process or event loop."""
        ...

    def send(self, way: _Way, found: set[Hint]) -> None:
        """Accept hints without waiting for anything."""
        ...


@dataclass(slots=True)
class _Gathered:
    """Hints that wait to be sent; the engine is held only as long as there are some."""

    hints: set[Hint] = field(default_factory=set[Hint])
    way: _Way | None = None

    def add(self, way: _Way, found: set[Hint]) -> None:
        self.hints |= found
        self.way = way

    def take(self) -> tuple[_Way, set[Hint]]:
        assert self.way is not None  # noqa: S101 (there are hints)
        taken = self.way, self.hints
        self.hints, self.way = set(), None
        return taken


class _ThreadSender:
    """Sends in a thread, which ends when there has been nothing to send for a while. For sync engines."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._gathered = _Gathered()
        self._has_thread = False
        self._sending = False

    def is_at_home(self) -> bool:
        """Return whether this is the process whose thread sends: a fork has no thread, and perhaps a locked lock."""
        return self._process == os.getpid()

    def send(self, way: _Way, found: set[Hint]) -> None:
        """Hand the hints to the thread."""
        with self._changed:
            self._gathered.add(way, found)
            if not self._has_thread:
                threading.Thread(target=self._work, name="durable-hints", daemon=True).start()
                self._has_thread = True
            self._changed.notify_all()

    def settle(self, seconds: float) -> None:
        """Wait until everything is sent, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._gathered.hints or self._sending), timeout=seconds)

    def _work(self) -> None:
        while self._wait_for_hints():
            began = time.monotonic()
            way = self._send_gathered()
            time.sleep(_rest(time.monotonic() - began))
            way.close()  # again: an engine empties its pool before it replaces it, and both are done by now

    def _wait_for_hints(self) -> bool:
        with self._changed:
            self._has_thread = self._changed.wait_for(lambda: bool(self._gathered.hints), timeout=_IDLE)
            return self._has_thread

    def _send_gathered(self) -> _Way:
        with self._changed:
            way, found = self._gathered.take()
            self._sending = True
        try:
            _deliver(way, found)
        finally:
            with self._changed:
                self._sending = False
                self._changed.notify_all()
        return way


class _TaskSender:
    """Sends in a task of the event loop, which ends when there is nothing to send. For async engines."""

    def __init__(self) -> None:
        self._loop = weakref.ref(asyncio.get_running_loop())
        self._gathered = _Gathered()
        self._task: asyncio.Task[None] | None = None
        self._rests_until = 0.0

    def is_at_home(self) -> bool:
        """Return whether this is the event loop whose task sends."""
        return self._loop() is asyncio.get_running_loop()

    def send(self, way: _Way, found: set[Hint]) -> None:
        """Hand the hints to the task."""
        self._gathered.add(way, found)
        if self._task is None or self._task.done():
            self._task = GracefulTask(self._work(), name="durable-hints")
            self._task.add_done_callback(self._forget)

    async def _work(self) -> None:
        while self._gathered.hints:
            await asyncio.sleep(self._rests_until - time.monotonic())
            began = time.monotonic()
            await _blocking(self._gathered)
            ended = time.monotonic()
            self._rests_until = ended + _rest(ended - began)

    def _forget(self, task: asyncio.Task[None]) -> None:
        """Keep neither the loop nor, of a task that was cancelled with it, the engine."""
        if self._task is task:
            self._task, self._gathered = None, _Gathered()


def _blocking(gathered: _Gathered) -> Coroutine[Any, Any, None]:
    """Send as sync code does, from a task; the session only leads there."""
    return AsyncSession().run_sync(lambda _session: _deliver(*gathered.take()))


def _deliver(way: _Way, found: set[Hint]) -> None:
    """Send, and close the connection if the engine is disposed of meanwhile, which would not close it."""
    try:
        with way.engine.connect() as connection:
            try:
                connection.execution_options(**autocommit(way.engine))
                hints.notify(connection, found)
                connection.commit()
            finally:
                if way.is_closed:
                    connection.invalidate()  # it may be the only one of a new pool, and is closed for good
    except Exception as error:
        _drop(error)
    finally:
        way.close()  # the connection may have gone back to the old one after that was emptied


def _drop(error: Exception) -> None:
    log.debug("a hint was not sent, workers find its workflows by polling: %r", error)


def _rest(took: float) -> float:
    """Return the seconds to gather before the next hints: longer where connecting is slow, as without a pool."""
    return max(INTERVAL, took)


_senders: WeakKeyDictionary[Pool, _Sender] = WeakKeyDictionary()


def _sender_of(way: _Way) -> _Sender:
    sender = _senders.get(way.pool)
    if sender is None or not sender.is_at_home():
        _senders[way.pool] = sender = _TaskSender() if way.engine.dialect.is_async else _ThreadSender()
    return sender


@atexit.register
def _settle() -> None:
    """Send what is left, so that a script that starts a workflow and ends still wakes a worker."""
    until = time.monotonic() + _LAST_MOMENT
    for sender in list(_senders.values()):
        if isinstance(sender, _ThreadSender) and sender.is_at_home():
            sender.settle(max(0.0, until - time.monotonic()))
