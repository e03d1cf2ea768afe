"""`crash_everywhere`: one workflow for each point at which its worker can be killed; all of them must end the same."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path

from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.definitions.checks import require_duration
from sqla_durable.models import Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.testing.crash_points import CrashPoint, Moment
from sqla_durable.testing.end_states import CrashTestError, EndState, Reference
from sqla_durable.testing.executions import CrashTestDatabase, Execution
from sqla_durable.testing.forking import (
    ForkServer,
    MakeWorker,
)


@dataclass(frozen=True, slots=True)
class CrashReport:
    """The result of a crash test.

    Attributes:
        killed: where workers were killed, in order of commits and moments.
        executions: how many workflows were executed, including undisturbed ones.
        elapsed: how long it took.
        end_state: how the undisturbed workflow ended; all others ended the same.
    """

    killed: tuple[CrashPoint, ...]
    executions: int
    elapsed: timedelta
    end_state: EndState

    @property
    def points(self) -> int:
        """At how many points a worker was killed."""
        return len(self.killed)

    def __str__(self) -> str:
        lines = [f"{self.points} points, {self.executions} executions, {self.elapsed.total_seconds():.1f} s"]
        return "\n".join((*lines, *map(str, self.killed)))


def crash_everywhere(
    make_worker: MakeWorker,
    url: str | URL,
    *,
    start: Callable[[Session], Workflow],
    end_state: Callable[[Session, Workflow], object],
    status: WorkflowStatus = WorkflowStatus.SUCCEEDED,
    moments: Collection[Moment] = tuple(Moment),
    sessionmaker: sessionmaker[Session] | None = None,
    processes: int = 1,
    timeout: timedelta = timedelta(seconds=30),
) -> CrashReport:
    """Check that a workflow ends the same wherever its worker is killed.

    ```python
    def make_worker(url: str) -> Worker:  # at the top level of a module
        return Worker(durable, sessionmaker=sessionmaker(create_engine(url)))

    def test_checkout_survives_a_crash_anywhere(url: str) -> None:
        report = crash_everywhere(
            make_worker,
            url,
            start=lambda session: checkout.start(session, new_order(session).id),
            end_state=lambda session, workflow: charges_of(session, workflow.input["order_id"]),
        )
        assert report.points >= 9
    ```

    First, two workflows are executed undisturbed. Then one workflow is executed for each commit that the worker makes
    and each moment around it, by a worker in a process of its own that is killed there with SIGKILL. The lease of the
    dead worker is deleted, so a second worker reclaims the workflow at once. Compared are what `end_state` returns, the
    workflow's status, the type of its error, the keys and statuses of its steps, and those parts of the outputs in
    which the two undisturbed workflows agree.

    Commits of every engine in the worker's process count, if they change more than leases. Steps have no points of
    their own: the moment before a step's function is the moment after the previous commit, and the moment after it is
    the moment before its own commit. Each workflow waits in a queue of its own, so nothing else in the database is
    executed, including what the workflow starts.

    Use a database for tests: the workflows and what they wrote stay. POSIX only.

    Args:
        make_worker: returns a worker that is not yet running. It is imported and called in another process. The
            worker's queues are replaced, and its poll interval is at most 20 ms.
        url: the argument of `make_worker`, and the database of `start` and `end_state`, with psycopg as its driver.
        start: starts a new workflow in the session, which is then committed; called for each execution.
        end_state: returns what must be the same for all executions, such as the rows that they wrote, without ids.
        status: how the workflow ends undisturbed: without it, a test whose workflows all fail alike would pass.
        moments: when to kill. `Moment.INSIDE` needs psycopg or asyncpg as the worker's driver.
        sessionmaker: opens the sessions of `start` and `end_state`; by default, plain sessions on `url`.
        processes: how many executions run at once, each with a process of its own that imports the application.
        timeout: how long a worker may take for one workflow.

    Returns:
        Where the worker was killed, and how long the test took.

    Raises:
        CrashDifference: a workflow ended differently.
        CrashTimeoutError: a workflow did not end in time.
        CrashTestError: the test cannot be executed as it was given.
    """
    began = time.monotonic()
    require_duration(timeout, "timeout")
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes!r}.")
    points = PointGenerator(moments)
    database_url = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    with (
        _database(database_url, sessionmaker, start, end_state) as database,
        _fork_servers(make_worker, processes) as fork_servers,
    ):
        executions = [Execution(each, database, url=database_url, timeout=timeout) for each in fork_servers]
        reference = Reference(executions[0].undisturbed(status), executions[0].undisturbed(status))
        _execute_all(executions, points, reference)
    if not points.killed:
        raise CrashTestError("the worker was not killed anywhere: its process made no commit.")
    elapsed = timedelta(seconds=time.monotonic() - began)
    return CrashReport(points.killed, points.generated + 2, elapsed, reference.end_state)


class PointGenerator:
    """Generates points in the order of commits, until no worker reaches one: then there are no more commits.

    Several threads may iterate over it; each point goes to one of them.
    """

    def __init__(self, moments: Collection[Moment]) -> None:
        self._moments = [Moment(each) for each in Moment if each in set(moments)]
        if not self._moments:
            raise ValueError(f"moments={moments!r} is empty: name at least one Moment.")
        self._killed: list[CrashPoint] = []
        self._lock = threading.Lock()
        self._all = self._generate()
        self.generated = 0

    @property
    def killed(self) -> tuple[CrashPoint, ...]:
        """The points at which a worker was killed."""
        order = list(Moment)
        return tuple(sorted(self._killed, key=lambda point: (point.commit, order.index(point.moment))))

    def __iter__(self) -> Iterator[CrashPoint]:
        """Iterate over the points that no other thread has got."""
        while True:
            with self._lock:
                point = next(self._all, None)
                self.generated += point is not None
            if point is None:
                return
            yield point

    def reached(self, point: CrashPoint) -> None:
        """Record that a worker was killed at the point."""
        self._killed.append(point)

    def missed(self, point: CrashPoint) -> None:
        """Record that a worker finished without reaching the point: no later commit has this moment either."""
        with self._lock:
            self._moments = [each for each in self._moments if each is not point.moment]

    def end(self) -> None:
        """Generate no more points."""
        with self._lock:
            self._moments = []

    def _generate(self) -> Iterator[CrashPoint]:
        for commit in count(1):
            for moment in Moment:
                if moment in self._moments:
                    yield CrashPoint(commit, moment)
            if not self._moments:
                return


def _execute_all(executions: Sequence[Execution], points: PointGenerator, reference: Reference) -> None:
    """Execute a workflow for each point: in this thread if there is one fork server, else in a thread for each."""
    if len(executions) == 1:
        return _execute_points(executions[0], points, reference)
    with ThreadPoolExecutor(len(executions), thread_name_prefix="sqla-durable crash test") as threads:
        futures = [threads.submit(_execute_points, each, points, reference) for each in executions]
        try:
            for each in as_completed(futures):
                each.result()
        except BaseException:
            points.end()
            for execution in executions:
                execution.fork_server.interrupt()  # its result is no longer needed
            raise


def _execute_points(execution: Execution, points: PointGenerator, reference: Reference) -> None:
    for point in points:
        killed = execution.disturbed(point, reference)
        if killed is None:
            points.missed(point)
        else:
            points.reached(killed)


@contextmanager
def _fork_servers(make_worker: MakeWorker, number: int) -> Generator[list[ForkServer]]:
    """Start fork servers, and end them with everything that they have started."""
    with tempfile.TemporaryDirectory(prefix="sqla-durable-") as directory, ExitStack() as stack:
        yield [
            stack.enter_context(closing(ForkServer(make_worker, Path(directory, f"{each}")))) for each in range(number)
        ]


@contextmanager
def _database(
    url: str,
    sessions: sessionmaker[Session] | None,
    start: Callable[[Session], Workflow],
    end_state: Callable[[Session, Workflow], object],
) -> Generator[CrashTestDatabase]:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    database = CrashTestDatabase(sessions or sessionmaker(engine), start, end_state)
    try:
        yield database
    finally:
        database.close()
        engine.dispose()
