"""Processes that are killed: a fork server has the application imported, and forks one worker after another.

Both ends are here: the `ForkServer` in the process of the test, and what happens in the processes behind it.
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
from sqlalchemy.orm import configure_mappers

from sqla_durable.execution.worker import Worker
from sqla_durable.store import schema
from sqla_durable.testing.crash_points import CrashPoint, Moment, ProcessKiller, supports_inside
from sqla_durable.testing.end_states import CrashTestError

MakeWorker: TypeAlias = Callable[[str], Worker]
Pipe: TypeAlias = "Connection[Any, Any]"

NEW_PROCESS: Callable[..., BaseProcess] = multiprocessing.get_context("spawn").Process
"""Makes the process of a fork server."""

_POLL_INTERVAL = timedelta(seconds=0.02)
_STOP_TIMEOUT = 5.0
_LONGEST_OUTPUT = 4_000


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which workflow a worker executes, and where it is killed.

    Attributes:
        queue: the queue that the workflow was started in, which the worker must claim from.
        own_queue: the queue in which the workflow waits for this worker alone.
    """

    url: str
    workflow_id: UUID
    name: str
    queue: str
    own_queue: str
    point: CrashPoint | None


@dataclass(frozen=True, slots=True)
class Imported:
    """Message: the application is imported."""


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """Message: a worker is about to run."""

    worker_id: UUID


@dataclass(frozen=True, slots=True)
class PointReached:
    """Message: a worker has reached its point and dies now."""

    writes: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Message: the worker cannot run."""

    reason: str


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """Message: a worker's process has ended."""

    exitcode: int


Message: TypeAlias = Imported | WorkerStarted | PointReached | Failed | WorkerEnded


class ForkServer:
    """Runs one worker after another, each in a process of its own.

    The server is a new process, not a fork of the test's, and inherits no threads, connections or patches. It ends,
    with everything that it has started, when this process closes it or dies.
    """

    def __init__(self, make_worker: MakeWorker, output: Path) -> None:
        self._output = output
        self._connection, theirs = multiprocessing.Pipe()
        self._process = NEW_PROCESS(
            target=_serve, args=(_pickled(make_worker), theirs, str(output)), name="sqla-durable fork server"
        )
        self._process.start()
        theirs.close()

    def start_worker(self, assignment: Assignment) -> None:
        """Start a worker."""
        try:
            self._connection.send(assignment)
        except OSError as error:
            raise self.error("the process that forks workers has ended") from error

    def message(self, *, seconds: float) -> Message | None:
        """Return the next message, waiting for it; None if there is none in that time."""
        try:
            message: Message | None = self._connection.recv() if self._connection.poll(seconds) else None
        except (EOFError, OSError) as error:
            raise self.error("the process that forks workers has ended") from error
        if isinstance(message, Failed):
            raise self.error(message.reason)
        return message

    def stop_worker(self) -> None:
        """Stop the worker; `WorkerEnded` follows."""
        self._connection.send(None)

    def error(self, what: str, kind: type[CrashTestError] = CrashTestError) -> CrashTestError:
        """Return an error with what the processes have printed."""
        exists = self._output.exists()  # not if the process ended before it could redirect its output
        printed = self._output.read_text(errors="replace")[-_LONGEST_OUTPUT:].strip() if exists else ""
        return kind(f"{what}\n--- printed by the worker's process ---\n{printed}" if printed else what)

    def interrupt(self) -> None:
        """End the process and its worker; callable while another thread waits for a message."""
        self._process.terminate()

    def close(self) -> None:
        """End the process and its worker, and wait for that."""
        self._process.terminate()
        self._process.join(_STOP_TIMEOUT)
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
            f"make_worker={make_worker!r} cannot be sent to another process ({error}): define it at the top level "
            "of a module, where that process can import it."
        ) from error


def _serve(pickled: bytes, connection: Pipe, output: str) -> None:
    """Fork a worker for each assignment, until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the test's process, which ends this one
    signal.signal(signal.SIGTERM, _exit)
    _redirect(output)
    try:
        make_worker: MakeWorker = pickle.loads(pickled)  # noqa: S301 (made by our own parent)
    except Exception:
        connection.send(Failed("make_worker cannot be imported in another process:\n" + traceback.format_exc()))
        return
    _warm_up()
    connection.send(Imported())
    with suppress(EOFError, OSError):
        while True:
            with _forked_worker(make_worker, connection.recv(), connection) as process:
                _wait_for_end(process, connection)
                connection.send(WorkerEnded(process.exitcode or 0))


def _warm_up() -> None:
    """Import the drivers and configure the mappers, half of a worker's start-up time; no connection is made."""
    for driver in ("psycopg", "asyncpg"):
        with suppress(ImportError):
            create_engine(f"postgresql+{driver}://").dispose()
    with suppress(Exception):  # of the application's mappers: its worker raises it again
        configure_mappers()
    gc.freeze()


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit()


def _redirect(output: str) -> None:
    """Redirect the output of this process and its children to a file, which is shown if something fails."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


@contextmanager
def _forked_worker(make_worker: MakeWorker, assignment: Assignment | None, connection: Pipe) -> Generator[BaseProcess]:
    process = multiprocessing.get_context("fork").Process(
        target=_run_worker, args=(make_worker, assignment, connection)
    )
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _wait_for_end(process: BaseProcess, connection: Pipe) -> None:
    """Wait until a worker has ended; stop it if the test asks for that."""
    ready = wait([connection, process.sentinel])
    if connection in ready and process.sentinel not in ready:
        connection.recv()
        process.terminate()
        process.join(_STOP_TIMEOUT)
        process.kill()
    process.join()


def _run_worker(make_worker: MakeWorker, assignment: Assignment | None, connection: Pipe) -> None:
    """Run a worker in this process."""
    if assignment is None:  # a stop for a worker that has already ended by itself
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        worker = _make(make_worker, assignment)
        _install_killer(worker, assignment, connection)
        connection.send(WorkerStarted(worker.id))
        worker.run()
    except CrashTestError as error:
        connection.send(Failed(str(error)))
    except BaseException:
        connection.send(Failed("the worker cannot run:\n" + traceback.format_exc()))


def _make(make_worker: MakeWorker, assignment: Assignment) -> Worker:
    worker = make_worker(assignment.url)
    if not isinstance(worker, Worker):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CrashTestError(
            f"make_worker returned {worker!r}: let it return a sqla_durable.Worker that is not yet running."
        )
    names = sorted(each.name for each in worker.durable.registry)
    if assignment.name not in names:
        raise CrashTestError(
            f"the worker does not know workflow {assignment.name!r}, only {names}: import the module that defines it "
            "in the module of make_worker."
        )
    if assignment.queue not in worker.queues:
        raise CrashTestError(
            f"workflow {assignment.name!r} is in queue {assignment.queue!r}, and the worker claims from "
            f"{worker.queues} only."
        )
    worker.queues = [assignment.own_queue]
    worker.poll_interval = min(worker.poll_interval, _POLL_INTERVAL)
    return worker


def _install_killer(worker: Worker, assignment: Assignment, connection: Pipe) -> None:
    if assignment.point is None:
        return
    unable = [each.dialect.driver for each in _engines(worker) if not supports_inside(each)]
    if assignment.point.moment is Moment.INSIDE and unable:
        raise CrashTestError(
            f"the driver {unable[0]!r} cannot send a COMMIT without waiting for its answer: pass "
            "moments=[Moment.BEFORE, Moment.AFTER]."
        )
    ProcessKiller(
        assignment.point,
        workflow_id=assignment.workflow_id,
        on_point=lambda writes: connection.send(PointReached(writes)),
    ).install()


def _engines(worker: Worker) -> list[Engine]:
    sync = [] if worker.sessionmaker is None else [worker.sessionmaker()]
    inner = [] if worker.async_sessionmaker is None else [worker.async_sessionmaker().sync_session]
    return [schema.engine_of(each) for each in (*sync, *inner)]
