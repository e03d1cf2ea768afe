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
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.testing.books import Books
from sqla_durable.testing.errors import CrashTestError
from sqla_durable.testing.executions import Execution
from sqla_durable.testing.lanes import Lane, MakeWorker
from sqla_durable.testing.points import CrashPoint, Moment
from sqla_durable.testing.states import EndState, Reference


@dataclass(frozen=True, slots=True)
class CrashReport:
    """What a crash test has done.

    Attributes:
        killed: where workers were killed, in order of commits and moments.
        executions: how many workflows were executed, undisturbed ones included.
        elapsed: how long it took.
        end_state: how an undisturbed workflow ended, and so did all others.
    """

    killed: tuple[CrashPoint, ...]
    executions: int
    elapsed: timedelta
    end_state: EndState

    @property
    def points(self) -> int:
        """How many points a worker was killed at."""
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
    """Prove that a workflow ends the same wherever its worker is killed.

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

    Two workflows are executed undisturbed. Then, for each commit that the worker makes and each moment around it,
    another one is, by a worker in a process of its own that is killed there with SIGKILL; a second worker takes over
    at once, because the row of the dead one's lease is deleted; and how the workflow ended is compared. Compared are
    what `end_state` gives, the workflow's status, the type of its error, the keys and statuses of its steps, and those
    parts of the outputs in which the two undisturbed workflows agree.

    Commits count on every engine of the worker's process, if they change anything but leases. Steps have no points of
    their own: before a step's function is after the commit before, after its function is before its commit. Each
    workflow waits in a queue of its own, so nothing else in the database is executed, what it starts itself included.

    Use a database that is there for tests: the workflows and what they wrote stay. POSIX only.

    Args:
        make_worker: makes a worker that is not yet running. It is imported and called in another process. Its queues
            and a longer poll interval than 20 ms are replaced.
        url: what `make_worker` gets; and the database of `start` and `end_state`, with psycopg as its driver.
        start: starts a fresh workflow in the session, which is committed afterwards; called for each execution.
        end_state: gives what must be the same for all of them, such as the rows that they wrote without their ids.
        status: how the workflow ends undisturbed: a test whose workflows all fail alike must not pass unnoticed.
        moments: when to kill. `Moment.INSIDE` needs psycopg or asyncpg as the worker's driver.
        sessionmaker: opens the sessions of `start` and `end_state`, in place of plain ones on `url`.
        processes: how many executions there are at once, each with a process of its own that imports the application.
        timeout: how long a worker may take for one workflow.

    Returns:
        Where the worker was killed, and what that took.

    Raises:
        CrashDifference: a workflow ended differently.
        CrashTimeoutError: a workflow did not end in time.
        CrashTestError: the test cannot be carried out as it was given.
    """
    began = time.monotonic()
    require_duration(timeout, "timeout")
    if processes < 1:
        raise ValueError(f"processes={processes!r} is too small: at least 1.")
    points = Points(moments)
    shown = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    with _books(shown, sessionmaker, start, end_state) as books, _lanes(make_worker, processes) as lanes:
        executions = [Execution(lane, books, url=shown, timeout=timeout) for lane in lanes]
        reference = Reference(executions[0].undisturbed(status), executions[0].undisturbed(status))
        _crash(executions, points, reference)
    if not points.killed:
        raise CrashTestError("the worker was killed nowhere: no commit of its process was seen.")
    elapsed = timedelta(seconds=time.monotonic() - began)
    return CrashReport(points.killed, points.handed_out + 2, elapsed, reference.end_state)


class Points:
    """Hands out points in the order of commits, until no worker is killed any more: that many commits there are."""

    def __init__(self, moments: Collection[Moment]) -> None:
        self._open = [Moment(each) for each in Moment if each in set(moments)]
        if not self._open:
            raise ValueError(f"moments={moments!r} names none: give at least one Moment.")
        self._killed: list[CrashPoint] = []
        self._lock = threading.Lock()
        self._all = self._generate()
        self.handed_out = 0

    @property
    def killed(self) -> tuple[CrashPoint, ...]:
        """The points at which a worker was killed."""
        order = list(Moment)
        return tuple(sorted(self._killed, key=lambda point: (point.commit, order.index(point.moment))))

    def __iter__(self) -> Iterator[CrashPoint]:
        """Iterate over what nobody else has got."""
        while True:
            with self._lock:
                point = next(self._all, None)
                self.handed_out += point is not None
            if point is None:
                return
            yield point

    def reached(self, point: CrashPoint) -> None:
        """Note that a worker was killed there."""
        self._killed.append(point)

    def missed(self, point: CrashPoint) -> None:
        """Note that a worker finished without getting there: no later commit has this moment either."""
        with self._lock:
            self._open = [each for each in self._open if each is not point.moment]

    def end(self) -> None:
        """Hand out nothing more."""
        with self._lock:
            self._open = []

    def _generate(self) -> Iterator[CrashPoint]:
        for commit in count(1):
            for moment in Moment:
                if moment in self._open:
                    yield CrashPoint(commit, moment)
            if not self._open:
                return


def _crash(executions: Sequence[Execution], points: Points, reference: Reference) -> None:
    """Carry out all points: here if there is one lane, otherwise in a thread for each."""
    if len(executions) == 1:
        return _go_through(executions[0], points, reference)
    with ThreadPoolExecutor(len(executions), thread_name_prefix="sqla-durable crash test") as threads:
        futures = [threads.submit(_go_through, each, points, reference) for each in executions]
        try:
            for each in as_completed(futures):
                each.result()
        except BaseException:
            points.end()
            for execution in executions:
                execution.lane.interrupt()  # nobody waits for what is not wanted any more
            raise


def _go_through(execution: Execution, points: Points, reference: Reference) -> None:
    for point in points:
        killed = execution.disturbed(point, reference)
        if killed is None:
            points.missed(point)
        else:
            points.reached(killed)


@contextmanager
def _lanes(make_worker: MakeWorker, number: int) -> Generator[list[Lane]]:
    """Begin lanes, and end them with everything that they have started."""
    with tempfile.TemporaryDirectory(prefix="sqla-durable-") as directory, ExitStack() as stack:
        yield [stack.enter_context(closing(Lane(make_worker, Path(directory, f"{each}")))) for each in range(number)]


@contextmanager
def _books(
    url: str,
    sessions: sessionmaker[Session] | None,
    start: Callable[[Session], Workflow],
    end_state: Callable[[Session, Workflow], object],
) -> Generator[Books]:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    books = Books(sessions or sessionmaker(engine), start, end_state)
    try:
        yield books
    finally:
        books.close()
        engine.dispose()
