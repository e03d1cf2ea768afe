"""Hints in a worker: what wakes its loops, which of them a hint wakes, and the connection that listens for hints.

A hint is never needed, because every loop polls. Whatever happens to the connection, the listener warns, reconnects,
and after each LISTEN hints that everything is to be polled, because something may have been missed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from sqla_durable.definitions.database_errors import first_line
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.retry import LONGEST_BACKOFF, ObstacleRetry
from sqla_durable.execution.worker.cursors import Cursors
from sqla_durable.execution.worker.database import shut_down
from sqla_durable.execution.worker.subscribed import Subscribed
from sqla_durable.operations.shielding import GracefulTask, wait_done
from sqla_durable.operations.suspending import Wakers
from sqla_durable.store import hints

log = Log("sqla_durable.worker")
_CHECK = timedelta(seconds=10)
_LIMIT = timedelta(seconds=5)
_CLOSING = 1.0  # seconds in which a hearing ends once its connection is cut


class Wakeup:
    """Wakes one loop, on the event loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def is_set(self) -> bool:
        """Whether the loop was woken since the last `clear`."""
        return self._event.is_set()

    def set(self) -> None:
        """Wake the loop now, or as soon as it waits."""
        self._event.set()

    def clear(self) -> None:
        """Forget that the loop was woken."""
        self._event.clear()

    async def wait(self, within: float | None) -> bool:
        """Wait until the loop is woken, for at most so many seconds; return whether it was."""
        if within is not None and within <= 0:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._event.wait()
        return self._event.is_set()


class SelectiveWakeup(Wakeup):
    """Wakes one loop, for anything or for signals only.

    Attributes:
        is_for_anything: whether there may be anything else than signals.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_for_anything = False

    def set(self) -> None:
        """Wake it for anything that may be there."""
        self.is_for_anything = True
        super().set()

    def set_for_signals(self) -> None:
        """Wake it for signals, and nothing else that is new."""
        super().set()

    def clear(self) -> None:
        """Forget that it was woken."""
        self.is_for_anything = False
        super().clear()


class ClaimsWakeup(SelectiveWakeup):
    """Wakes the claims, for their queues or for *receivers*: suspended workflows to which signals were sent.

    Attributes:
        accepts_receivers: whether they claim receivers now: they have found nothing in the queues.
    """

    def __init__(self) -> None:
        super().__init__()
        self.accepts_receivers = False
        self._receivers: set[UUID] = set()

    def set_for_receiver(self, workflow_id: UUID) -> None:
        """Wake them for one receiver."""
        self._receivers.add(workflow_id)
        self.set_for_signals()

    def take_receivers(self) -> list[UUID]:
        """Return the receivers since the last time, and forget them."""
        taken, self._receivers = self._receivers, set()
        return list(taken)


class Wakeups:
    """What wakes the loops of one worker.

    Attributes:
        claims: something may be pending in the queues.
        maintenance: something may be due, or sent.
        heartbeat: something that this worker executes may have been taken from it.
    """

    def __init__(self) -> None:
        self.claims = ClaimsWakeup()
        self.maintenance = SelectiveWakeup()
        self.heartbeat = Wakeup()


class HintReceiver:
    """Wakes what a hint is about: for a queue, for what this worker is executing, or for what waits.

    Args:
        wakeups: wake the loops of this worker.
        wakers: wake operations that wait in memory.
        cursors: are set back where something may stand before them.
        worker_id: this worker.
        queues: those that it claims from.
    """

    def __init__(
        self, wakeups: Wakeups, wakers: Wakers, cursors: Cursors, *, worker_id: UUID, queues: Subscribed
    ) -> None:
        self._wakeups = wakeups
        self._wakers = wakers
        self._cursors = cursors
        self._worker_id = str(worker_id)
        self._queues = queues

    def receive(self, payload: str) -> None:
        """Wake what the payload of a hint is about."""
        match hints.read(payload):
            case hints.Kind.QUEUE, queue:
                if queue in self._queues:
                    self._wakeups.claims.set()
                elif self._queues.fits(queue):  # a poll finds it, if it is there: anybody may send a hint
                    self._wakeups.maintenance.set()
            case hints.Kind.WORKER, worker_id:
                if worker_id == self._worker_id:
                    self._wakeups.heartbeat.set()
            case hints.Kind.SENT, receiver:
                if self._wakers.wake(payload) or not self._wake_claims_for(receiver):
                    self._wakeups.maintenance.set_for_signals()
            case hints.Kind.LATE, _:
                self._cursors.restart()
                self._wakeups.maintenance.set()
            case _:
                self._wakeups.maintenance.set()

    def _wake_claims_for(self, receiver: str) -> bool:
        """Wake the claims for a receiver, if they accept it; return whether they do."""
        if not self._wakeups.claims.accepts_receivers:
            return False
        try:
            workflow_id = UUID(receiver.partition(":")[0])
        except ValueError:  # several have got one, or somebody sends hints of another form
            return False
        self._wakeups.claims.set_for_receiver(workflow_id)
        return True


class Listener:
    """Calls a function on the event loop for each hint.

    The connection comes out of the engine's pool and is counted there no longer: a small pool does not lose a place.
    Behind a pooler in transaction mode nothing arrives.

    ```python
    listener = Listener(engine, lambda payload: print(hints.read(payload)))
    task = asyncio.create_task(listener.run())
    ```

    Args:
        engine: the sync face of the worker's engine, of psycopg or asyncpg, sync or async; with another driver it
            does not listen.
        on_hint: called with the payload of each hint, and with `EVERYWHERE` after each LISTEN.
        check: how often the server is asked whether it is still there.
        limit: how long it may take to answer that, and to connect.
    """

    def __init__(
        self,
        engine: Engine,
        on_hint: Callable[[str], None],
        *,
        check: timedelta = _CHECK,
        limit: timedelta = _LIMIT,
    ) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._on_hint = on_hint
        self._check = check.total_seconds()
        self._limit = limit.total_seconds()

    async def run(self) -> None:
        """Listen until cancelled; errors end the connection only."""
        hear = _hearing_of(self._engine)
        if hear is None:
            log.info("the driver %r is not listened on: workflows are found by polling", self._engine.dialect.driver)
            await asyncio.Event().wait()
            return
        again, warned = ObstacleRetry(), False
        while True:
            line = _Line(self._on_hint, check=self._check, limit=self._limit)
            error = await self._listen(line, hear)
            again = ObstacleRetry() if line.lasted else again
            _report(error, warned=warned and not line.listens)
            warned = True
            # Whatever the error was, it is an obstacle: nobody else would try again.
            await asyncio.sleep(again.wait_before_next(ConnectionError()) or LONGEST_BACKOFF)

    async def _listen(self, line: _Line, hear: _Hear) -> Exception:
        """Listen on one connection until it is lost, or silent for too long; return the error."""
        hearing = hear(self._engine, line)
        try:
            while not hearing.done():
                await line.watch(hearing)
            hearing.result()
        except Exception as error:
            return error
        finally:
            line.end()
            hearing.add_done_callback(_ignore)
            await asyncio.wait([hearing], timeout=_CLOSING)
            hearing.cancel()  # if it is stuck in connecting, where no connection is there to be cut
        return ConnectionError("the connection was closed")


class _Line:
    """One connection that is listened on, perhaps in a thread, and watched from the event loop.

    Attributes:
        check: seconds until the hearing asks whether the server is still there.
        listens: whether the LISTEN has been answered.
    """

    def __init__(self, on_hint: Callable[[str], None], *, check: float, limit: float) -> None:
        self.check = check
        self.listens = False
        self._on_hint = on_hint
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._silent_until = self._loop.time() + limit
        self._began = 0.0
        self._raw: Any = None
        self._ended = False
        self._lock = threading.Lock()

    @property
    def lasted(self) -> bool:
        """Whether it listened for so long that the next one may follow at once."""
        return self.listens and time.monotonic() - self._began > LONGEST_BACKOFF

    def hold(self, raw: Any) -> None:
        """Note the driver's connection, so that it can be cut off.

        Raises:
            TimeoutError: nobody waits for it any more.
        """
        with self._lock:
            if self._ended:
                raise TimeoutError("the connection came too late")
            self._raw = raw

    def begin(self) -> None:
        """Note that the LISTEN was answered; what was committed before it is still to be found."""
        self._began = time.monotonic()
        self.listens = True
        self.answer()
        self.hint(hints.EVERYWHERE)

    def answer(self) -> None:
        """Note that the server is there."""
        self._loop.call_soon_threadsafe(self._extend)

    def hint(self, payload: str) -> None:
        """Pass a hint on."""
        self._loop.call_soon_threadsafe(self._pass_on, payload)

    async def watch(self, hearing: asyncio.Future[None]) -> None:
        """Wait for the end of the hearing, for as long as it may be silent.

        Raises:
            TimeoutError: it has been silent for longer.
        """
        left = self._silent_until - self._loop.time()
        if left <= 0:
            raise TimeoutError(f"no answer within {self._limit:.1f} s")
        await asyncio.wait([hearing], timeout=left)

    def end(self) -> None:
        """Pass nothing on any more, and shut the connection down under what listens on it."""
        with self._lock:
            self._ended = True
            if self._raw is not None:
                shut_down(self._raw)

    def _extend(self) -> None:
        self._silent_until = self._loop.time() + self.check + self._limit

    def _pass_on(self, payload: str) -> None:
        if not self._ended:
            self._on_hint(payload)


_Hear: TypeAlias = Callable[[Engine, _Line], "asyncio.Future[None]"]


def _hearing_of(engine: Engine) -> _Hear | None:
    match engine.dialect.driver, engine.dialect.is_async:
        case "psycopg", False:
            return _hear_in_thread
        case "psycopg", True:
            return lambda engine, line: asyncio.ensure_future(_hear_psycopg(engine, line))
        case "asyncpg", True:
            return lambda engine, line: asyncio.ensure_future(_hear_asyncpg(engine, line))
        case _:
            return None


async def _hear_psycopg(engine: Engine, line: _Line) -> None:
    async with _own_async_connection(engine) as (connection, raw):
        line.hold(raw)
        await connection.run_sync(hints.listen)
        line.begin()
        while True:
            async with aclosing(raw.notifies(timeout=line.check)) as notifications:
                async for each in notifications:
                    line.hint(each.payload)
            await connection.run_sync(hints.probe)
            line.answer()


async def _hear_asyncpg(engine: Engine, line: _Line) -> None:
    async with _own_async_connection(engine) as (connection, raw):
        line.hold(raw)
        lost = asyncio.Event()

        def on_end(_connection: object) -> None:
            lost.set()

        def on_notification(_connection: object, _pid: int, _channel: str, payload: str) -> None:
            line.hint(payload)

        raw.add_termination_listener(on_end)
        await raw.add_listener(hints.channel_on(engine), on_notification)
        line.begin()
        while not await _is_set(lost, within=line.check):
            await connection.run_sync(hints.probe)
            line.answer()


def _hear_in_thread(engine: Engine, line: _Line) -> asyncio.Future[None]:
    loop = asyncio.get_running_loop()
    hearing: asyncio.Future[None] = loop.create_future()

    def work() -> None:
        error: BaseException | None = None
        try:
            _hear(engine, line)
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop was closed: nobody waits
            loop.call_soon_threadsafe(_end, hearing, error)

    # No executor: at the interpreter's exit it would wait for a thread that is stuck in connecting.
    threading.Thread(target=work, name="sqla-durable-listener", daemon=True).start()
    return hearing


def _hear(engine: Engine, line: _Line) -> None:
    with _own_connection(engine) as (connection, raw):
        line.hold(raw)
        hints.listen(connection)
        line.begin()
        while True:
            for each in raw.notifies(timeout=line.check):
                line.hint(each.payload)
            hints.probe(connection)
            line.answer()


@contextmanager
def _own_connection(engine: Engine) -> Generator[tuple[Connection, Any]]:
    connection = engine.connect()
    raw = _taken_out(connection)
    try:
        yield connection, raw
    finally:
        raw.close()


@asynccontextmanager
async def _own_async_connection(engine: Engine) -> AsyncGenerator[tuple[AsyncConnection, Any]]:
    connecting = GracefulTask(_connected(engine))
    try:
        await wait_done(connecting)
        yield connecting.result()
    finally:
        if not (await asyncio.wait([connecting], timeout=_CLOSING))[0]:
            connecting.cancel_now()
        elif not (connecting.cancelled() or connecting.exception()):
            with suppress(Exception):  # it may be lost
                await asyncio.wait_for(connecting.result()[1].close(), _CLOSING)
        await asyncio.sleep(0)  # a transport that was aborted closes its socket in the loop's next turn


async def _connected(engine: Engine) -> tuple[AsyncConnection, Any]:
    connection = await AsyncEngine(engine).connect()
    return connection, await connection.run_sync(_taken_out)


def _taken_out(connection: Connection) -> Any:
    """Take a connection out of its pool, where the LISTEN would outlive us, and return the driver's.

    That one is closed, and not SQLAlchemy's, which would try a rollback and log an error where the server is gone.
    """
    raw = connection.connection.driver_connection
    connection.detach()
    return raw


async def _is_set(event: asyncio.Event, *, within: float) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), within)
    return event.is_set()


def _end(hearing: asyncio.Future[None], error: BaseException | None) -> None:
    if hearing.done():
        return
    if error is None:
        hearing.set_result(None)
    else:
        hearing.set_exception(error)


def _ignore(hearing: asyncio.Future[None]) -> None:
    if not hearing.cancelled():
        hearing.exception()


def _report(error: Exception, *, warned: bool) -> None:
    level = logging.DEBUG if warned else logging.WARNING
    log.log(level, "listening for hints: %s; workflows are found by polling meanwhile", first_line(error))
