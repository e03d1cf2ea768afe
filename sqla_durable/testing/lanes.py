"""Processes to be killed: a lane is a process that has the application imported and forks one worker after another.

Both ends are here: the `Lane` in the process of the test, and what happens in the processes behind it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeAlias
from uuid import UUID

from sqlalchemy import Engine, create_engine

from sqla_durable.execution.worker import Worker
from sqla_durable.store import schema
from sqla_durable.testing.errors import CrashTestError
from sqla_durable.testing.points import CrashPoint, Fuse, Moment, can_die_inside

MakeWorker: TypeAlias = Callable[[str], Worker]
Pipe: TypeAlias = "Connection[Any, Any]"

_POLL = timedelta(seconds=0.02)
_PATIENCE = 5.0
_SHOWN = 4_000


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is to execute, and where it is to die.

    Attributes:
        queue: the workflow's own queue, which the worker must claim from.
        private: the queue in which the workflow waits for this worker alone.
    """

    url: str
    workflow_id: UUID
    name: str
    queue: str
    private: str
    point: CrashPoint | None


@dataclass(frozen=True, slots=True)
class Ready:
    """The application is imported."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A worker is about to run."""

    worker_id: UUID


@dataclass(frozen=True, slots=True)
class Dying:
    """A worker has reached its point."""

    writes: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Something cannot be done."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker's process has ended."""

    exitcode: int


Message: TypeAlias = Ready | Begun | Dying | Failed | Ended


class Lane:
    """Executes one worker after another, each in a process of its own.

    The process behind it is new, not a fork of the test's: threads, connections and patches stay there. It ends with
    everything that it has started when this one closes it or dies.
    """

    def __init__(self, make_worker: MakeWorker, output: Path) -> None:
        self._output = output
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(_pickled(make_worker), theirs, str(output)), name="sqla-durable lane"
        )
        self._process.start()
        theirs.close()

    def begin(self, order: Order) -> None:
        """Begin a worker."""
        try:
            self._connection.send(order)
        except OSError as error:
            raise self.error("the process that makes workers has ended") from error

    def message(self, *, seconds: float) -> Message | None:
        """Give the next message, waiting for it if need be; None if there is none in that time."""
        try:
            message: Message | None = self._connection.recv() if self._connection.poll(seconds) else None
        except (EOFError, OSError) as error:
            raise self.error("the process that makes workers has ended") from error
        if isinstance(message, Failed):
            raise self.error(message.reason)
        return message

    def stop_worker(self) -> None:
        """Ask for the end of the worker; `Ended` follows."""
        self._connection.send(None)

    def error(self, what: str, kind: type[CrashTestError] = CrashTestError) -> CrashTestError:
        """Give an error with what the processes have printed."""
        printed = self._output.read_text(errors="replace")[-_SHOWN:].strip()
        return kind(f"{what}\n--- printed by the worker's process ---\n{printed}" if printed else what)

    def interrupt(self) -> None:
        """End the process and its worker; callable while another thread waits for a message."""
        self._process.terminate()

    def close(self) -> None:
        """End the process and its worker, and wait for that."""
        self._process.terminate()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()
        self._process.close()


def _pickled(make_worker: MakeWorker) -> bytes:
    try:
        return pickle.dumps(make_worker)
    except Exception as error:
        raise CrashTestError(
            f"make_worker={make_worker!r} cannot be handed to another process ({error}): define it at the top level "
            "of a module, where that process can import it."
        ) from error


def _serve(pickled: bytes, connection: Pipe, output: str) -> None:
    """Fork a worker for each order, until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test's process, which ends this one
    signal.signal(signal.SIGTERM, _leave)
    _redirect(output)
    try:
        make_worker: MakeWorker = pickle.loads(pickled)  # noqa: S301 (made by our own parent)
    except Exception:
        connection.send(Failed("make_worker cannot be imported in another process:\n" + traceback.format_exc()))
        return
    _warm_up()
    connection.send(Ready())
    with suppress(EOFError, OSError):
        while True:
            with _forked(make_worker, connection.recv(), connection) as process:
                _await(process, connection)
                connection.send(Ended(process.exitcode or 0))


def _warm_up() -> None:
    """Import what every worker would import, a third of the time that it needs; no connection is made."""
    for driver in ("psycopg", "asyncpg"):
        with suppress(ImportError):
            create_engine(f"postgresql+{driver}://").dispose()
    gc.freeze()


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit()


def _redirect(output: str) -> None:
    """Send what this process and its children print to a file: it is shown if something goes wrong."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


@contextmanager
def _forked(make_worker: MakeWorker, order: Order | None, connection: Pipe) -> Generator[BaseProcess]:
    process = multiprocessing.get_context("fork").Process(target=_work, args=(make_worker, order, connection))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _await(process: BaseProcess, connection: Pipe) -> None:
    """Wait until a worker has ended, by itself or because it is asked to."""
    ready = wait([connection, process.sentinel])
    if connection in ready and process.sentinel not in ready:
        connection.recv()
        process.terminate()
        process.join(_PATIENCE)
        process.kill()
    process.join()


def _work(make_worker: MakeWorker, order: Order | None, connection: Pipe) -> None:
    """Execute a worker in this process."""
    if order is None:  # the worker that it was meant for has ended by itself
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        worker = _made(make_worker, order)
        _light(worker, order, connection)
        connection.send(Begun(worker.id))
        worker.run()
    except CrashTestError as error:
        connection.send(Failed(str(error)))
    except BaseException:
        connection.send(Failed("the worker cannot run:\n" + traceback.format_exc()))


def _made(make_worker: MakeWorker, order: Order) -> Worker:
    worker = make_worker(order.url)
    if not isinstance(worker, Worker):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CrashTestError(
            f"make_worker gave {worker!r}: let it return a sqla_durable.Worker that is not yet running."
        )
    names = sorted(each.name for each in worker.durable.registry)
    if order.name not in names:
        raise CrashTestError(
            f"the worker does not know workflow {order.name!r}, only {names}: import the module that defines it in "
            "make_worker's."
        )
    if order.queue not in worker.queues:
        raise CrashTestError(
            f"workflow {order.name!r} is in queue {order.queue!r}, and the worker claims from {worker.queues} only."
        )
    worker.queues = [order.private]
    worker.poll_interval = min(worker.poll_interval, _POLL)
    return worker


def _light(worker: Worker, order: Order, connection: Pipe) -> None:
    if order.point is None:
        return
    unable = [each.dialect.driver for each in _engines(worker) if not can_die_inside(each)]
    if order.point.moment is Moment.INSIDE and unable:
        raise CrashTestError(
            f"the driver {unable[0]!r} cannot send a COMMIT without waiting for its answer: pass "
            "moments=[Moment.BEFORE, Moment.AFTER]."
        )
    Fuse(order.point, workflow_id=order.workflow_id, tell=lambda writes: connection.send(Dying(writes))).light()


def _engines(worker: Worker) -> list[Engine]:
    sync = [] if worker.sessionmaker is None else [worker.sessionmaker()]
    inner = [] if worker.async_sessionmaker is None else [worker.async_sessionmaker().sync_session]
    return [schema.engine_of(each) for each in (*sync, *inner)]
